"""Items as a second kind: their supports, and which of them the query rows of a meta-batch are scored with."""

from collections import Counter

import numpy as np
import pytest
import torch

from limaml.features.encoder import Encoder
from limaml.tasks.other_entities import NOBODY
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch, length_groups, meta_batch

KINDS = [{"name": "user"}, {"name": "item", "entity_column": "item_id", "support_rows": 7}]
DAY_US = 86_400_000_000


@pytest.fixture
def two_kinds(planted_logged, small_config):
    def make(**sections):
        cfg = small_config(task_kinds=KINDS, **sections)
        return cfg, TaskRows.of(planted_logged, Encoder.fit(planted_logged, cfg), cfg)

    return make


def earlier(logged, item, as_of_us, number):
    """Event ids of the item's last rows before an instant, by a plain sort."""
    rows = [row for row in logged.to_pylist() if row["item_id"] == item]
    rows = [row for row in rows if row["timestamp"].timestamp() * 1e6 < as_of_us]
    rows.sort(key=lambda row: (row["timestamp"], row["event_id"]))
    return [row["event_id"] for row in rows[-number:]]


def test_an_item_s_support_is_its_last_rows_of_all_users_before_the_instant(two_kinds, planted_logged):
    _, rows = two_kinds()
    other, rng = rows.others["item"], np.random.default_rng(0)
    # Instants of rows themselves among them: events at the instant are not before it.
    instants = np.concatenate([rng.choice(rows.timestamp_us, 30), rng.choice(rows.timestamp_us, 30) + 1])
    entities = rng.integers(len(other.entities), size=len(instants))
    first, stop = other.supports(entities, instants)
    events = planted_logged["event_id"].to_pylist()
    sizes = set()
    for entity, as_of_us, start, end in zip(entities, instants, first, stop, strict=True):
        found = [events[rows.source_row[at]] for at in other.row[start:end]]
        assert found == earlier(planted_logged, other.entities[entity], as_of_us, 7)
        sizes.add(len(found))
    assert {0, 7} < sizes
    gathered = other.gather(rows, entities, instants)
    assert gathered.mask_TR.sum(dim=1).tolist() == (stop - first).tolist()
    last = other.row[stop - 1][stop > first]
    has = torch.from_numpy(stop > first)
    ends = torch.from_numpy(stop - first - 1)[has]
    assert gathered.label_TR[has, ends].tolist() == rows.label[last].tolist()
    assert (gathered.gap_s_TR[has, ends] > 0).all()


def test_one_kind_has_no_others_and_the_same_tasks_as_before(planted_logged, small_config):
    cfg = small_config()
    encoder = Encoder.fit(planted_logged, cfg)
    rows = TaskRows.of(planted_logged, encoder, cfg)
    assert rows.others == {}
    specs = meta_batch(rows, cfg, seed=0, step=3)
    plain = meta_batch(TaskRows.from_logged(planted_logged, encoder, cfg.task_kind), cfg, seed=0, step=3)
    assert [(s.entity, s.as_of_us, s.query.tolist(), s.others) for s in specs] == [
        (s.entity, s.as_of_us, s.query.tolist(), {}) for s in plain
    ]
    assert build_batch(rows, specs).others == {}


@pytest.mark.parametrize("horizon_days", [0, 3])
def test_a_meta_batch_has_a_few_instants_and_users_who_come_after_them(two_kinds, horizon_days):
    cfg, rows = two_kinds(
        meta={"instants_per_step": 3, "horizon_days": horizon_days}, training={"tasks_per_step": 16, "num_workers": 1}
    )
    for step in range(20):
        specs = meta_batch(rows, cfg, seed=1, step=step)
        assert len(specs) == 16
        assert sorted(Counter(spec.as_of_us for spec in specs).values()) in ([5, 5, 6], [5, 11], [16], [6, 10])
        for spec in specs:
            stamps = rows.timestamp_us[spec.query]
            assert len(stamps)
            assert (stamps >= spec.as_of_us).all()
            if horizon_days:
                assert (stamps < spec.as_of_us + horizon_days * DAY_US).all()
            assert (rows.timestamp_us[spec.support_start : spec.support_stop] < spec.as_of_us).all()


def test_query_rows_have_their_items_and_none_without_earlier_rows(two_kinds):
    cfg, rows = two_kinds(meta={"zero_support_probability": 0.0, "max_other_tasks": 10_000})
    other = rows.others["item"]
    kinds = Counter()
    for step in range(20):
        for spec in meta_batch(rows, cfg, seed=1, step=step):
            entity, found = other.entity[spec.query], spec.others["item"]
            first, stop = other.supports(entity, np.full(len(entity), spec.as_of_us))
            assert (found == np.where(stop > first, entity, NOBODY)).all()
            kinds.update(found == NOBODY)
    assert min(kinds.values()) > 20


def test_items_are_bounded_and_some_are_hidden(two_kinds):
    free, rows = two_kinds(meta={"zero_support_probability": 0.0, "max_other_tasks": 10_000})
    hidden, _ = two_kinds(meta={"zero_support_probability": 0.5, "max_other_tasks": 10_000})
    bound, _ = two_kinds(meta={"zero_support_probability": 0.0, "max_other_tasks": 5})

    def pairs(cfg):
        found = [
            {
                (int(entity), spec.as_of_us)
                for spec in meta_batch(rows, cfg, seed=1, step=step)
                for entity in spec.others["item"]
            }
            for step in range(30)
        ]
        return [{pair for pair in each if pair[0] != NOBODY} for each in found]

    sizes = [len(each) for each in pairs(bound)]
    assert max(sizes) == 5
    total, left = (sum(len(each) for each in pairs(cfg)) for cfg in (free, hidden))
    # Other draws follow the hiding ones, so only the share is comparable.
    assert 0.35 < left / total < 0.65


def test_a_batch_says_which_item_task_each_query_row_is_scored_with(two_kinds):
    cfg, rows = two_kinds()
    other = rows.others["item"]
    specs = meta_batch(rows, cfg, seed=1, step=2)
    for group in length_groups(specs):
        batch = build_batch(rows, group)
        tasks = batch.others["item"]
        assert tasks.task_TQ.shape == batch.query.mask_TR.shape
        assert (tasks.task_TQ[batch.query.mask_TR == 0] == 0).all()
        seen = set()
        for task, spec in enumerate(group):
            for at, entity in enumerate(spec.others["item"].tolist()):
                number = int(tasks.task_TQ[task, at])
                assert (number == 0) == (entity == NOBODY)
                if number:
                    assert int(tasks.entity_index_U[number - 1]) == other.entity_index[entity]
                    first, stop = other.supports(np.array([entity]), np.array([spec.as_of_us]))
                    mine = rows.label[other.row[first[0] : stop[0]]]
                    assert tasks.support.label_TR[number - 1, : len(mine)].tolist() == mine.tolist()
                    seen.add((entity, spec.as_of_us))
        assert len(seen) == tasks.support.num_tasks


def test_rows_without_entities_are_scored_with_the_prior(two_kinds):
    _, rows = two_kinds()
    query = np.arange(int(rows.offsets[0]), int(rows.offsets[1]))
    specs = [TaskSpec(0, int(rows.timestamp_us[0]), 0, 0, query, others={"item": np.full(len(query), NOBODY)})]
    assert build_batch(rows, specs).others == {}
