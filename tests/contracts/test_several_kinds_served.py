"""Contract 7 with five kinds: published through day D, the service scores every row of day D+1 with the embeddings of its
user, of its item, of the item's studio, of the page that the request names and of each candidate's shelf, as the as-served
evaluation does; on two days, over HTTP.
"""

from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from limaml.config import Config, FeatureConfig, SourceConfig
from limaml.events.logged import read_logged
from limaml.events.sources import week_shift
from limaml.events.synthetic import SyntheticSource
from limaml.io.storage import Storage
from limaml.monitoring.consistency import compare_day
from limaml.monitoring.export import Gauges
from limaml.tasks.protocols import as_served
from limaml.tasks.sampling import TaskRows
from limaml.training.scoring import embed_others, embed_specs, score_with_embeddings
from tests import declared
from tests.contracts.served_days import TOLERANCE, Chain, Day, scores

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 3, 2)
FEATURES = (
    FeatureConfig(entity="item", name="studio", type="category"),
    FeatureConfig(entity="context", name="page", type="category"),
    FeatureConfig(entity="context", name="shelf", type="category", per_candidate=True),
)
OTHERS = ("item", "maker", "page", "shelf")
CANDIDATES = ("item", "maker", "shelf")
"""Kinds whose entities candidates differ in."""


def make_config(folder):
    return Config.model_validate(
        {
            "features": (*declared.FEATURES, *FEATURES),
            "source": {"kind": "parquet", "path": str(folder / "delivered"), "licence": "CC0-1.0"},
            "storage": {"root": str(folder / "data")},
            # The days lie in the past: how far does not matter here.
            "task_kinds": [
                {"name": "user", "max_lag_s": 1e10},
                {
                    "name": "item",
                    "entity_column": "item_id",
                    "max_lag_s": 1e10,
                    "meta_block": "row_mlp",
                    "support_rows": 10,
                    # With a wide prior Newton's steps of a network turn the rounding of other batches into more than 1e-5.
                    "prior_std": 0.3,
                },
                {"name": "maker", "entity_column": "studio", "max_lag_s": 1e10, "support_rows": 12},
                {"name": "page", "entity_column": "page", "max_lag_s": 1e10, "support_rows": 20},
                {"name": "shelf", "entity_column": "shelf", "max_lag_s": 1e10, "meta_block": "id_mlp", "support_rows": 8},
            ],
            # With the rows' ages an embedding would change while no row comes, which is when a daily run leaves it alone.
            "model": {"embedding_dim": 6, "meta_hidden": [8], "global_hidden": [16, 8], "row_age": False},
            "meta": {"support_rows": 16, "inner_lr": 0.3},
            "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_root": str(folder / "artifacts")},
            "feast": {
                "repo_path": str(ROOT / "feature_repo"),
                "registry": str(folder / "registry.db"),
                "online_connection": str(folder / "online.db"),
            },
            "embeddings": {"lease_url": f"sqlite:///{folder}/lease.db", "min_norm": 0.0},
            # On a busy machine a read may take longer than the default; here it must not fall back.
            "serving": {
                "poll_interval_s": 0.1,
                "store_timeout_s": 2.0,
                "log_share": 1.0,
                "log_path": str(folder / "requests"),
            },
        }
    )


def deliver(folder):
    """Generated days, and where each event was; a new page comes after those that are trained and filled with."""
    sizes = {"synthetic_users": 60, "synthetic_items": 40, "synthetic_days": 12, "synthetic_rows_per_user": 24}
    source = SyntheticSource(SourceConfig(kind="synthetic", **sizes))
    source = source.moved(week_shift(source.days()[-1], TODAY))
    for name, table in zip(("users", "items"), source.catalogue(), strict=True):
        Storage(str(folder)).write_table(f"{name}.parquet", table)
    for number, day in enumerate(source.days()):
        events = source.read_day(day)
        pages = [None, "front", "search", "new" if number > 5 else "search"]
        columns = {
            "page": [pages[n % 4] for n in range(events.num_rows)],
            "shelf": [f"shelf {n % 5}" if n % 5 else None for n in range(events.num_rows)],
        }
        for name, values in columns.items():
            events = events.append_column(name, pa.array(values, pa.string()))
        Storage(str(folder)).write_table(f"events/dt={day}/part.parquet", events)
    return source.days()


@pytest.fixture(scope="module")
def chain(tmp_path_factory, start_server):
    folder = tmp_path_factory.mktemp("five-kinds")
    cfg = make_config(folder)
    days = deliver(folder / "delivered")
    chain = Chain(cfg, folder, days[5], TODAY)
    chain.days = days[6:8]
    # Creates the registry's tables, which the server, started ahead because it takes seconds, would do at the same time.
    assert chain.registry.champion() is None
    chain.server = start_server(chain.cfg, folder)
    chain.run()
    chain.server.wait_until("/readyz", 200)
    return chain


@pytest.fixture(scope="module")
def asked(chain):
    return [Day(chain, day) for day in chain.days]


def test_every_row_of_the_next_day_is_scored_alike(chain, asked):
    for day in asked:
        assert day.logged.num_rows == len(day.answers) > 50
        assert {answer["model_version"] for answer in day.answers} == {chain.version}
        assert np.abs(scores(day.answers) - day.offline).max() <= TOLERANCE
        assert day.offline.std() > 0.03


def test_each_kinds_embeddings_matter_and_are_those_of_the_day(chain, asked):
    for day in asked:
        _, behind, _ = chain.offline(day.next_day, support_through=chain.day_before)
        assert np.abs(scores(day.answers) - behind).max() > 100 * TOLERANCE
        for kind in OTHERS:
            assert np.abs(scores(day.answers) - without(chain, day, kind)).max() > 100 * TOLERANCE


def test_what_all_candidates_share_meets_their_vectors_and_so_changes_their_order(chain):
    assert set(chain.model.network.global_block.product.others) == set(CANDIDATES)


def without(chain, day, kind):
    """As-served scores with the prior of every entity of a kind."""
    logged = read_logged(chain.storage, chain.tables, through=day.next_day)
    rows = TaskRows.of(logged, chain.model.encoder, chain.cfg)
    start_us = int(datetime(day.next_day.year, day.next_day.month, day.next_day.day, tzinfo=UTC).timestamp() * 1e6)
    specs = as_served(rows, from_us=start_us, support_rows=16)
    others = {name: found for name, found in embed_others(chain.model.network, rows, specs).items() if name != kind}
    return score_with_embeddings(chain.model.network, rows, specs, embed_specs(chain.model.network, rows, specs), others)


def test_the_service_says_by_kind_what_the_scores_rest_on(chain, asked):
    day = asked[-1]
    seen = {row["item_id"] for row in day.rows}
    for row, answer, size in zip(day.rows, day.answers, day.support_sizes, strict=True):
        used = answer["embeddings"]
        assert used["user"]["fallback"] == ("missing" if size == 0 else None)
        # Of all candidates; the new page came with the day that was published last but one.
        assert used["page"]["fallback"] == (None if row["page"] else "missing")
        assert (used["page"]["age_s"] is None) == (row["page"] is None)
        assert used["shelf"]["statuses"] == {"fresh" if row["shelf"] else "missing": 1}
        for kind in CANDIDATES:
            assert sum(used[kind]["statuses"].values()) == 1
            assert used[kind]["prior"] == used[kind]["statuses"].get("missing", 0)
            assert (used[kind]["age_s"] is None) == (used[kind]["prior"] == 1)
    catalogue = sorted(item for item in chain.model.encoder.items)
    context = {"page": "unheard of", "shelf": [*["shelf 1", None] * 17, "shelf 2", "shelf 9"]}
    answer = chain.server.ranked(day.rows[0]["user_id"], catalogue, context=context)
    assert answer["embeddings"]["page"]["fallback"] == "missing"
    assert answer["embeddings"]["shelf"]["statuses"] == {"fresh": 18, "missing": 18}
    found = answer["embeddings"]["item"]
    assert sum(found["statuses"].values()) == len(catalogue)
    assert set(found["statuses"]) <= {"fresh", "missing"}
    assert found["statuses"]["fresh"] >= len(seen & set(catalogue)) - 3
    assert found["inactivity_s"] >= found["age_s"]
    # Every ninth item is of no studio; each of the five has rows.
    assert answer["embeddings"]["maker"]["statuses"] == {
        "fresh": sum(int(item[1:]) % 9 != 8 for item in catalogue),
        "missing": sum(int(item[1:]) % 9 == 8 for item in catalogue),
    }


def test_candidates_together_are_scored_as_each_alone(chain, asked):
    user = asked[-1].rows[0]["user_id"]
    items = sorted({row["item_id"] for row in asked[-1].rows})[:12]

    def ask(chosen):
        shelf = [f"shelf {int(item[1:]) % 4}" for item in chosen]
        answer = chain.server.ranked(user, chosen, context={"hour": 7, "page": "front", "shelf": shelf})
        return {found["item_id"]: found["score"] for found in answer["items"]}

    together = ask(items)
    assert {item: ask([item])[item] for item in items} == pytest.approx(together, abs=1e-6)
    assert len({round(score, 4) for score in together.values()}) > 6


def test_the_metrics_count_candidates_by_status_and_what_is_of_all_of_them_once(chain, asked):
    def counted(kind, status):
        lines = chain.server.client.get("/metrics").text.splitlines()
        found = [
            line for line in lines if "lookups_total" in line and f'kind="{kind}"' in line and f'status="{status}"' in line
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    rows = [row for day in asked for row in day.rows]
    assert counted("item", "fresh") > len(asked[0].answers) / 2
    assert counted("page", "missing") >= sum(row["page"] is None for row in rows)
    assert counted("shelf", "missing") >= sum(row["shelf"] is None for row in rows)


def test_the_requests_that_the_service_logged_agree_with_the_offline_join(chain, asked):
    """Last, as it ends the server: what the log still holds is written then."""
    chain.server.stop()
    result = compare_day(chain.cfg, datetime.now(UTC).date(), Gauges())
    views = {view["view"]: view for view in result["views"]}
    embeddings = {f"meta_embedding_{kind.name}" for kind in chain.cfg.task_kinds}
    assert views.keys() == {"user_features", "item_features"} | embeddings
    for view in views.values():
        assert (view["mismatch_ratio"], view["missing_ratio"], view["max_difference"]) == (0.0, 0.0, 0.0)
    # Of the items that were asked about together, too.
    assert views["meta_embedding_item"]["rows"] > views["meta_embedding_user"]["rows"]
