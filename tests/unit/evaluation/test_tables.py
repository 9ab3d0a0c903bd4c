"""Tables of a judgement: the sign of a difference, what is not known, and where the groups by support size part."""

import math

import numpy as np
import pytest

from limaml.config import EvaluationConfig
from limaml.evaluation import evaluate
from limaml.evaluation.tables import gain, measure, measure_groups
from limaml.features.encoder import Encoder
from limaml.tasks.protocols import QueryRows
from limaml.tasks.sampling import TaskRows, TaskSpec
from limaml.tasks.splits import Split

CFG = EvaluationConfig(bootstrap_draws=100)


def queries(labels):
    """Three users, in turn."""
    labels = np.array(labels, float)
    users = np.arange(len(labels)) % 3
    return QueryRows(labels, users, 3, np.zeros(len(labels), np.int64), np.arange(len(labels)))


LABELS = [0, 0, 0, 1, 1, 1] * 4
RIGHT = np.linspace(0.1, 0.2, 24) + 0.7 * np.array(LABELS)
WRONG = 1.0 - RIGHT


def test_a_difference_is_positive_where_the_network_is_better_and_its_interval_lies_around_it():
    for mine, rival, sign in ((RIGHT, WRONG, 1.0), (WRONG, RIGHT, -1.0)):
        table = measure(queries(LABELS), {"limaml": mine, "global_mlp": rival}, CFG)
        for metric in ("per_user_auc", "pooled_auc"):
            found = gain(table, metric, "global_mlp")
            assert (found.value, found.low, found.high) == (sign, sign, sign)


def test_what_is_not_measured_is_not_a_number_so_that_no_rule_passes_on_it():
    table = measure(queries([1] * 24), {"limaml": RIGHT, "global_mlp": WRONG}, CFG)
    assert table["methods"]["limaml"]["pooled_auc"] is None
    assert math.isnan(evaluate._number(table["methods"]["limaml"]["pooled_auc"]))
    found = gain(table, "per_user_auc", "global_mlp")
    assert [math.isnan(value) for value in (found.value, found.low, found.high)] == [True] * 3


@pytest.mark.parametrize(
    ("size", "group"),
    [(0, "0"), (1, "1-4"), (4, "1-4"), (5, "5-19"), (19, "5-19"), (20, "20+"), (64, "20+")],
)
def test_a_task_is_counted_in_the_group_of_its_support_size(planted_logged, small_config, size, group):
    cfg = small_config()
    rows = TaskRows.from_logged(planted_logged, Encoder.fit(planted_logged, cfg), cfg.task_kind)
    spec = TaskSpec(0, 0, 0, size, query=np.arange(2))
    tables = measure_groups(rows, [spec], {"limaml": RIGHT[:2]}, Split("hash", (), (), (), 0, 0), CFG)
    assert {name: table["rows"] for name, table in tables.items() if table["rows"]} == {
        "all": 2,
        "new": 2,
        f"support {group}": 2,
    }
