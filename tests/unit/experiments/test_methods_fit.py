"""Every method: what its scores may depend on, and what not."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from json import dumps

import numpy as np
import pyarrow as pa
import pytest

from experiments.methods.fitted import Design, Fitted
from experiments.methods.registry import METHODS
from experiments.methods.search_spaces import SPACES
from experiments.origin_data import CONFIG, OriginData
from experiments.origins import rolling_origins
from limaml.config import load
from limaml.evaluation.scoring_method import Floats, MethodInput
from limaml.tasks.sampling import TaskSpec

_NETWORK = [
    "evaluation.baseline_steps=6",
    "training.max_steps=6",
    "training.validate_every=3",
    "training.tasks_per_step=16",
    "model.embedding_dim=4",
    "model.global_hidden=[8]",
]
DESIGNS: dict[str, Design] = {
    "item_mean": {},
    "user_level": {"space": "logit"},
    "logistic": {"steps": 4, "C": 0.1, "overrides": _NETWORK},
    "lightgbm": {"steps": 6, "rounds": 40, "params": {"num_leaves": 4, "min_data_in_leaf": 20}, "overrides": _NETWORK},
    "global_mlp": {"overrides": _NETWORK},
    "user_id": {"overrides": _NETWORK},
    "history_mlp": {"folds": 2, "overrides": _NETWORK},
    "stored": {"overrides": _NETWORK},
    "history": {"overrides": [*_NETWORK, "meta.inner_lr=0.5"], "folds": 2, "hidden": 8},
    "full": {"overrides": [*_NETWORK, "meta.inner_lr=0.1"]},
    "row_mlp": {"overrides": [*_NETWORK, "model.meta_block=row_mlp", "model.row_age=false", "meta.inner_lr=0.1"]},
    "id_mlp": {"overrides": [*_NETWORK, "model.meta_block=id_mlp", "meta.inner_lr=0.1"]},
}
PERSONAL = sorted(set(METHODS) - {"item_mean", "global_mlp"})


class _Blind(OriginData):
    """Fails a method that looks at the test rows while it is fitted."""

    @property
    def test(self) -> MethodInput:  # type: ignore[override]
        raise AssertionError("a method read the test rows")


@pytest.fixture(scope="module")
def data(make_planted: Callable[..., pa.Table]) -> OriginData:
    logged = make_planted(num_users=80, rows_per_user=30)
    return OriginData(load(CONFIG), rolling_origins(logged)[0], logged)


@pytest.fixture(scope="module")
def fitted(data: OriginData) -> Callable[[str], Fitted]:
    """Each method fitted once."""

    @cache
    def fit(name: str) -> Fitted:
        return METHODS[name](_Blind(data.cfg, data.origin, data.logged), DESIGNS[name], 0)

    return fit


@pytest.fixture(scope="module")
def specs(data: OriginData) -> list[TaskSpec]:
    """Supports of 0 to 12 rows, three queries each."""
    rows = data.test.rows
    return [
        TaskSpec(entity, int(rows.timestamp_us[start + 12]), start, start + size, np.arange(start + 13, start + 16 + size))
        for entity, size in enumerate((0, 1, 2, 5, 8, 8, 12))
        for start in [int(rows.offsets[entity])]
    ]


def _flipped(inputs: MethodInput, rows: np.ndarray) -> MethodInput:
    label = inputs.rows.label.copy()
    label[rows] = 1 - label[rows]
    return replace(inputs, rows=replace(inputs.rows, label=label))


def _support(specs: list[TaskSpec]) -> np.ndarray:
    return np.concatenate([np.arange(spec.support_start, spec.support_stop) for spec in specs])


def _scores(fitted: Fitted, inputs: MethodInput, specs: list[TaskSpec]) -> Floats:
    scores = fitted.score(inputs, specs)
    assert scores.shape == (sum(len(spec.query) for spec in specs),)
    assert ((scores > 0) & (scores < 1)).all()
    return scores


@pytest.mark.parametrize("name", sorted(METHODS))
def test_query_labels_change_no_score(
    name: str, fitted: Callable[[str], Fitted], data: OriginData, specs: list[TaskSpec]
) -> None:
    other = _flipped(data.test, np.concatenate([spec.query for spec in specs]))
    np.testing.assert_array_equal(_scores(fitted(name), other, specs), _scores(fitted(name), data.test, specs))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_support_labels_change_the_scores_of_personal_methods_alone(
    name: str, fitted: Callable[[str], Fitted], data: OriginData, specs: list[TaskSpec]
) -> None:
    before = _scores(fitted(name), data.test, specs)
    after = _scores(fitted(name), _flipped(data.test, _support(specs)), specs)
    assert (before != after).any() == (name in PERSONAL)
    without_support = slice(0, len(specs[0].query))
    np.testing.assert_array_equal(before[without_support], after[without_support])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_scores_do_not_depend_on_the_batch(
    name: str, fitted: Callable[[str], Fitted], data: OriginData, specs: list[TaskSpec]
) -> None:
    alone = np.concatenate([_scores(fitted(name), data.test, [spec]) for spec in specs])
    np.testing.assert_allclose(_scores(fitted(name), data.test, specs), alone, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"stored"}))
def test_the_validation_value_is_that_of_the_scores(name: str, fitted: Callable[[str], Fitted], data: OriginData) -> None:
    assert fitted(name).validation == pytest.approx(data.validator.auc_of(fitted(name).score), abs=1e-9)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_task_gives_no_score(name: str, fitted: Callable[[str], Fitted], data: OriginData) -> None:
    assert _scores(fitted(name), data.test, []).shape == (0,)


@pytest.mark.parametrize("name", ["logistic", "lightgbm", "user_id", "history_mlp"])
def test_a_seed_gives_one_fit(name: str, fitted: Callable[[str], Fitted], data: OriginData, specs: list[TaskSpec]) -> None:
    first = _scores(fitted(name), data.test, specs)
    np.testing.assert_array_equal(_scores(METHODS[name](data, DESIGNS[name], 0), data.test, specs), first)
    assert (_scores(METHODS[name](data, DESIGNS[name], 1), data.test, specs) != first).any()


@pytest.mark.parametrize(
    "design", [{"vectors": "learned"}, {"vectors": "learned", "vector_features": ["pooled"], "direct": False}]
)
def test_learned_vectors_move(design: Design, data: OriginData, specs: list[TaskSpec]) -> None:
    short = METHODS["history_mlp"](data, {**design, "overrides": [*_NETWORK[1:], "evaluation.baseline_steps=1"]}, 0)
    longer = METHODS["history_mlp"](data, {**design, "overrides": _NETWORK}, 0)
    assert (_scores(short, data.test, specs) != _scores(longer, data.test, specs)).any()


@pytest.mark.parametrize("space", ["rate", "logit"])
def test_a_user_level_lies_between_the_items_and_the_labels(space: str, data: OriginData, specs: list[TaskSpec]) -> None:
    rates = METHODS["item_mean"](data, {}, 0).score(data.test, specs)
    label = np.ones_like(data.test.rows.label)
    likes_all = replace(data.test, rows=replace(data.test.rows, label=label))
    raised = METHODS["user_level"](data, {"space": space}, 0).score(likes_all, specs)
    with_support = slice(len(specs[0].query), None)
    assert (raised[with_support] > rates[with_support]).all()
    np.testing.assert_allclose(raised[: len(specs[0].query)], rates[: len(specs[0].query)], rtol=1e-9)


@pytest.mark.parametrize("name", sorted(SPACES))
def test_a_space_draws_valid_designs_and_the_same_ones_again(name: str, data: OriginData) -> None:
    assert name in METHODS
    drawn = [SPACES[name](rng) for rng in [np.random.default_rng(3)] for _ in range(20)]
    again = [SPACES[name](rng) for rng in [np.random.default_rng(3)] for _ in range(20)]
    assert drawn == again
    assert len({dumps(design, sort_keys=True) for design in drawn}) > 1
    for design in drawn:
        data.configured(design, 0)
