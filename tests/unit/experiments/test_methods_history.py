"""History features, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from experiments.methods.history import (
    HistorySettings,
    aggregates,
    history_tasks,
    in_batches,
    vector_features,
)
from limaml.evaluation.scoring_method import MethodInput
from limaml.features.encoder import EncodedRows
from limaml.tasks.sampling import TaskRows, TaskSpec

SETTINGS = HistorySettings(
    shrinkage=1.0,
    slow_shrinkage=3.0,
    genre_shrinkage=2.0,
    recent_rows=2,
    vector_shrinkage=3.0,
    sharpness=1.0,
)
VECTORS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [2.0, 0.0], [0.0, 1.0], [1.0, 2.0]])


@pytest.fixture
def inputs() -> MethodInput:
    """One user's six rows of two genres; the residuals of the first three are 0.5, -0.25 and 0.75."""
    genres = np.array([[1, 0], [0, 1], [1, 1], [1, 0], [0, 1], [1, 1]], np.float32)
    number = np.arange(6)
    encoded = EncodedRows(
        number + 1, np.c_[genres, number].astype(np.float32), np.zeros((6, 1), np.float32), np.zeros((6, 3), np.float32)
    )
    label = np.array([1, 0, 1, 1, 0, 0], np.float32)
    rows = TaskRows(encoded, label, number * 1_000_000, number, ("u",), np.array([0, 6]), np.array([1]))
    return MethodInput(rows, np.array([0.5, 0.25, 0.25, 0.5, 0.5, 0.5]))


def spec(start: int, stop: int, query: list[int]) -> TaskSpec:
    return TaskSpec(0, 6_000_000, start, stop, np.array(query))


def vectors(rows_TR: torch.Tensor) -> torch.Tensor:
    return VECTORS[(rows_TR - 1).clamp(min=0)]


def test_aggregates_of_three_rows(inputs: MethodInput) -> None:
    found = aggregates(history_tasks(inputs, [spec(0, 3, [3, 5])], num_sets=2), SETTINGS)[0]
    user = [
        np.log(4),
        1.0 / 4,  # 0.5 - 0.25 + 0.75 over 3 + 1 rows
        1.0 / 6,
        0.5 / 4,  # two positives and one negative
        0.5 / 3,  # the last two rows
        0.75,
    ]
    first_genre = [1.25 / 4, 1.25 / 4, np.log(3)]  # 0.5 + 0.75 over 2 + 2 rows
    both_genres = [(1.25 + 0.5) / 8, (1.25 + 0.5) / 8, np.log(5)]
    np.testing.assert_allclose(found.numpy(), [user + first_genre, user + both_genres], rtol=1e-6)


def test_affinity_weighs_genres_by_their_rows(inputs: MethodInput) -> None:
    found = aggregates(history_tasks(inputs, [spec(0, 1, [5])], num_sets=2), SETTINGS)[0, 0]
    # One row of the first genre: (0.5 / 3 + 0) / 2 plainly; all of the weight lies on the first.
    np.testing.assert_allclose(found[-3:].numpy(), [0.5 / 6, 0.5 / 3, np.log(2)], rtol=1e-6)


def test_vector_features_of_two_rows(inputs: MethodInput) -> None:
    tasks = history_tasks(inputs, [spec(0, 2, [3])], num_sets=2)
    item_TSK, item_TQK = vectors(tasks.batch.support.item_index_TR), vectors(tasks.batch.query.item_index_TR)
    found = vector_features(tasks, item_TSK, item_TQK, 0.25, SETTINGS)[0, 0]
    pooled = 0.5 * 2 / (2 + 3)  # the candidate is (2, 0): only the first row, (1, 0), counts
    near, far = 1.0, np.exp(-1.0)
    similar = (near * 0.5 - far * 0.25) / (near + far + 1)
    # Rows (1, 0, 1) and (0, 2, 1) with residuals 0.5 and -0.25, slope 1/4, prior precisions 1, 1 and 2.
    x, r = np.array([[1, 0, 1], [0, 2, 1.0]]), np.array([0.5, -0.25])
    factor, _, level = np.linalg.inv(0.25 * x.T @ x + np.diag([1, 1, 2.0])) @ x.T @ r
    np.testing.assert_allclose(found.numpy(), [pooled, similar, 2 * factor, level], rtol=1e-5)


def test_an_empty_support_gives_zeros(inputs: MethodInput) -> None:
    tasks = history_tasks(inputs, [spec(0, 0, [3])], num_sets=2)
    item_TSK, item_TQK = vectors(tasks.batch.support.item_index_TR), vectors(tasks.batch.query.item_index_TR)
    assert not aggregates(tasks, SETTINGS).any()
    assert not vector_features(tasks, item_TSK, item_TQK, 0.25, SETTINGS).any()


def test_a_padded_batch_equals_its_tasks_one_by_one(inputs: MethodInput) -> None:
    specs = [spec(0, 0, [1]), spec(0, 1, [1, 2, 3, 4]), spec(1, 4, [5]), spec(0, 5, [5])]

    def features(part: list[TaskSpec]) -> torch.Tensor:
        tasks = history_tasks(inputs, part, num_sets=2)
        support, query = tasks.batch.support, tasks.batch.query
        of_vectors = vector_features(tasks, vectors(support.item_index_TR), vectors(query.item_index_TR), 0.25, SETTINGS)
        return torch.cat([aggregates(tasks, SETTINGS), of_vectors], dim=2)[query.mask_TR > 0]

    torch.testing.assert_close(features(specs), torch.cat([features([each]) for each in specs]))


def test_batches_hold_every_query_row_once_and_know_its_place(inputs: MethodInput) -> None:
    rng = np.random.default_rng(0)
    specs = [spec(0, int(rng.integers(6)), list(rng.integers(0, 6, rng.integers(0, 200)))) for _ in range(700)]
    wanted = np.concatenate([each.query for each in specs])
    found, seen = np.full(len(wanted), -1), 0
    for part, places in in_batches(specs):
        found[places] = np.concatenate([each.query for each in part])
        seen += len(places)
    assert seen == len(wanted)
    np.testing.assert_array_equal(found, wanted)
