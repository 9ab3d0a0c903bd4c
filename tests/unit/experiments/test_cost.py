"""What the cost table counts and times."""

import pytest
import torch

from experiments.cached_jobs import JobOutput
from experiments.tables import cost


@pytest.fixture
def measured():
    """A cell's network and rows."""

    def make(block, **values):
        cell = cost.Cell(block, **({"inner_steps": 1, "embedding_dim": 9, "hidden": 16} | values))
        return cost.Measured(cell)

    return make


@pytest.mark.parametrize(
    ("block", "hidden", "numbers"),
    [
        ("task_vector", None, 9),
        ("id_mlp", 16, 16 + 16 * 16 + 16 + 16 * 9 + 9),
        ("row_mlp", 32, 60 * 32 + 32 + 32 * 9 + 9),
    ],
)
def test_bytes_are_those_of_the_vector_and_of_all_adapted_weights(measured, block, hidden, numbers):
    one = measured(block, hidden=hidden)
    one.repeat()
    values = one.values()
    assert values["stored_bytes"] - cost.BESIDE_BYTES == 4 * 9
    assert values["adapted_bytes"] - cost.BESIDE_BYTES == 4 * numbers
    for name in ("train_step_ms", "train_step_full_ms", "adapt_us", "score_stored_us", "score_full_us"):
        assert values[name] > 0.0


@pytest.mark.parametrize("block", ["task_vector", "id_mlp", "row_mlp"])
def test_both_ways_to_score_a_request_agree_where_the_block_reads_no_row(measured, block):
    one = measured(block, hidden=None if block == "task_vector" else 16)
    stored, full = one.score_stored(), one.score_full()
    assert stored.shape == full.shape == (1, cost.CANDIDATES)
    assert torch.allclose(stored, full, atol=1e-5) == (block != "row_mlp")


def test_times_grow_by_the_shortest_alone(measured):
    one = measured("task_vector", hidden=None)
    one.repeat()
    first = one.values()
    one.repeat()
    assert all(one.values()[name] <= first[name] for name in ("train_step_ms", "adapt_us", "score_stored_us"))


def test_the_grid_goes_over_steps_and_widths_of_every_block():
    cells = cost.cells(quick=False)
    assert len(cells) == len(set(cells))
    for block in ("task_vector", "id_mlp", "row_mlp"):
        mine = [cell for cell in cells if cell.block == block]
        assert {cell.inner_steps for cell in mine} == {0, 1, 3, 5, 10}
        assert {cell.embedding_dim for cell in mine} == set(cost.EMBEDDING_DIMS)
        assert {cell.hidden for cell in mine} == ({None} if block == "task_vector" else set(cost.HIDDEN))


def test_the_table_is_sorted_into_blocks():
    cells = [{"block": "row_mlp", "inner_steps": 0}, {"block": "id_mlp", "inner_steps": 1}]
    table = cost.assemble({"all": JobOutput({"cells": cells})})
    assert table == {"cost": {"task_vector": [], "id_mlp": [{"inner_steps": 1}], "row_mlp": [{"inner_steps": 0}]}}
