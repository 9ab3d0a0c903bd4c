"""Contract 7: published through day D, the service scores every row of day D+1 as the as-served evaluation does; on three days.

Offline takes its features from the logged rows (the point-in-time join) and its embeddings from a history that ends with D;
online, everything was fetched from the feature store over HTTP. The features fetched are compared too; they are of every kind.
"""

from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml import schema
from limaml.config import Config, FeatureConfig
from limaml.events.sources import week_shift
from limaml.events.synthetic import SyntheticSource
from limaml.monitoring.consistency import compare_day
from limaml.monitoring.export import Gauges
from tests.contracts.served_days import TOLERANCE, Chain, Day, context_of, scores

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 3, 2)


def feature(entity, name, kind, **how):
    return FeatureConfig(entity=entity, name=name, type=kind, **how)


# The generated columns under other names, two of them left out, columns of events, and a context: nothing may know what films
# have. A user's maps hold fewer keys than users have.
FEATURES = (
    feature("item", "price", "number", column="year", minimum=0.0),
    feature("user", "segment", "category", column="age_band"),
    feature("item", "label_text", "text", column="title"),
    feature("item", "tags", "categories", column="genres"),
    feature("item", "shown", "number", aggregate="count"),
    feature("item", "bought", "number", aggregate="rate", prior=0.3, prior_rows=4.0),
    feature("user", "seen", "number", aggregate="count"),
    feature("user", "buys", "number", aggregate="rate"),
    feature("user", "buys_lately", "number", aggregate="rate", window_days=1),
    feature("item", "shown_lately", "number", aggregate="count", window_days=3),
    feature("user", "paid", "number", aggregate="mean", of="paid_price", window_days=2),
    feature("user", "away", "number", aggregate="days_since"),
    feature("item", "segment_of", "category", column="segment"),
    feature("item", "unsold", "number", aggregate="days_since"),
    # No other feature of users has this window: a user's maps change with it all the same.
    feature("user", "same", "number", aggregate="count", by="item_id", max_keys=4, window_days=4),
    feature("user", "same_rate", "number", aggregate="rate", by="item_id", max_keys=4, prior_rows=2.0),
    feature("user", "same_away", "number", aggregate="days_since", by="item_id", max_keys=4),
    feature("user", "same_bought", "number", aggregate="days_since", positive=True, by="item_id", max_keys=4),
    feature("user", "likes", "number", aggregate="rate", by="segment_of", max_keys=3),
    feature("context", "page", "category", per_candidate=True),
    feature("context", "temperature", "number"),
    feature("context", "hour_of_day", "cycle", clock="hour"),
    feature("context", "day_of_week", "cycle", clock="weekday"),
    feature("event", "paid_price", "number"),
)
TABLES = schema.tables(FEATURES)


def make_config(folder):
    return Config.model_validate(
        {
            "features": FEATURES,
            "source": {
                "kind": "parquet",
                "path": str(folder / "delivered"),
                "licence": "CC0-1.0",
                "synthetic_users": 60,
                "synthetic_items": 30,
                "synthetic_days": 12,
                "synthetic_rows_per_user": 24,
            },
            "storage": {"root": str(folder / "data")},
            # The days lie in the past: how far does not matter here.
            "task_kinds": [{"name": "user", "max_lag_s": 1e10}],
            "model": {"embedding_dim": 6, "global_hidden": [16, 8]},
            "meta": {"support_rows": 16},
            "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_root": str(folder / "artifacts")},
            "feast": {
                "repo_path": str(ROOT / "feature_repo"),
                "registry": str(folder / "registry.db"),
                "online_connection": str(folder / "online.db"),
            },
            "embeddings": {"lease_url": f"sqlite:///{folder}/lease.db"},
            # On a busy machine a read may take longer than the default; here it must not fall back.
            "serving": {
                "poll_interval_s": 0.1,
                "store_timeout_s": 2.0,
                "log_share": 1.0,
                "log_path": str(folder / "requests"),
            },
        }
    )


def deliver(cfg, folder):
    """Generated days as a source's files, with columns of events and a category of items beside them; returns the days."""
    plain = SyntheticSource(cfg.source)
    source = plain.moved(week_shift(plain.days()[-1], TODAY))
    users, items = source.catalogue()
    segments = [("a", "b", "c", "d", None)[at % 5] for at in range(items.num_rows)]
    write(folder / "users.parquet", users)
    write(folder / "items.parquet", items.append_column("segment", pa.array(segments)))
    for day in source.days():
        table = source.read_day(day)
        pages = [("front", "back", None)[at % 3] for at in range(table.num_rows)]
        degrees = [None if at % 7 == 0 else at % 11 - 3.5 for at in range(table.num_rows)]
        prices = [None if at % 4 == 0 else at % 13 / 8 for at in range(table.num_rows)]
        for name, column in (("page", pages), ("temperature", degrees), ("paid_price", prices)):
            table = table.append_column(name, pa.array(column))
        write(folder / "events" / f"dt={day}" / "part.parquet", table)
    return source.days()


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, start_server):
    folder = tmp_path_factory.mktemp("contract7")
    cfg = make_config(folder)
    days = deliver(cfg, folder / "delivered")
    chain = Chain(cfg, folder, days[5], TODAY)
    chain.days = days[6:10]
    # Creates the registry's tables, which the server, started ahead because it takes seconds, would do at the same time.
    assert chain.registry.champion() is None
    chain.server = start_server(chain.cfg, folder)
    chain.run()
    chain.server.wait_until("/readyz", 200)
    return chain


@pytest.fixture(scope="module")
def asked(chain):
    return [Day(chain, day) for day in chain.days[:3]]


def test_every_row_of_the_next_day_is_scored_alike(chain, asked):
    for day in asked:
        assert day.logged.num_rows == len(day.answers) > 100
        assert {answer["model_version"] for answer in day.answers} == {chain.version}
        assert np.abs(scores(day.answers) - day.offline).max() <= TOLERANCE
        assert day.offline.std() > 0.05
    # The rows are worth comparing: with and without history, known and unknown items, and scores that differ.
    sizes = np.concatenate([day.support_sizes for day in asked])
    assert (sizes == 0).any()
    assert (sizes > 0).any()
    items = [item for day in asked for item in day.logged["item_id"].to_pylist()]
    assert 0 < sum(item in set(chain.model.encoder.items) for item in items) < len(items)


def test_the_service_says_missing_exactly_for_users_without_history(asked):
    for day in asked:
        fallbacks = [answer["embeddings"]["user"]["fallback"] for answer in day.answers]
        assert fallbacks == ["missing" if size == 0 else None for size in day.support_sizes]


def test_the_comparison_sees_a_day_that_was_not_published(chain, asked):
    _, behind, _ = chain.offline(asked[0].next_day, support_through=chain.day_before)
    assert np.abs(scores(asked[0].answers) - behind).max() > 100 * TOLERANCE


def test_the_features_fetched_are_those_the_row_was_logged_with(asked):
    for day in asked:
        assert day.mismatches == []
    for name in ("paid", "away", "unsold", *(column.name for column in TABLES.joined if column.name.startswith("by_"))):
        assert len({value for day in asked for value in day.logged[name].to_pylist()}) > 1, f"{name} says nothing"


def test_candidates_are_scored_alike_in_whatever_order_they_stand(chain, asked):
    """Each with its own context and the user's own entry; at the moment of one row, so not as logged."""
    user = max((row["user_id"] for row in asked[-1].rows), key=[row["user_id"] for row in asked[-1].rows].count)
    mine = {row["item_id"]: row for row in asked[-1].rows if row["user_id"] == user}
    items, at = sorted(mine), context_of(TABLES, next(iter(mine.values())))

    def ask(chosen):
        answer = chain.server.ranked(user, chosen, context=at | {"page": [mine[item]["page"] for item in chosen]})
        return {found["item_id"]: found["score"] for found in answer["items"]}

    together = ask(items)
    assert len(items) > 3
    assert ask(items[::-1]) == pytest.approx(together, abs=1e-6)
    assert {item: ask([item])[item] for item in items} == pytest.approx(together, abs=1e-6)
    assert len({round(score, 4) for score in together.values()}) > 1


def test_the_requests_that_the_service_logged_agree_with_the_offline_join(chain, asked):
    """Last, as it ends the server: what the log still holds is written then."""
    chain.server.stop()
    started = datetime.now(UTC).date()
    result = compare_day(chain.cfg, started, Gauges())
    assert result["requests"] > sum(len(day.answers) for day in asked)  # some were asked while the server caught up
    views = {"user_features", "item_features", "meta_embedding_user", "user_by_item_id", "user_by_segment_of"}
    assert {view["view"] for view in result["views"]} == views
    for view in result["views"]:
        assert (view["mismatch_ratio"], view["missing_ratio"], view["max_difference"]) == (0.0, 0.0, 0.0)
        assert view["rows"] > 0
