"""Metrics of batch verbs, which end before anybody could scrape them: a text file a verb, and a Pushgateway.

A verb sets gauges; at its end they are written to `<textfile_dir>/limaml_<verb>.prom`, for the textfile collector of a node
exporter, and pushed if a gateway is configured. A verb that ended well replaces everything it exported before; one that had
nothing to do, or failed, keeps what it did not set. `limaml_verb_finished_timestamp_seconds` keeps one series a status: a
failed run must not hide when the last good one was. An export that fails is logged and changes nothing for the verb.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limaml import telemetry
from limaml.config import MonitoringConfig

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_log = telemetry.get_logger(__name__)

PUSH_TIMEOUT_S = 5.0
"""A gateway that does not answer delays a verb by this at most, twice."""
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    telemetry.LAST_PUBLISHED_SECONDS: (("kind",), "When the last publication ended."),
    telemetry.PUBLISHED_ENTITIES: (("kind", "state"), "Published entities of the champion by age of their newest row."),
    telemetry.MISMATCH_RATIO: (("view",), "Share of the logged values that differ from the offline join."),
    telemetry.MISSING_RATIO: (("view",), "Share of the logged rows that the offline join does not know."),
    telemetry.MAX_DIFFERENCE: (("view",), "Largest absolute difference between a logged number and the offline join's."),
    telemetry.CONSISTENCY_REQUESTS: ((), "Logged requests that were compared with the offline join."),
    telemetry.FEATURE_DRIFT_PSI: (("feature",), "Population stability index of the day's values against the training window."),
    telemetry.SCORE_DRIFT_PSI: ((), "Population stability index of the day's scores against the training window."),
    telemetry.VECTOR_DRIFT: (
        ("feature",),
        "Energy coefficient between the day's item vectors and the training window's.",
    ),
    telemetry.VERB_FINISHED_SECONDS: (("verb", "status"), "When the verb last ended with this status."),
    telemetry.VERB_SECONDS: (("verb",), "Time the verb took when it last ended."),
}
"""Name -> labels and help of every gauge of the batch verbs."""

Series = dict[tuple[str, ...], float]


@dataclass
class Gauges:
    """What one run of a verb wants exported: name -> label values -> value."""

    values: dict[str, Series] = field(default_factory=dict)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set one series; its labels must be the ones declared. NaN, that is not known, leaves the series out."""
        names, _ = GAUGES[name]
        assert set(labels) == set(names), f"{name} has the labels {names}, got {tuple(labels)}"
        if value == value:
            self.values.setdefault(name, {})[tuple(labels[key] for key in names)] = float(value)


def export(cfg: MonitoringConfig, verb: str, status: str, seconds: float, now_s: float, gauges: Gauges) -> None:
    """Export a verb's gauges with its end (`now_s`, seconds since 1970) and duration. Raises nothing: failures are logged."""
    gauges.set(telemetry.VERB_SECONDS, seconds, verb=verb)
    finished = Gauges()
    finished.set(telemetry.VERB_FINISHED_SECONDS, now_s, verb=verb, status=status)
    for way, target in ((_write_file, cfg.textfile_dir), (_push, cfg.pushgateway)):
        if target:
            try:
                way(target, verb, status, gauges.values, finished.values)
            except Exception as error:  # noqa: BLE001 - what the verb did stands, whether or not it could be told
                _log.error("metrics_not_exported", target=target, error=f"{type(error).__name__}: {error}")


def _write_file(folder: str, verb: str, status: str, gauges: dict[str, Series], finished: dict[str, Series]) -> None:
    from prometheus_client import write_to_textfile

    path = Path(folder) / f"limaml_{verb}.prom"
    os.makedirs(folder, exist_ok=True)
    before = _read_file(path)
    ends = {name: before.get(name, {}) | series for name, series in finished.items()}
    kept = {} if status == "ok" else before
    write_to_textfile(str(path), _registry(kept | gauges | ends))


def _push(gateway: str, verb: str, status: str, gauges: dict[str, Series], finished: dict[str, Series]) -> None:
    """Two groups: a push replaces metrics of the same name in its group, and every status keeps its own last end."""
    from prometheus_client import push_to_gateway, pushadd_to_gateway

    push = push_to_gateway if status == "ok" else pushadd_to_gateway
    push(gateway, job="limaml", registry=_registry(gauges), grouping_key={"verb": verb}, timeout=PUSH_TIMEOUT_S)
    both = {"verb": verb, "status": status}
    push_to_gateway(gateway, job="limaml", registry=_registry(finished), grouping_key=both, timeout=PUSH_TIMEOUT_S)


def _read_file(path: Path) -> dict[str, Series]:
    """Gauges of an earlier run; those that are no longer declared are dropped."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, Series] = {}
    for family in text_string_to_metric_families(path.read_text() if path.exists() else ""):
        for sample in family.samples:
            names = GAUGES[sample.name][0] if sample.name in GAUGES else None
            if names is not None and set(sample.labels) == set(names):
                found.setdefault(sample.name, {})[tuple(sample.labels[key] for key in names)] = sample.value
    return found


def _registry(values: dict[str, Series]) -> "CollectorRegistry":
    """A registry that shows `values`; plain families, so that no multi-process mode of prometheus_client touches them."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import GaugeMetricFamily

    class Shown:
        def collect(self) -> Iterator[Any]:
            for name in sorted(values):
                labels, text = GAUGES[name]
                family = GaugeMetricFamily(name, text, labels=labels)
                for key, value in sorted(values[name].items()):
                    family.add_metric(key, value)
                yield family

    registry = CollectorRegistry()
    registry.register(Shown())
    return registry
