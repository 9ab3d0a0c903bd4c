"""What is chosen for each band of support size."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest

from experiments.methods.support_size_bands import BANDS, Choice, band_of, band_tasks, by_band, choose_by_band
from limaml.config import Config
from limaml.evaluation.scoring_method import Floats
from limaml.features.encoder import Encoder
from limaml.tasks.protocols import query_rows
from limaml.tasks.sampling import TaskRows, TaskSpec


@pytest.fixture
def rows(planted_logged: pa.Table, small_config: Callable[..., Config]) -> TaskRows:
    cfg = small_config()
    return TaskRows.from_logged(planted_logged, Encoder.fit(planted_logged, cfg), cfg.task_kind)


@pytest.mark.parametrize(("size", "band"), [(0, -1), (1, 0), (2, 1), (4, 2), (5, 3), (9, 3), (10, 4), (49, 5), (64, 6)])
def test_band_of(size: int, band: int) -> None:
    assert band_of(size) == band


def test_by_band_gathers_positions() -> None:
    specs = [TaskSpec(0, 0, 0, size) for size in (0, 3, 1, 4)]
    assert by_band(specs) == {-1: [0], 2: [1, 3], 0: [2]}


def test_bands_are_judged_on_the_same_rows_after_the_support(rows: TaskRows, small_config: Callable[..., Config]) -> None:
    tasks = band_tasks(rows, small_config(meta={"support_rows": 64}))
    for k, specs in zip(BANDS[:-1], tasks, strict=False):
        assert {spec.support_size for spec in specs} == {k}
        assert [list(spec.query) for spec in specs] == [list(spec.query) for spec in tasks[0]]
        assert all(rows.timestamp_us[spec.query[0]] > rows.timestamp_us[spec.support_start + 19] for spec in specs)
    assert tasks[-1] == []  # nobody has 55 rows


def test_each_band_takes_its_own_best_and_one_without_tasks_the_one_below(
    rows: TaskRows, small_config: Callable[..., Config]
) -> None:
    tasks = band_tasks(rows, small_config(meta={"support_rows": 64}))
    choices = [{"good_at": k} for k in reversed(BANDS)]

    def score(specs: Sequence[TaskSpec], choice: Choice) -> Floats:
        labels = query_rows(rows, specs).labels
        return labels if choice["good_at"] == specs[0].support_size else np.full(len(labels), 0.5)

    chosen = choose_by_band(rows, tasks, choices, score)
    assert [choice["good_at"] for choice in chosen] == [1, 2, 3, 5, 10, 20, 20]


def test_log_loss_decides_between_equal_rankings(rows: TaskRows, small_config: Callable[..., Config]) -> None:
    tasks = band_tasks(rows, small_config(meta={"support_rows": 64}))

    def score(specs: Sequence[TaskSpec], choice: Choice) -> Floats:
        return 0.5 + choice["width"] * (query_rows(rows, specs).labels - 0.5)

    chosen = choose_by_band(rows, tasks, [{"width": 0.1}, {"width": 0.9}, {"width": 0.5}], score)
    assert {choice["width"] for choice in chosen} == {0.9}


def test_no_user_at_all_gives_the_middle_choice(rows: TaskRows) -> None:
    chosen = choose_by_band(rows, [[] for _ in BANDS], [{"at": at} for at in range(3)], lambda specs, _: np.zeros(len(specs)))
    assert chosen == [{"at": 1}] * len(BANDS)
