"""Tasks: what is support and what is query, and that the draw is a function of the seed and the step alone."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml import schema
from limaml.config import Config
from limaml.errors import DataError
from limaml.features.encoder import Encoder
from limaml.tasks.sampling import (
    TaskRows,
    TaskSpec,
    build_batch,
    length_groups,
    meta_batch,
    microseconds,
    sample_tasks,
    support_spec,
)
from tests import declared

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY_S = 86_400


def _config(**sections):
    plain = {"model": {"profile_dropout": 0.0, "unknown_item_share": 0.0, "unknown_entity_share": 0.0}}
    return Config.model_validate({"features": declared.FEATURES, "source": {"kind": "synthetic"}} | plain | sections)


def _table(events):
    """events: (user, seconds after START, label) in any order; event ids run backwards, items name their second."""
    rows = []
    for number, (user, second, label) in enumerate(events):
        row = dict.fromkeys(declared.LOGGED_EVENTS.names) | {"age_band": "25_34", "user_events": 1, "user_positive_rate": 0.5}
        row |= {"event_id": f"e{500 - number}", "user_id": user, "item_id": f"i{second}", "label": label}
        rows.append(row | {"timestamp": START + timedelta(seconds=second)})
    return pa.Table.from_pylist(rows, schema=declared.LOGGED_EVENTS.arrow)


def _rows(events, cfg=None):
    cfg = cfg or _config()
    table = _table(events)
    return TaskRows.from_logged(table, Encoder.fit(table, cfg), cfg.task_kind)


def _seconds(rows, numbers):
    return ((rows.timestamp_us[numbers] - microseconds(START)) // 1_000_000).tolist()


EVENTS = [("b", 30, 1), ("a", 20, 0), ("b", 10, 1), ("b", 30, 0), ("a", 5, 1), ("b", 2 * DAY_S, 0)]


def test_rows_are_sorted_by_entity_time_and_event_id():
    rows = _rows(EVENTS)
    assert rows.entities == ("a", "b")
    assert rows.offsets.tolist() == [0, 2, 6]
    # The later of the two rows at second 30 has the smaller event id.
    assert rows.source_row.tolist() == [4, 1, 2, 3, 0, 5]
    assert rows.label.tolist() == [1, 0, 1, 0, 1, 0]
    assert (rows.position("b"), rows.position("zz"), rows.position("")) == (1, None, None)


def test_support_is_the_last_n_events_before_the_instant():
    rows = _rows(EVENTS)
    assert _seconds(rows, slice(*_span(support_spec(rows, 1, START + timedelta(seconds=31), 2)))) == [30, 30]
    # Strictly before: both rows of second 30 stay out.
    assert _seconds(rows, slice(*_span(support_spec(rows, 1, START + timedelta(seconds=30), 2)))) == [10]
    assert support_spec(rows, 1, START, 2).support_size == 0
    assert support_spec(rows, 1, schema.day_end(START.date()), 64).support_size == 3


def _span(spec):
    return spec.support_start, spec.support_stop


def test_an_instant_without_a_time_zone_is_refused():
    with pytest.raises(DataError, match="must carry a time zone"):
        support_spec(_rows(EVENTS), 0, datetime(2026, 1, 1), 1)


def _many(num_users=6, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (f"u{user}", int(second), int(rng.integers(2)))
        for user in range(num_users)
        for second in rng.integers(0, 40, 30) * 7_000
    ]


def test_no_instant_is_split_and_support_precedes_query():
    rows = _rows(_many())
    cfg = _config(meta={"support_rows": 8, "query_rows": 5})
    for spec in sample_tasks(rows, cfg, np.random.default_rng(0), 500):
        start, stop = rows.offsets[spec.entity], rows.offsets[spec.entity + 1]
        before = np.flatnonzero(rows.timestamp_us[start:stop] < spec.as_of_us) + start
        assert np.arange(spec.support_start, spec.support_stop).tolist() == before[-8:].tolist()
        assert 1 <= len(spec.query) <= 5
        assert len(set(spec.query)) == len(spec.query)
        assert (rows.timestamp_us[spec.query] >= spec.as_of_us).all()
        assert ((spec.query >= start) & (spec.query < stop)).all()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 40).map(lambda n: n * 21_600), st.just(1)), min_size=1, max_size=30
    ),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_a_horizon_bounds_the_query_and_leaves_it_at_least_one_row(events, horizon_days, seed):
    """Rows lie at midnight, 6, 12 and 18 o'clock, so that many lie on the horizon itself, which is outside."""
    rows = _rows(events)
    cfg = _config(meta={"horizon_days": horizon_days, "query_rows": 100, "day_boundary_probability": 0.5})
    for spec in sample_tasks(rows, cfg, np.random.default_rng(seed), 20):
        stamps = rows.timestamp_us[rows.offsets[spec.entity] : rows.offsets[spec.entity + 1]]
        within = (stamps >= spec.as_of_us) & (stamps < spec.as_of_us + horizon_days * DAY_S * 1_000_000)
        assert spec.query.tolist() == (np.flatnonzero(within) + rows.offsets[spec.entity]).tolist()
        assert len(spec.query)


def test_a_horizon_behind_the_last_row_draws_what_none_draws():
    """The instants, supports and hidden rows too: the same random numbers are drawn in the same order."""
    rows = _rows(_many())
    hiding = {"profile_dropout": 0.5, "unknown_item_share": 0.2, "unknown_entity_share": 0.1}

    def drawn(horizon_days):
        cfg = _config(model=hiding, meta={"horizon_days": horizon_days, "query_rows": 4})
        specs = sample_tasks(rows, cfg, np.random.default_rng(5), 300)
        return [
            (s.entity, s.as_of_us, s.support_start, s.support_stop, s.query.tolist(), s.hide_profile, s.hide_items.tolist())
            for s in specs
        ]

    assert drawn(0) == drawn(1000)
    assert drawn(0) != drawn(1)


def test_shares_of_day_boundaries_and_of_empty_supports():
    rows = _rows(_many())
    day_us = DAY_S * 1_000_000
    for boundary, zero in ((1.0, 0.0), (0.0, 1.0), (0.25, 0.25)):
        cfg = _config(meta={"day_boundary_probability": boundary, "zero_support_probability": zero})
        specs = sample_tasks(rows, cfg, np.random.default_rng(1), 2000)
        # An event may lie on midnight by chance, 1 second in 86,400 of a day; none here does but at second 0.
        at_boundary = np.mean([spec.as_of_us % day_us == 0 and spec.support_size > 0 for spec in specs])
        empty = np.mean([spec.support_size == 0 for spec in specs])
        # Four standard deviations of a share of 2,000 draws.
        assert at_boundary == pytest.approx(boundary, abs=4 * (0.25 / 2000) ** 0.5)
        assert empty == pytest.approx(zero, abs=4 * (0.25 / 2000) ** 0.5)


def test_early_instants_are_drawn_among_the_first_rows():
    rows = _rows([("a", 60 * second, 1) for second in range(40)])
    for share, largest in ((1.0, 5), (0.0, 39)):
        meta = {"day_boundary_probability": 0.0, "zero_support_probability": 0.0, "early_probability": share, "early_rows": 5}
        specs = sample_tasks(rows, _config(meta=meta), np.random.default_rng(0), 1000)
        assert {spec.support_size for spec in specs} == set(range(1, largest + 1))


def test_an_entity_with_one_instant_gets_an_empty_support():
    rows = _rows([("a", 5, 1), ("a", 5, 0)])
    for shares in ((1.0, 0.0), (0.0, 0.0)):
        cfg = _config(meta=dict(zip(("day_boundary_probability", "zero_support_probability"), shares, strict=True)))
        (spec,) = sample_tasks(rows, cfg, np.random.default_rng(0), 1)
        assert (spec.support_size, len(spec.query)) == (0, 2)


def test_the_draw_is_a_function_of_seed_and_step():
    rows, cfg = _rows(_many()), _config(model={}, training={"tasks_per_step": 16})

    def drawn(seed, step):
        return [
            (s.entity, s.as_of_us, tuple(s.query), s.hide_profile, s.hide_entity, tuple(s.hide_items))
            for s in meta_batch(rows, cfg, seed=seed, step=step)
        ]

    assert len(drawn(0, 0)) == 16
    assert drawn(3, 7) == drawn(3, 7)
    assert drawn(3, 7) != drawn(3, 8)
    assert drawn(3, 7) != drawn(4, 7)


def test_a_batch_holds_the_rows_their_gaps_and_a_mask():
    rows = _rows(EVENTS)
    as_of = START + timedelta(seconds=40)
    specs = [support_spec(rows, 1, as_of, 64), support_spec(rows, 0, START, 64)]
    batch = build_batch(rows, [TaskSpec(s.entity, s.as_of_us, *_span(s), query=np.array([5])) for s in specs[:1]] + specs[1:])
    support = batch.support
    assert batch.entities == ("b", "a")
    assert batch.entity_index_T.tolist() == [2, 1]
    assert support.mask_TR.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert support.gap_s_TR.tolist() == [[30, 10, 10], [0, 0, 0]]
    assert support.label_TR.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert support.item_index_TR.tolist()[1] == [0, 0, 0]
    assert batch.query.mask_TR.tolist() == [[1], [0]]
    assert torch.equal(support.user_dense_TRF[0, 0], torch.from_numpy(rows.encoded.user_dense[2]))
    assert not support.user_dense_TRF[1].any()


def test_a_tasks_tensors_do_not_depend_on_the_others_in_its_batch():
    rows, cfg = _rows(_many()), _config(model={})
    specs = meta_batch(rows, cfg, seed=0, step=0)
    together, alone = build_batch(rows, specs), build_batch(rows, specs[9:10])
    for name in ("item_index_TR", "item_dense_TRF", "user_dense_TRF", "gap_s_TR", "label_TR"):
        for part in ("support", "query"):
            own = getattr(getattr(alone, part), name)[0]
            assert torch.equal(getattr(getattr(together, part), name)[9, : len(own)], own), (part, name)


def _of_lengths(*pairs):
    return [TaskSpec(0, 0, 0, support, query=np.arange(query)) for support, query in pairs]


def test_tasks_of_like_length_share_a_group_and_every_task_is_in_one():
    specs = _of_lengths(*[(n % 200 + 1, n % 7) for n in range(0, 997, 3)])
    groups = length_groups(specs)
    assert sorted(map(id, (spec for group in groups for spec in group))) == sorted(map(id, specs))
    sizes = [[spec.support_size for spec in group] for group in groups]
    assert len(groups) > 2
    assert all(max(shorter) <= min(longer) for shorter, longer in pairwise(sizes))
    padded = sum(len(group) * max(group) for group in sizes)
    # Two lengths of padding to 200 are the whole of 333 tasks; in groups less than a third of it is left.
    assert padded - sum(map(sum, sizes)) < (333 * 200 - sum(map(sum, sizes))) / 3


def test_the_groups_are_the_cheapest_of_all_divisions(monkeypatch):
    monkeypatch.setattr("limaml.tasks.sampling._PASS_ROWS", 12)
    specs = _of_lengths((1, 3), (2, 1), (9, 2), (9, 9), (0, 1), (30, 4), (12, 0))

    def cost(groups):
        return sum(len(g) * (max(s.support_size for s in g) + max(len(s.query) for s in g)) + 12 for g in groups)

    ordered = sorted(specs, key=lambda s: (s.support_size, len(s.query)))
    divisions = []
    for cuts in range(2 ** (len(ordered) - 1)):
        edges = [0, *(n + 1 for n in range(len(ordered) - 1) if cuts >> n & 1), len(ordered)]
        divisions.append([ordered[a:b] for a, b in pairwise(edges)])
    assert cost(length_groups(specs)) == min(map(cost, divisions))
    assert 1 < len(length_groups(specs)) < len(specs)
    assert length_groups([]) == []


def test_hidden_profiles_items_and_entities():
    rows = _rows(_many())
    shown = sample_tasks(rows, _config(), np.random.default_rng(0), 1)[0]
    batch = build_batch(rows, [shown])
    assert batch.query.user_dense_TRF.any()
    hidden = TaskSpec(shown.entity, shown.as_of_us, *_span(shown), shown.query, True, True, shown.query[:1])
    other = build_batch(rows, [hidden])
    assert other.entity_index_T.tolist() == [0]
    assert not other.query.user_dense_TRF.any()
    assert not other.support.user_dense_TRF.any()
    assert other.query.item_index_TR[0, 0] == 0
    assert torch.equal(other.query.item_index_TR[0, 1:], batch.query.item_index_TR[0, 1:])
    assert torch.equal(other.query.item_dense_TRF, batch.query.item_dense_TRF)


def test_hiding_follows_the_configured_shares():
    rows = _rows(_many())
    cfg = _config(model={"profile_dropout": 0.5, "unknown_entity_share": 0.1, "unknown_item_share": 0.2})
    specs = sample_tasks(rows, cfg, np.random.default_rng(2), 2000)
    used = sum(spec.support_size + len(spec.query) for spec in specs)
    # Four standard deviations of a share of 2,000 tasks; rows are more.
    assert np.mean([spec.hide_profile for spec in specs]) == pytest.approx(0.5, abs=0.045)
    assert np.mean([spec.hide_entity for spec in specs]) == pytest.approx(0.1, abs=0.027)
    assert sum(len(spec.hide_items) for spec in specs) / used == pytest.approx(0.2, abs=0.036)


def test_a_task_kind_on_items():
    cfg = _config(task_kinds=[{"name": "item", "entity_column": "item_id"}])
    rows = _rows(EVENTS, cfg)
    assert rows.entities == ("i10", "i172800", "i20", "i30", "i5")
    assert np.diff(rows.offsets).tolist() == [1, 1, 1, 2, 1]


def test_no_rows_give_no_tasks():
    rows = _rows([])
    assert rows.num_entities == 0
    with pytest.raises(DataError, match="at least one entity"):
        sample_tasks(rows, _config(), np.random.default_rng(0), 1)
