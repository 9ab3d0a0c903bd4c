"""Names, types and labels of all metrics: dashboards, alert rules and runbooks of others refer to them.

`metric_names.txt` holds a line a metric: name, type, labels. Whoever changes a line changes what people have built on it.
"""

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from limaml import telemetry
from limaml.monitoring.export import GAUGES
from serving.metrics import Metrics

GOLDEN = Path(__file__).with_name("metric_names.txt")


def golden():
    """Name -> (type, labels in any order)."""
    rows = [line.split() for line in GOLDEN.read_text().splitlines()]
    return {name: (kind, set("".join(labels).split(",")) - {""}) for name, kind, *labels in rows}


def of_service():
    """What the service declares, read off the collectors themselves: one without a series yet shows no labels."""
    registry = CollectorRegistry()
    Metrics(registry)
    collectors = [found for found in registry._collector_to_names if isinstance(found, MetricWrapperBase)]
    named = {found._name + ("_total" if found._type == "counter" else ""): found for found in collectors}
    return {name: (found._type, set(found._labelnames)) for name, found in named.items()}


def of_verbs():
    return {name: ("gauge", set(labels)) for name, (labels, _) in GAUGES.items()}


def test_the_list_is_sorted_and_names_everything_once():
    lines = GOLDEN.read_text().splitlines()
    assert lines == sorted(set(lines))
    assert set(golden()) == {value for value in vars(telemetry).values() if str(value).startswith("limaml_")}


def test_the_batch_verbs_export_what_the_list_says():
    assert of_verbs() == {name: golden()[name] for name in GAUGES}


def test_the_service_shows_what_the_list_says():
    assert of_service() == {name: value for name, value in golden().items() if name not in GAUGES}


def test_no_user_or_item_is_a_label():
    assert not {"user_id", "item_id", "user", "item"} & {label for _, labels in golden().values() for label in labels}
