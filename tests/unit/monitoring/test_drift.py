"""Drift against the training window: bins that are fixed once, and a champion's days measured from stored rows."""

import json
from collections import defaultdict
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from limaml import telemetry
from limaml.errors import DataError, NothingToDo
from limaml.events.day_store import DayManifest, EventStore
from limaml.events.logged import read_logged, write_logged
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.models.network import build_network
from limaml.monitoring import drift
from limaml.monitoring.export import Gauges
from limaml.monitoring.histograms import MAX_CATEGORIES, Histogram
from limaml.registry import Registry
from tests import declared


def column(values, kind=None):
    return pa.chunked_array([pa.array(values, kind)])


def by_hand(expected, actual):
    """The index as a loop over bins that are not empty on both sides; an empty one counts half a row."""
    pairs = [(max(e, 0.5), max(a, 0.5)) for e, a in zip(expected, actual, strict=True) if e or a]
    e_sum, a_sum = (sum(side) for side in zip(*pairs, strict=True))
    return sum((a / a_sum - e / e_sum) * np.log((a / a_sum) / (e / e_sum)) for e, a in pairs)


def test_numbers_are_cut_at_the_window_s_deciles_and_ends_with_a_bin_for_nulls():
    window = Histogram.fit(column([float(value) for value in range(100)] + [None] * 4))
    assert window.counts == (0.0, *[10.0] * 10, 0.0, 4.0)
    day = column([-1.0] + [0.0] * 30 + [99.0] * 10 + [None] * 2 + [1e9] * 3)
    assert window.recount(day).counts == (1.0, 30.0, *[0.0] * 8, 10.0, 3.0, 2.0)
    assert window.drift(day) == pytest.approx(by_hand([0, *[10] * 10, 0, 4], [1, 30, *[0] * 8, 10, 3, 2]))


def test_the_window_itself_has_not_drifted():
    for values in (column([1, 2, 3, 4] * 50), column(["a", "b", None] * 50), column([["x"], ["x", "y"], []] * 50)):
        assert Histogram.fit(values).drift(values) == 0.0


def test_categories_and_lists_have_bins_for_what_the_window_did_not_know():
    window = Histogram.fit(column(["a"] * 6 + ["b"] * 3 + [None]))
    assert window.recount(column(["b", "c", "d", None, None])).counts == (0.0, 1.0, 2.0, 2.0)
    genres = Histogram.fit(column([["Drama", "War"], ["Drama"], []], pa.list_(pa.string())))
    assert genres.counts == (2.0, 1.0, 0.0, 0.0)
    rare = Histogram.fit(column([f"v{number}" for number in range(500)]))
    assert len(rare.categories) == MAX_CATEGORIES
    assert rare.counts[-2] == 500 - MAX_CATEGORIES


def test_a_constant_number_and_a_column_of_nulls_have_bins_too():
    constant = Histogram.fit(column([5.0] * 100))
    assert constant.drift(column([5.0] * 10)) == 0.0
    assert constant.drift(column([4.0] * 10)) > 1.0
    assert constant.drift(column([6.0] * 10)) > 1.0
    nulls = Histogram.fit(column([None] * 10, pa.float64()))
    assert nulls.drift(column([1.0] * 10)) > 1.0
    assert np.isnan(nulls.drift(column([], pa.float64())))


def test_a_histogram_survives_json():
    for fitted in (Histogram.fit(column([1.0, 2.0, None])), Histogram.fit(column(["a", None]))):
        assert Histogram.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


class World:
    """Planted rows as stored days; a champion whose lineage is the first 30 of 40."""

    def __init__(self, folder, cfg, logged):
        self.cfg, self.storage = cfg, Storage(cfg.storage.root)
        days = defaultdict(list)
        for at, stamp in enumerate(logged["timestamp"].to_pylist()):
            days[stamp.date()].append(at)
        self.days = sorted(days)
        for day in self.days:
            self.put(day, logged.take(days[day]))
        window = [day for day in self.days if day < self.days[0] + timedelta(days=30)]
        self.next_day = self.days[len(window)]
        model = self._model(logged)
        lineage = {"days": {day.isoformat(): 1 for day in window}}
        bundle.save(bundle.Bundle(config=cfg, refit=model, twin=model, lineage=lineage), folder / "bundle")
        self.registry = Registry(cfg.registry)
        self.version = self.registry.register(folder / "bundle", self.registry.start_run("drift"), {})

    def _model(self, logged):
        encoder = Encoder.fit(logged, self.cfg)
        network = build_network(self.cfg, encoder.dims, seed=3)
        return bundle.Model(network, encoder)

    def put(self, day, rows, revision=1):
        write_logged(self.storage, day, rows, revision)
        EventStore(self.storage).commit(DayManifest(day, "passed", revision, rows.num_rows))

    def measure(self, day):
        gauges = Gauges()
        return drift.measure_day(self.cfg, day, gauges), gauges.values


@pytest.fixture
def world(tmp_path, small_config, make_planted):
    cfg = small_config(
        storage={"root": str(tmp_path / "data")},
        registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "artifact_root": str(tmp_path / "artifacts")},
        monitoring={"min_drift_rows": 20},
    )
    world = World(tmp_path, cfg, make_planted())
    world.registry.set_champion(world.version)
    return world


def test_every_feature_and_the_scores_are_measured_and_kept(world):
    result, gauges = world.measure(world.next_day)
    assert result["measured"] is True
    assert {feature for (feature,) in gauges[telemetry.FEATURE_DRIFT_PSI]} == {
        *declared.USER_FEATURE_NAMES,
        *declared.ITEM_FEATURE_NAMES,
        "hour",
    }
    # The planted item's year is the same everywhere; users' counts grow with time.
    assert gauges[telemetry.FEATURE_DRIFT_PSI][("year",)] == 0.0
    assert gauges[telemetry.SCORE_DRIFT_PSI][()] == result["score_psi"] >= 0.0
    assert world.storage.read_json(f"drift/dt={world.next_day}/drift.json")["rows"] == result["rows"]
    assert world.storage.exists(f"drift/version={world.version}/reference.json")
    assert world.measure(world.next_day) == (result, gauges)


def test_a_shift_of_one_feature_shows_in_it_and_nowhere_else(world):
    _, before = world.measure(world.next_day)
    rows = read_logged(world.storage, declared.TABLES, first=world.next_day, through=world.next_day)
    at = rows.schema.get_field_index("year")
    world.put(world.next_day, rows.set_column(at, rows.schema.field(at), pa.array([2020.0] * rows.num_rows)), revision=2)
    _, after = world.measure(world.next_day)
    changed = {
        feature
        for (feature,), value in after[telemetry.FEATURE_DRIFT_PSI].items()
        if value != before[telemetry.FEATURE_DRIFT_PSI][(feature,)]
    }
    assert changed == {"year"}
    assert after[telemetry.FEATURE_DRIFT_PSI][("year",)] > 1.0


def test_a_small_day_is_not_measured_and_has_no_gauge(world):
    rows = read_logged(world.storage, declared.TABLES, first=world.next_day, through=world.next_day).slice(0, 19)
    world.put(world.next_day, rows, revision=2)
    result, gauges = world.measure(world.next_day)
    assert (result["measured"], result["rows"], gauges) == (False, 19, {})
    assert "monitoring.min_drift_rows = 20" in result["reason"]


def test_a_day_of_exactly_the_rows_asked_for_is_measured_and_one_in_quarantine_is_not(world):
    rows = drift.read_logged(world.storage, declared.TABLES, first=world.next_day, through=world.next_day)
    twenty = pa.concat_tables([rows] * 20).slice(0, 20)
    world.put(world.next_day, twenty, revision=2)
    result, _ = world.measure(world.next_day)
    assert (result["measured"], result["rows"]) == (True, 20)
    EventStore(world.storage).commit(DayManifest(world.next_day, "quarantined", 1, 20))
    with pytest.raises(DataError, match="must have passed its gate before its drift is measured"):
        world.measure(world.next_day)


def test_scores_of_the_window_are_of_its_last_days_that_hold_enough_rows(world, monkeypatch):
    days, manifests = world.days[:10], EventStore(world.storage).manifests()
    monkeypatch.setattr(drift, "MAX_SCORED_DAYS", 3)
    for enough, first in ((1, -1), (2, -2), (3, -3), (4, -3)):  # the last `enough` days hold as many as are wanted
        monkeypatch.setattr(drift, "MAX_SCORED_ROWS", sum(manifests[day].rows for day in days[-enough:]))
        assert drift._scored_from(world.storage, days) == days[first]


def test_more_rows_than_are_needed_are_read_of_some_users_whole(world, monkeypatch):
    every = drift._sampled(world.storage, declared.TABLES, first=world.days[0], through=world.days[-1], limit=10**6)
    some = drift._sampled(
        world.storage, declared.TABLES, first=world.days[0], through=world.days[-1], limit=every.num_rows // 4
    )
    half = drift._sampled(world.storage, declared.TABLES, first=world.days[0], through=world.days[-1], limit=every.num_rows - 1)
    assert 0 < half.num_rows < every.num_rows, "one row too many is too many already"
    users = set(some["user_id"].to_pylist())
    assert 0 < some.num_rows < every.num_rows / 2
    assert some.equals(every.filter(pc.is_in(every["user_id"], pa.array(sorted(users)))))
    monkeypatch.setattr(drift, "MAX_SCORED_ROWS", 200)
    assert world.measure(world.next_day)[0]["measured"] is True


def test_scores_are_those_of_the_evaluation_as_served(world):
    from limaml.evaluation.daily_replay import score_as_served

    loaded = bundle.load(world.registry.download(world.version, world.cfg.storage.root), parts=("refit",))
    day = world.next_day
    rows = read_logged(world.storage, declared.TABLES, first=day, through=day)
    history = read_logged(world.storage, declared.TABLES, through=day - timedelta(days=1))
    expected = score_as_served(loaded.network, loaded.encoder, rows, history, day=day, cfg=world.cfg)
    found = drift._scores(world.storage, loaded, day, day).to_numpy()
    assert sorted(found) == pytest.approx(sorted(expected), abs=1e-6)


def test_without_a_champion_or_a_day_it_says_so(world, tmp_path, small_config):
    other = small_config(
        storage={"root": str(tmp_path / "data")},
        registry={"tracking_uri": f"sqlite:///{tmp_path}/other.db", "artifact_root": str(tmp_path / "other")},
    )
    with pytest.raises(NothingToDo, match="no champion"):
        drift.measure_day(other, world.next_day, Gauges())
    with pytest.raises(DataError, match="ingest it"):
        drift.measure_day(world.cfg, world.days[-1] + timedelta(days=1), Gauges())


def test_the_hour_is_the_timestamp_s(world):
    loaded = bundle.load(world.registry.download(world.version, world.cfg.storage.root), parts=("refit",))
    rows = read_logged(world.storage, declared.TABLES, first=world.next_day, through=world.next_day)
    found = loaded.encoder.values(rows)["hour"]
    assert sorted(found.to_pylist()) == sorted(stamp.hour for stamp in rows["timestamp"].to_pylist())
