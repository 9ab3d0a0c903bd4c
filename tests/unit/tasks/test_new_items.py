"""Training rows whose item is shown as nobody had touched it: it is what ingestion and encoder make of a new item, no guess."""

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from limaml import schema
from limaml.config import Config, FeatureConfig
from limaml.evaluation.scoring_method import MethodInput
from limaml.events import catalogue, point_in_time, snapshots
from limaml.events.day_store import EventStore, canonical
from limaml.events.synthetic import SyntheticSource
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.tasks.new_items import without_history
from limaml.tasks.other_entities import NOBODY
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch, meta_batch, sample_tasks
from tests import declared

NUMBER = {"entity": "item", "type": "number"}
OWN = {"entity": "user", "type": "number", "by": "item_id"}
FEATURES = (
    *declared.FEATURES,
    *(
        FeatureConfig.model_validate(feature)
        for feature in (
            NUMBER | {"name": "of_two_days", "aggregate": "count", "window_days": 2},
            NUMBER | {"name": "rate_of_two_days", "aggregate": "rate", "window_days": 2, "prior": 0.3, "prior_rows": 4.0},
            NUMBER | {"name": "idle_days", "aggregate": "days_since"},
            OWN | {"name": "own_events", "aggregate": "count"},
            OWN | {"name": "own_rate", "aggregate": "rate", "prior": 0.2},
            OWN | {"name": "own_idle_days", "aggregate": "days_since"},
        )
    ),
)
TABLES = schema.tables(FEATURES)
SOURCE = {
    "kind": "synthetic",
    "synthetic_users": 15,
    "synthetic_items": 8,
    "synthetic_days": 5,
    "synthetic_rows_per_user": 12,
}


def _config(**model):
    plain = {"profile_dropout": 0.0, "unknown_item_share": 0.0, "unknown_entity_share": 0.0}
    return Config.model_validate({"source": SOURCE, "features": FEATURES, "model": plain | model})


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The logged rows of all days as they happened, and the last day's as they are had an item no event before."""
    source = SyntheticSource(_config().source)
    days = source.days()
    events = {day: canonical(source.read_day(day), schema.EVENTS) for day in days}
    item = pc.mode(events[days[-1]]["item_id"].combine_chunks().dictionary_encode().indices)[0]["mode"].as_py()
    item = pc.unique(events[days[-1]]["item_id"])[item].as_py()
    early = {day: rows if day == days[-1] else rows.filter(pc.not_equal(rows["item_id"], item)) for day, rows in events.items()}
    joined = []
    for number, delivered in enumerate((events, early)):
        storage = Storage(str(tmp_path_factory.mktemp(f"world{number}")))
        before = days[0] - timedelta(days=1)
        for kind, table in zip(catalogue.kinds(TABLES).values(), source.catalogue(), strict=True):
            catalogue.record(storage, kind, catalogue.declared(kind, TABLES, table)[0], before)
        for day, rows in delivered.items():
            EventStore(storage).place(day, rows, 1)
        span = snapshots.advance(storage, TABLES, before, days[-1])
        known = {name: span.rows(subject) for name, subject in snapshots.subjects(TABLES).items()}
        joined.append(point_in_time.join(pa.concat_tables(delivered.values()), TABLES, known))
    first_us = int(schema.day_start(days[-1]).timestamp() * 1e6)
    last = pc.greater_equal(joined[1]["timestamp"].cast(pa.int64()), first_us)
    return joined[0], joined[1].filter(pc.and_(pc.equal(joined[1]["item_id"], item), last))


def test_it_is_what_ingestion_and_encoder_make_of_an_item_without_events(logged):
    everything, new = logged
    touched = everything.filter(pc.is_in(everything["event_id"], value_set=new["event_id"].combine_chunks()))
    touched, new = touched.sort_by("event_id"), new.sort_by("event_id")
    assert touched.num_rows > 1
    assert min(touched["item_events"].to_pylist()) > 0, "it has a history to hide"
    hidden = without_history(touched, TABLES)
    items = (*TABLES.names("item"), *(column.name for column in TABLES.affinities[0].joined))
    assert hidden.select(items).equals(new.select(items))
    assert set(new["item_events"].to_pylist()) == {0}, "a count of nothing, no null"
    assert hidden.drop_columns(items).equals(touched.drop_columns(items))
    # Users of the other world lack their events with the item, so of a user only what is by item is compared.
    encoder = Encoder.fit(everything, _config())
    ours, theirs, shown = (encoder.encode_table(table) for table in (hidden, new, touched))
    assert np.array_equal(ours.item_features(), theirs.item_features())
    assert np.array_equal(ours.context, theirs.context)
    static = encoder.dims.item_static
    assert np.array_equal(ours.item_features()[:, :static], shown.item_features()[:, :static])
    for where in (ours.item_features()[:, static:] != shown.item_features()[:, static:], ours.context != shown.context):
        assert where.any()


def test_an_item_that_no_snapshot_knows_stays_null(logged):
    everything = logged[0]
    names = TABLES.names("item")
    for name in names:
        at = everything.column_names.index(name)
        nulls = pa.nulls(everything.num_rows, everything.schema.field(name).type)
        everything = everything.set_column(at, everything.schema.field(name), nulls)
    assert without_history(everything, TABLES).select(names).equals(everything.select(names))


def test_an_entry_for_a_category_stays():
    tables = schema.tables(
        tuple(
            FeatureConfig.model_validate(feature)
            for feature in (
                {"entity": "item", "name": "kind", "type": "category"},
                OWN | {"name": "kind_events", "aggregate": "count", "by": "kind"},
                OWN | {"name": "own_events", "aggregate": "count"},
            )
        )
    )
    row = dict.fromkeys(tables.logged_events.names) | {"kind": "film", "by_kind_events": 3, "by_item_id_events": 2, "label": 1}
    table = pa.Table.from_pylist([row], pa.schema([(field.name, field.type) for field in tables.logged_events.arrow]))
    (found,) = without_history(table, tables).to_pylist()
    assert found == row | {"by_item_id_events": None}


def test_rows_drawn_for_it_have_exactly_these_numbers_and_all_others_their_own(logged):
    cfg = _config(hidden_item_share=0.3)
    rows = TaskRows.of(logged[0], Encoder.fit(logged[0], cfg), cfg, to_train=True)
    spec = next(spec for spec in meta_batch(rows, cfg, seed=0, step=0) if len(spec.hide_history) > 2 and spec.support_size > 2)
    shown = TaskSpec(spec.entity, spec.as_of_us, spec.support_start, spec.support_stop, spec.query)
    wider = TaskSpec(spec.entity, spec.as_of_us, rows.offsets[spec.entity], rows.offsets[spec.entity + 1], spec.query)
    batches = [build_batch(rows, [one, wider]) for one in (spec, shown)]
    for part, at in (("support", np.arange(spec.support_start, spec.support_stop)), ("query", spec.query)):
        ours, theirs = (getattr(batch, part) for batch in batches)
        hidden = np.isin(at, spec.hide_history)
        new = rows.as_new.take(at)
        for row in range(ours.mask_TR.shape[1]):
            if row < len(at) and hidden[row]:
                assert ours.item_index_TR[0, row] == 0
                assert ours.item_dense_TRF[0, row].tolist() == new.item_features()[row].tolist()
                assert ours.context_TRF[0, row].tolist() == new.context[row].tolist()
            else:
                for name in ("item_index_TR", "item_dense_TRF", "context_TRF"):
                    assert torch.equal(getattr(ours, name)[:, row], getattr(theirs, name)[:, row])
        for name in ("user_dense_TRF", "label_TR", "gap_s_TR", "mask_TR"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_the_share_is_that_of_support_and_query_rows_and_without_one_the_draw_is_as_it_was(logged):
    drawn = {}
    for share in (0.0, 0.3):
        cfg = _config(hidden_item_share=share, unknown_item_share=0.1)
        rows = TaskRows.of(logged[0], Encoder.fit(logged[0], cfg), cfg, to_train=True)
        assert (rows.as_new is None) == (share == 0.0)
        drawn[share] = sample_tasks(rows, cfg, np.random.default_rng(0), 500)
    used = sum(spec.support_size + len(spec.query) for spec in drawn[0.3])
    # Four standard deviations of a share of some 5,000 rows.
    assert sum(len(spec.hide_history) for spec in drawn[0.3]) / used == pytest.approx(0.3, abs=0.026)
    assert not any(len(spec.hide_history) for spec in drawn[0.0])
    # The first task is drawn before anything is hidden: the same but for that.
    first, other = drawn[0.0][0], drawn[0.3][0]
    assert (first.as_of_us, first.query.tolist(), first.hide_items.tolist()) == (
        other.as_of_us,
        other.query.tolist(),
        other.hide_items.tolist(),
    )


def test_rows_that_are_judged_are_encoded_once(logged, monkeypatch):
    cfg, encoded = _config(hidden_item_share=0.3), []
    encoder, once = Encoder.fit(logged[0], cfg), Encoder.encode_ordered
    monkeypatch.setattr(Encoder, "encode_ordered", lambda self, *given: encoded.append(1) or once(self, *given))
    judged = MethodInput.from_logged(logged[0], encoder, cfg).rows
    assert (len(encoded), judged.as_new) == (1, None)
    training = MethodInput.from_logged(logged[0], encoder, cfg, to_train=True).rows
    assert len(encoded) == 3
    assert len(training.as_new) == len(judged.label)


def test_a_hidden_row_is_scored_with_the_prior_of_its_item_s_kind(logged):
    kinds = [{"name": "user"}, {"name": "item", "entity_column": "item_id"}]
    cfg = Config.model_validate(_config(hidden_item_share=0.5).model_dump() | {"task_kinds": kinds})
    rows = TaskRows.of(logged[0], Encoder.fit(logged[0], cfg), cfg, to_train=True)
    specs = meta_batch(rows, cfg, seed=0, step=0)
    adapted = 0
    for spec in specs:
        hidden = np.isin(spec.query, spec.hide_history)
        assert (spec.others["item"][hidden] == NOBODY).all()
        adapted += (spec.others["item"][~hidden] != NOBODY).sum()
    assert adapted > 0
