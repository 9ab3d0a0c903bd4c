"""Item vectors of folds: whose rows they were fitted to."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from experiments.methods.item_tables import ALL_USERS, fitted_items, of_entities, table_of
from limaml.config import Config
from limaml.features.encoder import Encoder
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch

FOLDS = 3


def _rows(logged: pa.Table, cfg: Config) -> tuple[TaskRows, Encoder]:
    encoder = Encoder.fit(logged, cfg)
    return TaskRows.from_logged(logged, encoder, cfg.task_kind), encoder


def test_a_fold_is_read_with_vectors_that_its_labels_do_not_reach(
    planted_logged: pa.Table, small_config: Callable[..., Config]
) -> None:
    cfg = small_config()
    rows, encoder = _rows(planted_logged, cfg)
    entity = 4
    flipped = rows.label.copy()
    mine = slice(rows.offsets[entity], rows.offsets[entity + 1])
    flipped[mine] = 1 - flipped[mine]
    before = fitted_items(rows, cfg, encoder.dims, FOLDS).item_FIK
    after = fitted_items(replace(rows, label=flipped), cfg, encoder.dims, FOLDS).item_FIK
    own = int(table_of([entity], FOLDS)[0])
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [table != own for table in range(FOLDS + 1)]
    assert own != ALL_USERS


def test_without_folds_everybody_is_read_with_the_table_of_all(
    planted_logged: pa.Table, small_config: Callable[..., Config]
) -> None:
    assert table_of([0, 5], 0).tolist() == [ALL_USERS, ALL_USERS]
    rows, encoder = _rows(planted_logged, small_config())
    assert len(fitted_items(rows, small_config(), encoder.dims, 0).item_FIK) == 1


def test_vectors_of_a_batch_are_looked_up_and_an_unknown_item_has_that_of_its_features(
    planted_logged: pa.Table, small_config: Callable[..., Config]
) -> None:
    cfg = small_config()
    rows, encoder = _rows(planted_logged, cfg)
    items = fitted_items(rows, cfg, encoder.dims, 2)
    batch = build_batch(rows, [TaskSpec(0, 0, 0, 2, hide_items=np.array([1]))])
    found_TRK = items(batch.support, torch.tensor([2]))
    torch.testing.assert_close(found_TRK[0, 0], items.item_FIK[2, rows.encoded.item_index[0]])
    content_C = torch.from_numpy(rows.encoded.item_dense[1:2][0, : encoder.dims.item_static])
    torch.testing.assert_close(found_TRK[0, 1], content_C @ items.content_FCK[2] + items.bias_FK[2])


def test_rows_of_some_entities(planted_logged: pa.Table, small_config: Callable[..., Config]) -> None:
    cfg = small_config()
    rows, encoder = _rows(planted_logged, cfg)
    names = [rows.entities[1], rows.entities[7]]
    mine = np.isin(np.array(planted_logged["user_id"].to_pylist()), names)
    wanted = TaskRows.from_logged(planted_logged.filter(pa.array(mine)), encoder, cfg.task_kind)
    found = of_entities(rows, [1, 7])
    assert found.entities == wanted.entities
    for name in ("label", "timestamp_us", "offsets", "entity_index"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_array_equal(found.encoded.item_index, wanted.encoded.item_index)
    np.testing.assert_array_equal(found.encoded.item_dense[:], wanted.encoded.item_dense[:])
