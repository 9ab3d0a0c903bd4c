"""Every rival: what its scores may depend on, and what not."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from experiments.evidence.arms import HISTORY, RIVALS, SEQUENCE_MODEL
from experiments.evidence.fit_data import FitData
from experiments.evidence.rivals import bought_before, fit_rivals, popular_lately
from experiments.evidence.worlds import Origin
from experiments.methods.history_mlp import HistoryMlp, score_history, with_history
from experiments.methods.item_tables import fitted_items
from limaml.config import Config, load
from limaml.evaluation.scoring_method import MethodInput
from limaml.features.encoder import EncodedRows
from limaml.models.network import build_network
from limaml.tasks.sampling import TaskRows, TaskSpec
from limaml.training.scoring import score_specs

NAMES = sorted({HISTORY, *(name for job, names in RIVALS.items() if job != SEQUENCE_MODEL for name in names)} - {"own_rate"})
"""All but the rule that needs a declared rate of the user's own; and LiMAML beside what rivals read."""
PERSONAL = set(NAMES) - {"item_mean", "global_mlp", "popular_lately", "bought_before"}
"""What follows the support's labels. bought_before does where an item came before."""
_DAY = 86_400_000_000


class _Blind(FitData):
    """Fails a rival that looks at the judged rows while it is fitted."""

    @property
    def test(self):
        raise AssertionError("a rival read the judged rows")


@pytest.fixture(scope="module")
def data(make_planted):
    small = ["evaluation.baseline_steps=6", "training.max_steps=6", "training.validate_every=3", "training.tasks_per_step=16"]
    cfg = load("configs/movielens.toml", [*small, "model.embedding_dim=4", "model.global_hidden=[8]", "training.num_workers=1"])
    return FitData(cfg, Origin(cfg, make_planted(num_users=80, rows_per_user=30)))


def _fitted(data):
    rivals = {name: method for group in RIVALS if group != SEQUENCE_MODEL for name, method in fit_rivals(group, data)}
    return rivals | {HISTORY: with_history(data)[0]}


@pytest.fixture(scope="module")
def methods(data):
    return _fitted(_Blind(data.cfg, data.origin))


@pytest.fixture(scope="module")
def specs(data):
    """Supports of 0 to 12 rows, three queries each and more."""
    rows = data.test.rows
    return [
        TaskSpec(entity, int(rows.timestamp_us[start + 12]), start, start + size, np.arange(start + 13, start + 16 + size))
        for entity, size in enumerate((0, 1, 2, 5, 8, 8, 12))
        for start in [int(rows.offsets[entity])]
    ]


def _flipped(inputs, rows):
    label = inputs.rows.label.copy()
    label[rows] = 1 - label[rows]
    return replace(inputs, rows=replace(inputs.rows, label=label))


def _scores(method, inputs, specs):
    scores = method(inputs, specs)
    assert scores.shape == (sum(len(spec.query) for spec in specs),)
    assert ((scores > 0) & (scores < 1)).all()
    return scores


def test_a_group_fits_what_it_says(methods):
    assert sorted(methods) == NAMES


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"popular_lately"}))
def test_query_labels_change_no_score(name, methods, data, specs):
    """Of what is popular a query row of one task is what another one reads: that rule is held by hand, below."""
    other = _flipped(data.test, np.concatenate([spec.query for spec in specs]))
    np.testing.assert_array_equal(_scores(methods[name], other, specs), _scores(methods[name], data.test, specs))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"bought_before", "popular_lately"}))
def test_support_labels_change_the_scores_of_personal_methods_alone(name, methods, data, specs):
    before = _scores(methods[name], data.test, specs)
    support = np.concatenate([np.arange(spec.support_start, spec.support_stop) for spec in specs])
    after = _scores(methods[name], _flipped(data.test, support), specs)
    assert (before != after).any() == (name in PERSONAL)
    without_support = slice(0, len(specs[0].query))
    np.testing.assert_array_equal(before[without_support], after[without_support])


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(name, methods, data, specs):
    alone = np.concatenate([_scores(methods[name], data.test, [spec]) for spec in specs])
    np.testing.assert_allclose(_scores(methods[name], data.test, specs), alone, atol=1e-6)
    assert _scores(methods[name], data.test, []).shape == (0,)


def test_what_history_adds_begins_at_nothing(data, specs):
    cfg, dims, rows = data.cfg, data.encoder.dims, data.training.rows
    network = build_network(cfg, dims)
    model = HistoryMlp(cfg, dims, fitted_items(rows, cfg, dims, folds=2), network)
    expected = score_specs(network, data.test.rows, specs)
    np.testing.assert_allclose(score_history(model, dims.item_sets)(data.test, specs), expected, atol=1e-6)


def test_a_seed_gives_one_fit(methods, data, specs):
    again = _fitted(data)
    cfg = Config.model_validate(data.cfg.model_dump(mode="json") | {"training": data.cfg.training.model_dump() | {"seed": 1}})
    other = _fitted(FitData(cfg, data.origin))
    for name in ("logistic", "lightgbm", "wide_deep", "dlrm", "history_mlp"):
        first = _scores(methods[name], data.test, specs)
        np.testing.assert_array_equal(_scores(again[name], data.test, specs), first)
        assert (_scores(other[name], data.test, specs) != first).any(), name


@cache
def _by_hand():
    """Of two users one has item 1 on days 0, 4 and 7 (labels 1, 0, 1) and asks for 1 and 2; the other has made 2 popular."""
    item, day, label = np.array([1, 1, 1, 1, 2, 2]), np.array([0, 4, 7, 8, 8, 5]), np.array([1, 0, 1, 0, 0, 1], np.float32)
    width = np.zeros((6, 1), np.float32)
    encoded = EncodedRows(item, width, width, width)
    rows = TaskRows(encoded, label, day * _DAY, np.arange(6), ("a", "b"), np.array([0, 5, 6]), np.array([1, 2]))
    return MethodInput(rows, np.full(6, 0.5)), TaskSpec(0, 8 * _DAY, 0, 3, np.array([3, 4]))


def test_what_was_taken_before_is_counted_with_decay():
    inputs, spec = _by_hand()
    weights = 0.5 ** (np.array([8, 4, 1]) / 4.0)
    own = (weights @ [1, 0, 1] + 2 * 0.5) / (weights.sum() + 2)
    np.testing.assert_allclose(bought_before(4.0, 2.0)(inputs, [spec]), [own, 0.5])


def test_what_was_popular_is_counted_over_the_week_before():
    """Day 0 is eight days before, and the day itself is not read."""
    inputs, spec = _by_hand()
    np.testing.assert_allclose(popular_lately(inputs, [spec]), [(1 + 10) / (2 + 20), (1 + 10) / (1 + 20)])
