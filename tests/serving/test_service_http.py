"""The real service over HTTP: real Feast on SQLite, real MLflow registry, real bundles."""

import sqlite3
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from limaml import registry

NOW = datetime.now(UTC).replace(microsecond=0)
# From the service's look at the clock to the test's, on a busy machine.
ANSWER_S = 10.0
DAY = timedelta(days=1)
MUCH, OLD, OTHER = [2.0, -1.0, 0.5, 1.5], [-1.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5]
MUCH_GREEN = [-2.0, 1.0, -0.5, 1.0]
# Both sides compute in float32, in batches of different sizes.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def before(server):
    """What the service says before any champion exists."""
    server.wait_until("/livez", 200)
    return {
        "readyz": server.client.get("/readyz"),
        "rank": server.rank(),
        "bad": server.rank(items=[]),
        "candidates": server.metric("limaml_rank_candidates_count"),
    }


@pytest.fixture(scope="module")
def versions(world, server, before):
    """Two versions, blue and green; blue serves, published through yesterday."""
    world.build()
    blue = world.register(seed=1, slot="blue", complete_through=NOW - DAY)
    green = world.register(seed=2, slot="green", complete_through=NOW - DAY)
    world.publish("blue", blue, {"much": MUCH}, as_of=NOW - 2 * DAY)
    world.publish("blue", blue, {"old": OLD}, as_of=NOW - 60 * DAY)
    world.publish("blue", "999", {"other": OTHER}, as_of=NOW - DAY)
    world.publish("green", green, {"much": MUCH_GREEN}, as_of=NOW - DAY)
    world.registry.set_champion(blue)
    server.wait_until("/readyz", 200)
    return {"blue": blue, "green": green}


@pytest.fixture
def blue(world, server, versions):
    """The blue version serves when a test starts."""
    world.serve(server, versions["blue"])
    return versions["blue"]


def scores(answer):
    return {entry["item_id"]: entry["score"] for entry in answer["items"]}


def test_nothing_is_ranked_before_a_champion_exists(before):
    assert before["readyz"].status_code == 503
    assert before["rank"].status_code == 503
    error = before["rank"].json()["error"]
    assert (error["field"], error["rule"]) == ("(service)", "must have loaded a champion")
    assert "cut-over" in error["remedy"]
    assert before["bad"].status_code == 400
    assert before["candidates"] == 0.0


def seconds_since(instant):
    return (datetime.now(UTC) - instant).total_seconds()


def test_a_fresh_embedding_is_used(world, server, blue):
    items = ["i3", "i1", "i6", "i2"]
    answer = server.ranked("much", items)
    assert scores(answer) == pytest.approx(world.expected(blue, "much", items, MUCH), abs=TOLERANCE)
    assert scores(answer) != pytest.approx(world.expected(blue, "much", items), abs=1e-3), "the prior scores the same"
    order = [entry["score"] for entry in answer["items"]]
    assert order == sorted(order, reverse=True)
    used = answer["embeddings"]["user"]
    assert used["fallback"] is None
    # Published whole through yesterday: a lag of one day, though the row was written for the day before.
    assert used["age_s"] == pytest.approx(seconds_since(NOW - DAY), abs=ANSWER_S)
    assert used["inactivity_s"] == pytest.approx(seconds_since(NOW - 32 * DAY), abs=ANSWER_S)


def test_a_silent_users_embedding_is_not_stale(world, server, blue):
    answer = server.ranked("old")
    assert answer["embeddings"]["user"]["fallback"] is None
    assert scores(answer) == pytest.approx(world.expected(blue, "old", ["i1", "i2", "i3"], OLD), abs=TOLERANCE)


def test_an_embedding_lagging_too_far_gives_the_prior(world, server, blue):
    def fallback(answer):
        return answer["embeddings"]["user"]["fallback"]

    world.registry.set_tags(blue, {registry.COMPLETE_THROUGH: (NOW - 5 * DAY).isoformat()})
    try:
        answer = server.ranked_when(lambda answer: fallback(answer) == "stale", "old")
        assert answer["embeddings"]["user"]["age_s"] == pytest.approx(seconds_since(NOW - 5 * DAY), abs=ANSWER_S)
        assert scores(answer) == pytest.approx(world.expected(blue, "old", ["i1", "i2", "i3"]), abs=TOLERANCE)
        # A row newer than that is as fresh as itself.
        assert fallback(server.ranked("much")) is None
    finally:
        world.registry.set_tags(blue, {registry.COMPLETE_THROUGH: (NOW - DAY).isoformat()})
    server.ranked_when(lambda answer: fallback(answer) is None, "old")


def test_an_unknown_user_gets_the_prior(world, server, blue):
    answer = server.ranked("nobody")
    assert answer["embeddings"]["user"] == {"age_s": None, "inactivity_s": None, "fallback": "missing", "stale": False}
    assert scores(answer) == pytest.approx(world.expected(blue, "nobody", ["i1", "i2", "i3"]), abs=TOLERANCE)


def test_a_known_user_without_an_embedding_keeps_his_features(world, server, blue):
    answer = server.ranked("bare")
    assert answer["embeddings"]["user"]["fallback"] == "missing"
    assert scores(answer) == pytest.approx(world.expected(blue, "bare", ["i1", "i2", "i3"]), abs=TOLERANCE)
    assert scores(answer) != pytest.approx(scores(server.ranked("nobody")), abs=1e-4)


def test_an_embedding_of_another_version_is_not_used(world, server, blue):
    answer = server.ranked("other")
    used = answer["embeddings"]["user"]
    assert used == {"age_s": None, "inactivity_s": None, "fallback": "version_mismatch", "stale": False}
    assert scores(answer) == pytest.approx(world.expected(blue, "other", ["i1", "i2", "i3"]), abs=TOLERANCE)


def test_an_item_new_to_the_model_is_ranked(world, server, blue):
    items = ["i1", "i7", "i8"]
    assert scores(server.ranked("much", items)) == pytest.approx(world.expected(blue, "much", items, MUCH), abs=TOLERANCE)


def test_the_hour_of_the_request_counts(world, server, blue):
    night = scores(server.ranked("much", context={"hour": 2}))
    assert night == pytest.approx(world.expected(blue, "much", ["i1", "i2", "i3"], MUCH, hour=2), abs=TOLERANCE)
    assert night != pytest.approx(scores(server.ranked("much", context={"hour": 14})), abs=1e-4)
    assert server.rank("much", context={}).status_code == 200


@pytest.mark.parametrize(
    ("change", "field", "rule", "value"),
    [
        ({"items": ["i1", "nowhere"]}, "item_ids.1", "must be in the catalogue", "nowhere"),
        ({"items": []}, "item_ids", "must have at least 1 item", "list of 0"),
        ({"items": ["i1", "i2", "i3", "i4", "i5", "i6"]}, "item_ids", "must have at most 5 items", "list of 6"),
        ({"items": ["i1", "i1"]}, "item_ids", "must name each item once", "i1"),
        ({"items": ["i1", 2]}, "item_ids.1", "must be a valid string", 2),
        ({"user": 12}, "user_id", "must be a valid string", 12),
        ({"context": {"hour": 25}}, "context.hour", "must be less than or equal to 23", 25),
        ({"colour": "red"}, "colour", "is not a known field", "red"),
    ],
)
def test_a_bad_request_is_refused_and_not_counted(server, blue, change, field, rule, value):
    counted = server.metric("limaml_rank_candidates_count")
    response = server.rank(**change)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["field"], error["rule"], error["value"]) == (field, rule, value)
    assert error["remedy"]
    assert server.metric("limaml_rank_candidates_count") == counted


def test_an_item_that_a_published_day_brings_can_be_ranked(world, server, blue):
    assert server.rank(items=["i9"]).status_code == 400
    from_fixture = [f"i{number}" for number in range(1, 9)]
    world.write_catalogue([*from_fixture, "i9"])
    world.registry.set_tags(blue, {registry.COMPLETE_THROUGH: (NOW - DAY / 2).isoformat()})
    try:
        server.ranked_when(lambda answer: answer["embeddings"]["user"]["age_s"] < 0.6 * DAY.total_seconds())
        assert scores(server.ranked("much", ["i9"])) == pytest.approx(world.expected(blue, "much", ["i9"], MUCH), abs=TOLERANCE)
    finally:
        world.write_catalogue(from_fixture)
        world.registry.set_tags(blue, {registry.COMPLETE_THROUGH: (NOW - DAY).isoformat()})
    server.ranked_when(lambda answer: answer["embeddings"]["user"]["age_s"] > 0.9 * DAY.total_seconds())


@contextmanager
def without_tables(path):
    """The online store's tables are gone while this lasts."""

    def rename(old, new):
        connection = sqlite3.connect(path, timeout=20)
        with connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for name in tables:
                if name.startswith(old):
                    connection.execute(f'ALTER TABLE "{name}" RENAME TO "{new}{name.removeprefix(old)}"')
        connection.close()

    rename("limaml_", "lost_")
    try:
        yield
    finally:
        rename("lost_", "limaml_")


def test_without_the_online_store_the_prior_ranks_and_it_recovers(world, server, blue):
    items = ["i1", "i4", "i7"]
    personal = scores(server.ranked("much", items))
    failures = server.metric("limaml_meta_embedding_lookups_total", kind="user", status="store_error")
    with without_tables(world.cfg.feast.online_connection):
        answer = server.ranked("much", items)
        # The user is unknown, the items are as last read.
        used = answer["embeddings"]["user"]
        assert used == {"age_s": None, "inactivity_s": None, "fallback": "store_error", "stale": False}
        assert scores(answer) == pytest.approx(world.expected(blue, "nobody", items), abs=TOLERANCE)
        assert server.metric("limaml_meta_embedding_lookups_total", kind="user", status="store_error") == failures + 1
        assert server.client.get("/readyz").status_code == 200
        # Nothing is forgotten while the poller tries, in vain, to open the store again.
        polled_until = time.monotonic() + 5 * world.cfg.serving.poll_interval_s
        while time.monotonic() < polled_until:
            assert scores(server.ranked("much", items)) == scores(answer)
    answer = server.ranked_when(lambda answer: answer["embeddings"]["user"]["fallback"] is None, "much", items)
    assert scores(answer) == personal


def test_a_switch_changes_block_and_slot_together(world, server, versions, blue):
    green = versions["green"]
    world.serve(server, green)
    items = ["i1", "i2", "i3"]
    assert scores(server.ranked("much", items)) == pytest.approx(
        world.expected(green, "much", items, MUCH_GREEN), abs=TOLERANCE
    )
    assert server.ranked("old")["embeddings"]["user"]["fallback"] == "missing"
    assert server.metric("limaml_model_info", version=blue, slot="blue") == 0.0
    assert server.metric("limaml_model_info", version=green, slot="green") == 1.0
    world.serve(server, blue)
    assert server.metric("limaml_model_info", version=blue, slot="blue") == 1.0
    assert server.metric("limaml_model_info", version=green, slot="green") == 0.0


def test_a_champion_that_comes_without_the_store_serves_the_prior_until_it_is_back(world, server, versions, blue):
    green, items = versions["green"], ["i1", "i4", "i7"]
    registered = Path(world.cfg.feast.registry)
    hidden = registered.rename(registered.with_suffix(".hidden"))
    try:
        world.serve(server, green)
        answer = server.ranked("much", items)
        assert answer["embeddings"]["user"]["fallback"] == "store_error"
        assert scores(answer) == pytest.approx(world.expected(green, "nobody", items), abs=TOLERANCE)
    finally:
        hidden.rename(registered)
    answer = server.ranked_when(lambda answer: answer["embeddings"]["user"]["fallback"] is None, "much", items)
    assert scores(answer) == pytest.approx(world.expected(green, "much", items, MUCH_GREEN), abs=TOLERANCE)


def test_a_champion_that_cannot_be_loaded_leaves_the_old_one_serving(world, server, blue):
    broken = world.register(seed=3, slot="green", complete_through=NOW)
    run = world.registry.get(broken).run_id
    [weights] = (world.folder / "artifacts").glob(f"**/{run}/**/refit.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    world.registry.set_champion(broken)
    try:
        server.wait_for_log("champion_load_failed", "refit.safetensors")
        assert server.ranked()["model_version"] == blue
        assert server.client.get("/readyz").status_code == 200
    finally:
        world.registry.set_champion(blue)


def test_metrics_tell_what_was_served(server, blue):
    def lookups(status):
        return server.metric("limaml_meta_embedding_lookups_total", kind="user", status=status)

    def lags():
        return server.metric("limaml_meta_embedding_lag_seconds_count", kind="user")

    before = lookups("fresh"), lookups("missing"), lookups("version_mismatch"), lags()
    requests = server.metric("limaml_rank_candidates_count")
    scored = server.metric("limaml_score_count")
    for user in ("much", "nobody", "other"):
        server.ranked(user)
    assert (lookups("fresh"), lookups("missing"), lookups("version_mismatch"), lags()) == tuple(n + 1 for n in before)
    assert server.metric("limaml_rank_candidates_count") == requests + 3
    assert server.metric("limaml_score_count") == scored + 9
    for stage in ("features", "embedding", "score", "serialise", "total"):
        assert server.metric("limaml_rank_seconds_count", stage=stage) >= 3
    assert "much" not in server.client.get("/metrics").text


def test_the_openapi_page_gives_limits_and_ranges(server, blue):
    assert server.client.get("/").status_code == 200
    page = server.client.get("/docs.json").json()
    body = page["paths"]["/rank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["item_ids"]["maxItems"] == 5
    assert body["additionalProperties"] is False
    responses = page["paths"]["/rank"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "415", "500", "503", "504"}
    assert set(responses["400"]["content"]["application/json"]["schema"]["properties"]) == {"error"}
    assert set(page["components"]["schemas"]["ErrorDetail"]["required"]) == {"field", "rule", "value", "remedy"}
    hour = page["components"]["schemas"]["RankContext"]["properties"]["hour"]["anyOf"][0]
    assert (hour["minimum"], hour["maximum"]) == (0, 23)


def test_it_listens_on_loopback_only(server, blue):
    import psutil

    inside = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = [c.laddr for process in inside for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert server.port in [address.port for address in listening]
    assert {address.ip for address in listening} == {"127.0.0.1"}
