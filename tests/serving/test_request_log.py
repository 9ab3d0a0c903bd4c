"""The log of requests: who is sampled, what is written and where, and that a request never waits for it."""

import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest
from structlog.testing import capture_logs

from limaml.config import Config
from limaml.io.storage import Storage
from serving.request_log import LoggedEmbedding, LoggedRequest, RequestLog
from tests import declared
from tests.polling import wait_for

AT = datetime(2026, 3, 2, 23, 59, 58, tzinfo=UTC)
THROUGH = datetime(2026, 3, 2, tzinfo=UTC)
USER = {"age_band": "25_34", "gender": None, "occupation": "artist", "user_events": 3, "user_positive_rate": 0.5}
ITEMS = {"year": [1990, None], "genres": [["Drama"], []], "item_events": [4, 0], "item_positive_rate": [0.25, 0.5]}


def request(user_id="u1", at=AT, **changed):
    values = {
        "at": at,
        "user_id": user_id,
        "model_version": "3",
        "slot": "blue",
        "complete_through": THROUGH,
        "context": {"hour": 23},
        "user": USER,
        "user_at": THROUGH,
        "item_ids": ["i1", "i2"],
        "items": ITEMS,
        "items_at": [THROUGH, None],
        "embeddings": [LoggedEmbedding("user", "fresh", "3", THROUGH, [1.0, 0.1])],
        "scores": [0.75, 0.5],
        "arm": "adapted",
    }
    return LoggedRequest(**values | changed)


@pytest.fixture
def cfg(tmp_path):
    return Config.model_validate(
        {
            "features": declared.FEATURES,
            "source": {"kind": "synthetic"},
            "serving": {"log_share": 1.0, "log_path": str(tmp_path / "requests")},
        }
    )


def share(cfg, value):
    return cfg.model_copy(update={"serving": cfg.serving.model_copy(update={"log_share": value})})


def files(cfg):
    """Those that are whole: one that is being written is hidden."""
    return [path for path in Storage(cfg.serving.log_path).walk(".") if "/." not in path]


def logged(cfg):
    storage = Storage(cfg.serving.log_path)
    return [row for path in files(cfg) for row in storage.read_table(path).to_pylist()]


def test_a_request_comes_back_as_it_was_recorded(cfg):
    requests = RequestLog(cfg)
    requests.record(request())
    requests.close()
    [path] = files(cfg)
    assert path.startswith("dt=2026-03-02/part-")
    assert Storage(cfg.serving.log_path).read_table(path).schema.equals(declared.REQUEST_LOG.arrow)
    [row] = logged(cfg)
    assert (row["logged_at"], row["user_id"], row["complete_through"]) == (AT, "u1", THROUGH)
    assert row["arm"] == "adapted"
    assert row["user"] == {"event_timestamp": THROUGH, **USER}
    assert row["items"][0] == {
        "event_timestamp": THROUGH, "year": 1990, "genres": ["Drama"], "item_events": 4, "item_positive_rate": 0.25
    }  # fmt: skip
    assert (row["items"][1]["event_timestamp"], row["items"][1]["year"]) == (None, None)
    [embedding] = row["embeddings"]
    assert (embedding["kind"], embedding["status"], embedding["as_of"]) == ("user", "fresh", THROUGH)
    assert embedding["embedding"] == pytest.approx([1.0, 0.1])
    assert row["scores"] == [0.75, 0.5]


def test_what_the_store_did_not_answer_is_null(cfg):
    requests = RequestLog(cfg)
    missing = {name: [None, None] for name in declared.ITEM_FEATURE_NAMES}
    requests.record(
        request(user=None, user_at=None, items=missing, items_at=None, embeddings=[LoggedEmbedding("user", "store_error")])
    )
    requests.close()
    [row] = logged(cfg)
    assert row["user"] is None
    assert row["embeddings"][0]["embedding"] is None
    assert {item["event_timestamp"] for item in row["items"]} == {None}


def test_each_day_gets_its_own_partition(cfg):
    requests = RequestLog(cfg)
    requests.record(request())
    requests.record(request(at=datetime(2026, 3, 3, 0, 0, 1, tzinfo=UTC)))
    requests.close()
    assert [path.split("/")[0] for path in files(cfg)] == ["dt=2026-03-02", "dt=2026-03-03"]


def test_files_of_one_day_do_not_replace_each_other(cfg):
    requests = RequestLog(cfg, flush_rows=1, flush_interval_s=600.0)
    for number in range(3):
        requests.record(request(f"u{number}"))
        wait_for(lambda number=number: len(logged(cfg)) == number + 1, "a file more")
    requests.close()
    assert not requests._thread.is_alive(), "a writer that waits for the next request is woken, not waited for"
    assert [row["user_id"] for row in logged(cfg)] == ["u0", "u1", "u2"]


def test_full_batches_and_old_ones_are_written_without_a_close(cfg):
    by_rows = RequestLog(cfg, flush_rows=2, flush_interval_s=600.0)
    for user in ("a", "b"):
        by_rows.record(request(user))
    wait_for(lambda: len(logged(cfg)) == 2, "a file of two requests")
    by_age = RequestLog(cfg, flush_rows=1000, flush_interval_s=0.05)
    by_age.record(request("c"))
    wait_for(lambda: len(logged(cfg)) == 3, "a file of an old request")
    by_rows.close()
    by_age.close()
    assert len(files(cfg)) == 2


def test_the_share_is_of_users_and_the_same_in_every_process(cfg):
    some = RequestLog(share(cfg, 0.2))
    users = [f"u{number}" for number in range(5000)]
    wanted = [user for user in users if some.wants(user)]
    some.close()
    # Standard deviation of the share is 0.6 %.
    assert 0.17 < len(wanted) / len(users) < 0.23
    script = (
        "import sys; from limaml.config import Config; from serving.request_log import RequestLog\n"
        "serving = {'log_share': 0.2, 'log_path': sys.argv[1]}\n"
        "cfg = Config.model_validate({'source': {'kind': 'synthetic'}, 'serving': serving})\n"
        "log = RequestLog(cfg); print(*[u for u in (f'u{n}' for n in range(5000)) if log.wants(u)]); log.close()"
    )
    done = subprocess.run([sys.executable, "-c", script, cfg.serving.log_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == wanted


def test_no_share_means_no_user_and_no_thread(cfg):
    before = threading.active_count()
    none = RequestLog(share(cfg, 0.0))
    assert not any(none.wants(f"u{number}") for number in range(100))
    assert threading.active_count() == before
    none.close()
    every = RequestLog(cfg)
    assert all(every.wants(f"u{number}") for number in range(100))
    every.close()


def test_a_writer_that_is_behind_costs_rows_and_no_time(cfg):
    """The writer is held up by a storage that does not return."""
    requests, held = RequestLog(cfg, flush_rows=1, max_queued=3), threading.Event()
    write, started = requests._storage.write_table, threading.Event()

    def hang(path, table):
        started.set()
        assert held.wait(20)
        write(path, table)

    requests._storage.write_table = hang
    requests.record(request("first"))
    assert started.wait(20)
    begun = time.monotonic()
    for number in range(10):
        requests.record(request(f"u{number}"))
    assert time.monotonic() - begun < 1.0
    assert requests.num_dropped == 7
    with capture_logs() as said:
        held.set()
        requests.close()
    assert sorted(row["user_id"] for row in logged(cfg)) == ["first", "u0", "u1", "u2"]
    assert [(one["event"], one["requests"]) for one in said] == [("request_log_dropped", 7)]


def test_a_storage_that_fails_is_said_and_logging_goes_on(cfg, tmp_path):
    blocked = tmp_path / "requests"
    blocked.write_text("a file in the way")
    requests = RequestLog(cfg, flush_rows=1)
    requests.record(request("lost"))
    wait_for(lambda: requests.num_dropped == 1, "the drop")
    blocked.unlink()
    requests.record(request("kept"))
    requests.close()
    assert [row["user_id"] for row in logged(cfg)] == ["kept"]
