"""The result file holds at most 4 KiB whatever a verb has to say, and can be a pod's termination message."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limaml import cli
from limaml.errors import DataError, GateError, LimamlError
from limaml.verb_result import RESULT_LIMIT_BYTES, describe, leave

ROOT = Path(__file__).parents[2]
# The longest names that are usual: 255 bytes of a version are MLflow's limit, an object store's URL with its options.
URL = "s3://a-bucket-with-a-long-name/some/folder/below/it/" + "x" * 120 + "?endpoint_override=s3.example.com:9000&scheme=https"
DAY, INSTANT, VERSION = "2026-01-31", "2026-02-01T00:00:00+00:00", "123456"
STEPS = {"version": VERSION, "days": 366, "as_of": INSTANT, "revision": 99, "corrected": False, "entities": 10**9}
VIEW = dict.fromkeys(("view_of_a_long_name", "rows", "values", "mismatches", "missing", "max_difference"), 0.123456789012345)
COUNTS = dict.fromkeys(("items", "encoded", "without", "changed"), 10**7)
# What a verb of the DAGs leaves, at its largest: 256 shards (embeddings.num_shards), two versions kept up to date, two kinds.
SHAPES = {
    "apply": {"status": "applied", "views": ["online_view_blue"] * 20, "services": ["service"] * 10},
    "embed-items": {"features": dict.fromkeys((f"{n:040d}" for n in range(16)), COUNTS), "first_changed": ["i" * 299] * 5},
    "ingest": {"through": DAY, "days": 10**4, "rows": 10**9, "left_out": ["f" * 300] * 5, "num_left_out": 9, "report": URL},
    "train": {"candidate": URL, "fingerprint": "f" * 64, "run_id": "r" * 32, "through": DAY, "validation_auc": 1 / 3},
    "evaluate": {"version": VERSION, "decision": "passed", "through": DAY, "evaluation": URL, "report": URL},
    "plan-fill": {"version": VERSION, "slot": "green", "as_of_day": DAY, "entities": 10**9, "shards": list(range(256))},
    "fill": {"version": VERSION, "slot": "green", "shard": 255, "entities_per_s": 1e9, "written": 10**9, "paths": [URL] * 2},
    "cut-over": {"status": "unchanged", "version": VERSION, "slot": "green", "complete_through": INSTANT},
    "adapt": {"day": DAY, "versions": [STEPS, {"version": VERSION, "error": "e" * 500}], "paths": [URL] * 4},
    "publish": {"day": DAY, "entities": 10**9, "features_written": 10**9, "versions": [STEPS] * 2},
    "consistency": {"day": DAY, "requests": 10**9, "views": [VIEW] * 12, "path": URL},
    "retain": {"day": DAY, "features": 10**4, "feature_days": 10**7, "folders": 10**6},
    "drift": {"day": DAY, "version": VERSION, "measured": True, "score_psi": 1 / 3, "path": URL},
}
texts = st.text(max_size=20_000) | st.text('\x00"\\é订\U0001f600', max_size=9_000)


def written(path: Path) -> dict[str, object]:
    assert path.stat().st_size <= RESULT_LIMIT_BYTES
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "result.json"


def test_every_verb_of_the_dags_is_among_the_shapes() -> None:
    commands = cli.app.registered_commands
    assert {command.name for command in commands if command.rich_help_panel == cli.DAG_TASKS} == set(SHAPES)


@pytest.mark.parametrize("verb", SHAPES)
def test_the_largest_result_of_a_verb_is_left_uncut(path, verb) -> None:
    value = {"verb": verb, "status": "ok", **SHAPES[verb]}
    leave(path, False, value)
    assert written(path) == value


@given(verb=st.sampled_from(sorted(SHAPES)), message=texts, failed=st.lists(texts, max_size=300))
def test_an_error_of_any_length_keeps_its_name_and_both_ends(path, verb, message, failed) -> None:
    leave(path, False, {"verb": verb, "status": "failed", **describe(GateError(message, failed))})
    found = written(path)
    assert (found["verb"], found["status"], found["error"]) == (verb, "failed", "GateError")
    head, cut, tail = str(found["message"]).partition(" ... (cut; the log has all of it) ... ")
    assert message.startswith(head)
    assert message.endswith(tail)
    assert cut or head == message


@given(reason=texts)
def test_a_reason_of_any_length_fits(path, reason) -> None:
    leave(path, False, {"verb": "evaluate", "status": "refused", "reason": reason})
    written(path)


def test_a_long_message_keeps_the_remedy(path) -> None:
    error = DataError(f"events must be sorted, got {'x' * 9_000}; write the day again")
    leave(path, False, {"verb": "ingest", "status": "failed", **describe(error)})
    message = str(written(path)["message"])
    assert message.startswith("events must be sorted, got x")
    assert message.endswith("x; write the day again")
    assert path.stat().st_size > RESULT_LIMIT_BYTES - 10


def test_a_result_that_carries_data_is_refused_before_it_is_written(path) -> None:
    path.unlink(missing_ok=True)
    with pytest.raises(LimamlError, match=r"result of fill must be at most 4096 bytes, got \d+; pass paths, not data"):
        leave(path, False, {"verb": "fill", "status": "ok", "rows": ["x" * 100] * 50})
    assert not path.exists()


def test_a_file_that_nothing_can_be_renamed_over_is_written_in_place(tmp_path, monkeypatch) -> None:
    path = tmp_path / "termination-log"
    path.write_text("what was there before, and longer than what comes" * 10)
    value = {"verb": "train", "status": "ok"}

    def busy(source, target):
        raise OSError(errno.EBUSY, "Device or resource busy", source, None, target)

    monkeypatch.setattr(os, "replace", busy)
    leave(path, False, value)
    assert written(path) == value
    with pytest.raises(OSError, match="busy"):
        leave(tmp_path / "not-there", False, value)
    assert [file.name for file in tmp_path.iterdir()] == ["termination-log"]


def test_a_full_disk_is_no_reason_to_write_in_place(tmp_path, monkeypatch) -> None:
    (tmp_path / "result.json").write_text("as it was")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", source)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        leave(tmp_path / "result.json", False, {"verb": "train", "status": "ok"})
    assert (tmp_path / "result.json").read_text() == "as it was"


@pytest.mark.services
def test_a_mounted_file_takes_the_result_as_a_termination_log_does(tmp_path) -> None:
    """A real mount, which needs a name space of its own (util-linux's unshare; user name spaces, or root)."""
    (tmp_path / "log").touch()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "termination-log").touch()
    verb = f"exec {sys.executable} -m limaml.cli status --set meta.inner_stepz=3 --result {tmp_path}/dev/termination-log"
    script = f"mount --bind {tmp_path}/log {tmp_path}/dev/termination-log && {verb}"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    found = written(tmp_path / "log")
    assert found["error"] == "ConfigError"
    assert "meta.inner_stepz is not a known key" in str(found["message"])
