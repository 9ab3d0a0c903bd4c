"""Structured logs, one event a line with fields; and every Prometheus metric's name.

Logs go to standard error, so that standard output stays free for what a verb prints.
"""

import logging
import sys
from typing import Any

import structlog

# Final names, frozen in tests/contracts/metric_names.txt; dashboards, alert rules and runbooks refer to them.
# Of the service:
LAG_SECONDS = "limaml_meta_embedding_lag_seconds"  # histogram {kind}
INACTIVITY_SECONDS = "limaml_meta_embedding_inactivity_seconds"  # histogram {kind}
LOOKUPS_TOTAL = "limaml_meta_embedding_lookups_total"  # counter {kind, status}
COMPLETE_THROUGH_SECONDS = "limaml_embeddings_complete_through_timestamp_seconds"  # gauge {slot}
MODEL_INFO = "limaml_model_info"  # gauge {version, slot}: 1 serves, 0 did
CHAMPION_LOAD_FAILED = "limaml_champion_load_failed"  # gauge: 1 while the registry's champion cannot be loaded
REGISTRY_POLL_SECONDS = "limaml_registry_poll_timestamp_seconds"  # gauge: last poll that was answered
STORE_BREAKER_OPEN = "limaml_online_store_breaker_open"  # gauge: 1 while look-ups are not tried
REQUESTS_TOTAL = "limaml_rank_requests_total"  # counter {code}
UNKNOWN_CATEGORIES_TOTAL = "limaml_unknown_categories_total"  # counter {feature}: values that training never saw
SCORE = "limaml_score"  # histogram
RANK_SECONDS = "limaml_rank_seconds"  # histogram {stage}
RANK_CANDIDATES = "limaml_rank_candidates"  # histogram
ARM_REQUESTS_TOTAL = "limaml_arm_requests_total"  # counter {arm, answer}
ARM_SECONDS = "limaml_arm_seconds"  # histogram {arm}
LOOKUP_STATUSES = ("fresh", "stale", "missing", "version_mismatch", "store_error", "withheld")
ARM_ANSWERS = ("personalised", "prior", "other_version")
RANK_STAGES = ("features", "embedding", "score", "serialise", "total")
# Of the batch verbs:
LAST_PUBLISHED_SECONDS = "limaml_last_published_timestamp_seconds"  # gauge {kind}: when the last publication ended
PUBLISHED_ENTITIES = "limaml_published_entities"  # gauge {kind, state}: active entities by age of their newest row
ENTITY_STATES = ("within_1d", "within_7d", "within_30d", "older")
MISMATCH_RATIO = "limaml_offline_online_mismatch_ratio"  # gauge {view}: share of logged values unlike the offline join
MISSING_RATIO = "limaml_offline_online_missing_ratio"  # gauge {view}: share of logged rows without a counterpart offline
MAX_DIFFERENCE = "limaml_offline_online_max_difference"  # gauge {view}: largest absolute difference of a number
CONSISTENCY_REQUESTS = "limaml_offline_online_requests"  # gauge: logged requests that were compared
FEATURE_DRIFT_PSI = "limaml_feature_drift_psi"  # gauge {feature}
SCORE_DRIFT_PSI = "limaml_score_drift_psi"  # gauge
VECTOR_DRIFT = "limaml_vector_drift_energy"  # gauge {feature}
VERB_FINISHED_SECONDS = "limaml_verb_finished_timestamp_seconds"  # gauge {verb, status}: last end of a batch verb
VERB_SECONDS = "limaml_verb_duration_seconds"  # gauge {verb}


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
