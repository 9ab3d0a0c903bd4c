"""Structured logs, one event a line with fields; and every Prometheus metric's name.

Logs go to standard error, so that standard output stays free for what a verb prints.
"""

import logging
import sys
from typing import Any

import structlog

# Final names; docs/runbooks and dashboards refer to them.
LAG_SECONDS = "limaml_meta_embedding_lag_seconds"
LOOKUPS_TOTAL = "limaml_meta_embedding_lookups_total"
MODEL_INFO = "limaml_model_info"
SCORE = "limaml_score"
RANK_SECONDS = "limaml_rank_seconds"
RANK_CANDIDATES = "limaml_rank_candidates"
LOOKUP_STATUSES = ("fresh", "stale", "missing", "version_mismatch", "store_error")


def configure(*, json_lines: bool = True, level: int = logging.INFO) -> None:
    """Send structlog and the standard library's warnings to standard error, one line an event."""
    renderer = structlog.processors.JSONRenderer() if json_lines else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.captureWarnings(True)


def bind(**fields: Any) -> None:
    """Put `fields` (verb, run id, model version) on every later record of this process."""
    structlog.contextvars.bind_contextvars(**fields)


def get_logger(name: str) -> Any:
    return structlog.get_logger(component=name)
