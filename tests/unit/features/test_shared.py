"""What is static is held once, and rows read as if it were not."""

import numpy as np
import pyarrow as pa

from limaml.features.encoder import Encoder
from limaml.features.shared import SharedRows, Sharing
from limaml.tasks.sampling import TaskRows


def test_rows_gathered_are_the_rows_that_were_added():
    """Whatever the parts, and where a key's first numbers change on the way."""
    draw = np.random.default_rng(0)
    key = draw.integers(0, 6, 200)
    dense = draw.random((6, 3)).astype(np.float32)[key]
    dense[150:, 0] = 7.0
    dense[180:, 1] = key[180:]
    whole = np.concatenate([dense, draw.random((200, 2)).astype(np.float32)], axis=1)
    for size in (200, 33, 1):
        sharing = Sharing(3, 6)
        for start in range(0, 200, size):
            sharing.add(whole[start : start + size], key[start : start + size])
        rows = sharing.rows()
        assert rows.shape == whole.shape
        assert np.array_equal(rows[:], whole)
        at = draw.integers(0, 200, (4, 5))
        assert np.array_equal(rows[at], whole[at])
        assert np.array_equal(rows.take(at[0])[:], whole[at[0]])
    assert len(rows.distinct) < 100


def test_tasks_hold_what_is_static_once_an_entity(planted_logged, small_config):
    cfg = small_config()
    encoder = Encoder.fit(planted_logged, cfg)
    rows = TaskRows.from_logged(planted_logged, encoder, cfg.task_kind)
    plain = encoder.encode_table(planted_logged).take(rows.source_row)
    for name, key in (("item_dense", "item_id"), ("user_dense", "user_id")):
        shared = getattr(rows.encoded, name)
        assert isinstance(shared, SharedRows)
        assert np.array_equal(shared[:], getattr(plain, name))
        assert len(shared.distinct) == len(set(planted_logged[key].to_pylist()))
    assert np.array_equal(rows.encoded.context, plain.context)
    assert np.array_equal(rows.encoded.item_index, plain.item_index)


def test_no_rows_are_none(planted_logged, small_config):
    cfg = small_config()
    encoder = Encoder.fit(planted_logged, cfg)
    rows = TaskRows.from_logged(planted_logged.slice(0, 0), encoder, cfg.task_kind)
    assert rows.encoded.item_features().shape == (0, encoder.dims.item_dense)
    assert isinstance(planted_logged, pa.Table)
