"""Logged requests against the offline join, on a real feature store: agreement, and every way of not agreeing.

A world is filled and cut over, then two days are published. Requests are logged before, between and after the publications, as
a server would, with what the online store really held.
"""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from limaml import registry, schema, telemetry
from limaml.config import Config
from limaml.embeddings import cutover, daily, fill
from limaml.errors import GateError, NothingToDo
from limaml.events.ingest import ingest_day, ingest_history
from limaml.events.logged import read_logged
from limaml.events.sources import week_shift
from limaml.events.synthetic import SyntheticSource
from limaml.features.encoder import Encoder
from limaml.features.feature_store import apply, open_store
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.models.network import build_network
from limaml.monitoring.consistency import compare_day
from limaml.monitoring.export import Gauges
from limaml.monitoring.published import record_publication
from limaml.registry import Registry
from serving.request_log import LoggedEmbedding, LoggedRequest, RequestLog
from tests import declared

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 3, 2)
RUN = "consistency"
ASKED = date(2026, 3, 1)
VIEWS = ["item_features", "meta_embedding_user", "user_features"]


def make_config(folder):
    return Config.model_validate(
        {
            "features": declared.FEATURES,
            "source": {
                "kind": "synthetic",
                "synthetic_users": 40,
                "synthetic_items": 20,
                "synthetic_days": 10,
                "synthetic_rows_per_user": 20,
            },
            "storage": {"root": str(folder / "data")},
            "model": {"embedding_dim": 4, "global_hidden": [8]},
            "meta": {"support_rows": 16},
            "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_root": str(folder / "artifacts")},
            "feast": {
                "repo_path": str(ROOT / "feature_repo"),
                "registry": str(folder / "registry.db"),
                "online_connection": str(folder / "online.db"),
            },
            "embeddings": {"lease_url": f"sqlite:///{folder}/lease.db"},
            "serving": {"log_share": 1.0, "log_path": str(folder / "requests")},
        }
    )


class World:
    """`before`, `between` and `after` are requests of some users and all items, logged at those states of publication."""

    def __init__(self, folder):
        self.cfg = cfg = make_config(folder)
        days = [day + week_shift(SyntheticSource(cfg.source).days()[-1], TODAY) for day in SyntheticSource(cfg.source).days()]
        filled, first, second = days[5:8]
        apply(cfg)
        ingest_history(cfg, filled, TODAY)
        logged = read_logged(Storage(cfg.storage.root), declared.TABLES, through=filled)
        encoder = Encoder.fit(logged, cfg)
        self.model = bundle.Model(build_network(cfg, encoder.dims, seed=7), encoder)
        self.registry = Registry(cfg.registry)
        self.version = self._promote(folder, filled)
        self.store = open_store(cfg)
        self.items = [f"i{number}" for number in range(20)] + ["never"]
        self.users = [*sorted({*logged["user_id"].to_pylist()})[:15], "nobody"]
        self.before = self.ask()
        for day in (first, second):
            ingest_day(cfg, day, TODAY)
            daily.adapt_day(cfg, day)
            daily.publish_day(cfg, day, RUN)
            if day == first:
                self.between = self.ask()
        self.after = self.ask()
        self.second = second

    def _promote(self, folder, day):
        bundle.save(bundle.Bundle(config=self.cfg, refit=self.model, twin=self.model), folder / "bundle")
        version = self.registry.register(folder / "bundle", self.registry.start_run(RUN), {})
        for shard in fill.plan_fill(self.cfg, version, day, RUN)["shards"]:
            fill.fill_shard(self.cfg, version, shard, RUN)
        cutover.cut_over(self.cfg, version, RUN)
        return version

    def ask(self):
        """One request a user, all items as candidates, with the rows and timestamps that the store holds now."""
        champion = self.registry.champion()
        through = datetime.fromisoformat(champion.tags[registry.COMPLETE_THROUGH])
        slot = champion.tags[registry.SLOT]
        items, items_at = self._fetch("item_id", self.items, declared.ITEM_FEATURES.name, declared.ITEM_FEATURE_NAMES)
        return [self._request(user, slot, through, items, items_at) for user in self.users]

    def _request(self, user, slot, through, items, items_at):
        values, [user_at] = self._fetch("user_id", [user], declared.USER_FEATURES.name, declared.USER_FEATURE_NAMES)
        view = schema.embedding_view("user", slot)
        row, [as_of] = self._fetch("user_id", [user], view, ("embedding", "model_version"))
        embedding = LoggedEmbedding("user", "fresh", row["model_version"][0], as_of, row["embedding"][0])
        return LoggedRequest(
            at=datetime(2026, 3, 1, 12, tzinfo=UTC),
            user_id=user,
            model_version=self.version,
            slot=slot,
            complete_through=through,
            context={"hour": 12},
            user={name: column[0] for name, column in values.items()},
            user_at=user_at,
            item_ids=self.items,
            items=items,
            items_at=items_at,
            embeddings=[embedding if as_of else LoggedEmbedding("user", "missing")],
            scores=[0.5] * len(self.items),
        )

    def _fetch(self, key, entities, view, names):
        response = self.store.get_online_features(
            features=[f"{view}:{name}" for name in names], entity_rows=[{key: one} for one in entities], full_feature_names=True
        ).to_dict(include_event_timestamps=True)
        seconds = response[f"{view}__{names[0]}__ts"]
        stamps = [datetime.fromtimestamp(second, UTC) if second else None for second in seconds]
        return {name: response[f"{view}__{name}"] for name in names}, stamps

    def compare(self, folder, requests, **monitoring):
        """Log these requests into an empty log and compare; returns gauges and result, the error in its place."""
        cfg = self.cfg.model_copy(
            update={
                "serving": self.cfg.serving.model_copy(update={"log_path": str(folder)}),
                "monitoring": self.cfg.monitoring.model_copy(update=monitoring),
            }
        )
        log = RequestLog(cfg)
        for request in requests:
            log.record(request)
        log.close()
        gauges = Gauges()
        try:
            return gauges.values, compare_day(cfg, ASKED, gauges)
        except GateError as error:
            return gauges.values, error


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("consistency"))


def ratios(gauges, name=telemetry.MISMATCH_RATIO):
    return {view: value for (view,), value in gauges[name].items()}


@pytest.mark.parametrize("state", ["before", "between", "after"])
def test_what_the_store_holds_agrees_with_the_offline_join(world, tmp_path, state):
    requests = getattr(world, state)
    gauges, result = world.compare(tmp_path, requests, max_mismatch_ratio=0.0)
    assert isinstance(result, dict), result
    assert [view["view"] for view in result["views"]] == VIEWS
    rows = {view["view"]: view["rows"] for view in result["views"]}
    assert rows == {"item_features": 21 * 16, "meta_embedding_user": 16, "user_features": 16}
    assert {view["values"] for view in result["views"]} == {20 * 16 * 4, 15 * 4, 15 * 5}
    for name in (telemetry.MISMATCH_RATIO, telemetry.MISSING_RATIO, telemetry.MAX_DIFFERENCE):
        assert ratios(gauges, name) == dict.fromkeys(VIEWS, 0.0)
    assert gauges[telemetry.CONSISTENCY_REQUESTS] == {(): 16.0}


def test_requests_during_a_publication_agree_whichever_state_they_saw(world, tmp_path):
    """The rows of a day come before its `complete_through`; a server that has them in memory follows a little later."""
    early = [replace(new, complete_through=old.complete_through) for old, new in zip(world.before, world.after, strict=True)]
    late = [replace(new, items=old.items, items_at=old.items_at) for old, new in zip(world.between, world.after, strict=True)]
    _, result = world.compare(tmp_path / "early", early, max_mismatch_ratio=0.0)
    assert isinstance(result, dict), result
    _, result = world.compare(tmp_path / "late", late, max_mismatch_ratio=0.0)
    assert isinstance(result, dict), result


def test_items_that_lag_by_more_than_a_day_are_found(world, tmp_path):
    lagging = [replace(new, items=old.items, items_at=old.items_at) for old, new in zip(world.before, world.after, strict=True)]
    gauges, error = world.compare(tmp_path, lagging)
    assert isinstance(error, GateError)
    assert error.failed == ("item_features.mismatch_ratio",)
    assert ratios(gauges)["item_features"] > 0.1
    assert ratios(gauges)["user_features"] == 0.0


def test_users_and_embeddings_that_a_publication_did_not_bring_are_found(world, tmp_path):
    stale = [replace(old, complete_through=new.complete_through) for old, new in zip(world.before, world.after, strict=True)]
    gauges, error = world.compare(tmp_path, stale)
    assert isinstance(error, GateError)
    assert set(error.failed) == {f"{view}.mismatch_ratio" for view in VIEWS}
    assert ratios(gauges, telemetry.MAX_DIFFERENCE)["user_features"] >= 1.0


def test_one_wrong_value_is_counted_once_with_its_difference_and_shown(world, tmp_path):
    first, *others = world.after
    wrong = replace(first, user=first.user | {"user_events": first.user["user_events"] + 3})
    gauges, error = world.compare(tmp_path, [wrong, *others])
    assert isinstance(error, GateError)
    assert error.failed == ("user_features.mismatch_ratio",)
    assert ratios(gauges)["user_features"] == pytest.approx(1 / 75)
    assert ratios(gauges, telemetry.MAX_DIFFERENCE)["user_features"] == 3.0
    storage = Storage(world.cfg.storage.root)
    [shown] = storage.read_table(f"consistency/dt={ASKED}/differences.parquet").to_pylist()
    assert (shown["entity"], shown["feature"], shown["difference"]) == (first.user_id, "user_events", 3.0)
    assert storage.read_json(f"consistency/dt={ASKED}/summary.json")["requests"] == 16
    views = storage.read_table(f"consistency/dt={ASKED}/views.parquet").to_pylist()
    assert {view["view"]: view["mismatched"] for view in views} == dict.fromkeys(VIEWS, 0) | {"user_features": 1}
    # Within the limit the verb passes, and reports the same.
    _, result = world.compare(tmp_path / "again", [wrong, *others], max_mismatch_ratio=0.02)
    assert isinstance(result, dict)


def test_a_lost_row_differs_and_an_unknown_one_is_missing(world, tmp_path):
    first, *others = world.after
    nothing = dict.fromkeys(declared.USER_FEATURE_NAMES)
    lost = replace(first, user=nothing, user_at=None, embeddings=[LoggedEmbedding("user", "missing")])
    gauges, _ = world.compare(tmp_path / "lost", [lost, *others])
    assert ratios(gauges)["user_features"] == pytest.approx(1 / 15)
    assert ratios(gauges)["meta_embedding_user"] == pytest.approx(1 / 15)
    stranger = replace(first, user_id="stranger")
    gauges, error = world.compare(tmp_path / "stranger", [stranger, *others])
    assert ratios(gauges, telemetry.MISSING_RATIO)["user_features"] == pytest.approx(1 / 16)
    assert set(error.failed) == {"meta_embedding_user.missing_ratio", "user_features.missing_ratio"}


def test_an_item_s_row_without_a_timestamp_is_joined_at_what_was_due(world, tmp_path):
    """A server that does not know how old its items are; those of the day before are then wrong."""
    timeless = [replace(request, items_at=None) for request in world.after]
    _, result = world.compare(tmp_path / "now", timeless, max_mismatch_ratio=0.0)
    assert isinstance(result, dict), result
    late = [replace(new, items=old.items) for old, new in zip(world.between, timeless, strict=True)]
    _, error = world.compare(tmp_path / "late", late)
    assert isinstance(error, GateError)
    assert error.failed == ("item_features.mismatch_ratio",)


def test_an_embedding_is_compared_though_it_was_not_used_and_at_the_request_where_no_instant_is_known(world, tmp_path):
    first, *others = world.after
    refused = replace(first, embeddings=[replace(first.embeddings[0], status="store_error")])
    _, result = world.compare(tmp_path / "refused", [refused, *others], max_mismatch_ratio=0.0)
    assert {view["view"]: view["rows"] for view in result["views"]}["meta_embedding_user"] == 16
    lost = replace(first, complete_through=None, embeddings=[LoggedEmbedding("user", "missing")])
    gauges, _ = world.compare(tmp_path / "lost", [lost, *others])
    assert ratios(gauges)["meta_embedding_user"] == pytest.approx(1 / 15)


def test_another_version_s_row_counts_as_missing_and_a_silent_store_not_at_all(world, tmp_path):
    first, *others = world.after
    other_version = replace(first, embeddings=[replace(first.embeddings[0], model_version="99")])
    gauges, _ = world.compare(tmp_path / "version", [other_version, *others])
    assert ratios(gauges)["meta_embedding_user"] == pytest.approx(1 / 15)
    silent = replace(first, user=None, user_at=None, embeddings=[LoggedEmbedding("user", "store_error")])
    _, result = world.compare(tmp_path / "silent", [silent, *others], max_mismatch_ratio=0.0)
    assert {view["view"]: view["rows"] for view in result["views"]}["user_features"] == 15


def test_a_day_without_requests_is_nothing_to_do(world, tmp_path):
    gauges = Gauges()
    with pytest.raises(NothingToDo, match=r"serving.log_share = 1 says"):
        compare_day(world.cfg, ASKED + timedelta(days=1), gauges)
    assert gauges.values == {telemetry.CONSISTENCY_REQUESTS: {(): 0.0}}


def test_a_publication_exports_when_it_ended_and_how_old_its_entities_are(world):
    gauges = Gauges()
    record_publication(world.cfg, gauges, 1000.0)
    assert gauges.values[telemetry.LAST_PUBLISHED_SECONDS] == {("user",): 1000.0}
    counts = {state: value for (_, state), value in gauges.values[telemetry.PUBLISHED_ENTITIES].items()}
    assert set(counts) == set(telemetry.ENTITY_STATES)
    logged = read_logged(Storage(world.cfg.storage.root), declared.TABLES, through=world.second)
    newest = logged.group_by("user_id").aggregate([("timestamp", "max")])["timestamp_max"].to_pylist()
    ages = [schema.day_end(world.second) - at for at in newest]
    assert counts["within_1d"] == sum(age < timedelta(days=1) for age in ages) > 0
    assert sum(counts.values()) == len(ages)
