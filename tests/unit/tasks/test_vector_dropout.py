"""Numbers of declared vectors that training drops: from training tasks alone, and nothing of anything else."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from limaml.config import FeatureConfig
from limaml.features.encoder import Encoder
from limaml.tasks.protocols import as_served
from limaml.tasks.sampling import TaskRows, build_batch, meta_batch, sample_tasks
from tests.unit.features.test_item_table import CONFIG, FEATURES, VECTOR, logged, vectors

SHARE = 0.25
OTHER = FeatureConfig(entity="item", name="picture", type="vector", width=2, encoder="hashes-1", licence="MIT")
ITEMS = {"i0": [1.0, 2.0, 3.5], "i1": None, "i2": [3.0, 2.5, 1.0]}
PLACE = slice(4, 8)
"""Of `VECTOR` among an item's numbers, whether it is known last."""
NUMBERS = slice(4, 7)


def _config(dropout=0.0, **model):
    features = tuple(f.model_copy(update={"dropout": dropout}) if f == VECTOR else f for f in FEATURES)
    model = {"profile_dropout": 0.0, "unknown_item_share": 0.0, "unknown_entity_share": 0.0} | model
    return CONFIG.model_copy(update={"features": features, "model": CONFIG.model.model_copy(update=model)})


def _rows(cfg, num_rows=300):
    encoder = Encoder.fit(logged(num_rows), cfg, vectors(ITEMS)).with_items(vectors(ITEMS))
    return TaskRows.of(logged(num_rows), encoder, cfg, to_train=True)


def _without_seeds(specs):
    return [(s.entity, s.as_of_us, s.support_start, s.support_stop, s.query.tolist(), s.hide_profile) for s in specs]


@pytest.mark.parametrize("model", [{}, {"hidden_item_share": 0.5}], ids=["shown", "hidden"])
def test_a_share_of_the_numbers_is_dropped_and_the_rest_counts_as_much_more(model):
    cfg = _config(SHARE, **model)
    rows = _rows(cfg)
    specs = meta_batch(rows, cfg, seed=0, step=0)
    whole = [
        type(s)(s.entity, s.as_of_us, s.support_start, s.support_stop, s.query, hide_history=s.hide_history) for s in specs
    ]
    dropped, kept = build_batch(rows, specs), build_batch(rows, whole)
    shares = []
    for part in ("support", "query"):
        found, before = getattr(dropped, part), getattr(kept, part)
        for name in before.__dataclass_fields__:
            mine, other = getattr(found, name).clone(), getattr(before, name).clone()
            if name == "item_dense_TRF":
                mine[..., NUMBERS] = other[..., NUMBERS] = 0.0
            assert torch.equal(mine, other), name
        mine, other = found.item_dense_TRF[..., NUMBERS], before.item_dense_TRF[..., NUMBERS]
        is_kept = torch.isclose(mine, other / (1 - SHARE), rtol=1e-6)
        assert (is_kept | (mine == 0)).all()
        shares.append((mine[other != 0] == 0).float())
    # Four standard deviations of a share of so many numbers.
    every = torch.cat(shares)
    assert len(every) > 5000
    assert float(every.mean()) == pytest.approx(SHARE, abs=4 * (SHARE * (1 - SHARE) / len(every)) ** 0.5)


def test_each_row_loses_its_own_and_a_task_the_same_wherever_it_is_built():
    cfg = _config(SHARE)
    rows = _rows(cfg)
    specs = [spec for spec in meta_batch(rows, cfg, seed=0, step=0) if spec.support_size > 8 and len(spec.query) > 8]
    together = build_batch(rows, specs)
    for task in (0, len(specs) - 1):
        alone, size = build_batch(rows, [specs[task]]), specs[task].support_size
        assert torch.equal(alone.support.item_dense_TRF[0], together.support.item_dense_TRF[task, :size])
        dropped = alone.support.item_dense_TRF[0, :, NUMBERS] == 0
        assert len(dropped.unique(dim=0)) > 3
        assert not torch.equal(dropped[:8], alone.query.item_dense_TRF[0, :8, NUMBERS] == 0)
    again = meta_batch(_rows(cfg), cfg, seed=0, step=0)
    assert [spec.vector_seed for spec in again] == [spec.vector_seed for spec in meta_batch(rows, cfg, seed=0, step=0)]
    assert len({spec.vector_seed for spec in again}) == len(again)


def test_tasks_that_are_judged_or_served_lose_nothing():
    cfg, plain = _config(0.9), _config()
    batches = []
    for each in (cfg, plain):
        rows = _rows(each)
        batches.append(build_batch(rows, as_served(rows, from_us=int(rows.timestamp_us.min()), support_rows=16)))
    for part in ("support", "query"):
        mine, other = (getattr(batch, part).item_dense_TRF for batch in batches)
        assert torch.equal(mine, other)
        assert mine[..., NUMBERS].any()


def test_without_it_nothing_is_drawn_for_it_and_every_batch_is_as_it_was():
    cfg = _config()
    rows, bare = (
        _rows(cfg),
        CONFIG.model_copy(update={"features": tuple(f for f in FEATURES if f != VECTOR), "model": cfg.model}),
    )
    assert not rows.drops_vectors
    without = TaskRows.of(logged(300), Encoder.fit(logged(300), bare), bare)
    states, drawn = [], []
    for each, config in ((rows, cfg), (without, bare)):
        rng = np.random.default_rng(0)
        drawn.append(sample_tasks(each, config, rng, 50))
        states.append(rng.bit_generator.state)
    assert states[0] == states[1]
    assert _without_seeds(drawn[0]) == _without_seeds(drawn[1])
    assert {spec.vector_seed for spec in drawn[0]} == {None}
    batch = build_batch(rows, drawn[0])
    encoded = rows.encoded.item_features()
    for task, spec in enumerate(drawn[0]):
        assert batch.query.item_dense_TRF[task, : len(spec.query)].numpy().tobytes() == encoded[spec.query].tobytes()


def test_shares_are_each_vector_s_own_and_whether_it_is_known_is_never_dropped():
    features = (VECTOR.model_copy(update={"dropout": 0.5}), OTHER)
    cfg = CONFIG.model_copy(update={"features": (*(f for f in FEATURES if f != VECTOR), *features)})
    pictures = pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 6, pa.float32()), 2)
    items = vectors(ITEMS).append_column("picture", pictures)
    table = Encoder.fit(logged(), cfg, items).with_items(items).item_table
    assert table.dropout_V.tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
