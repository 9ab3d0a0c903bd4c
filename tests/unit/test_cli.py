"""The command line as a process: help, exit codes, the result file, configuration errors, and how fast it starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import structlog

from limaml import cli, config
from limaml.errors import ConfigError, DataError, GateError, LimamlError, NothingToDo
from limaml.verb_result import RESULT_LIMIT_BYTES

ROOT = Path(__file__).parents[2]
HELP_LIMIT_S = 0.5
VERBS = [
    "apply", "embed-items", "ingest", "train", "evaluate", "plan-fill", "fill", "cut-over", "adapt", "publish", "rollback",
    "consistency", "drift", "compare-arms", "up", "stop", "status",
    "check", "init", "distil-encoder", "tune-encoder",
]  # fmt: skip


def limaml(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "limaml.cli", *arguments], cwd=ROOT, capture_output=True, text=True)


def run_verb(body: object, path: Path | None, name: str = "train", **spoken: bool) -> int:
    return cli._run(name, body, ROOT / "configs" / "movielens.toml", [], path, spoken.get("spoken", False))


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def restored():
    """A verb run here sets what its own process would keep: the handler of SIGTERM, the level of the log."""
    handler, logging = signal.getsignal(signal.SIGTERM), structlog.get_config()
    yield
    signal.signal(signal.SIGTERM, handler)
    structlog.configure(**logging)


def test_help_names_every_verb() -> None:
    done = limaml("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f" {verb} " in done.stdout, verb
    assert "65 data or gate" in " ".join(done.stdout.replace("│", " ").split())


def test_help_starts_fast_because_heavy_packages_are_imported_by_the_verbs() -> None:
    script = """
import sys, time
started = time.process_time()
sys.argv = ["limaml", "--help"]
from limaml import cli
try:
    cli.app()
except SystemExit:
    pass
heavy = {"torch", "ray", "feast", "mlflow", "pandas", "pyarrow", "great_expectations", "numpy"} & set(sys.modules)
print(time.process_time() - started, sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.splitlines()[-1].split(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < HELP_LIMIT_S


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    registered = {command.name: command for command in cli.app.registered_commands}
    assert registered[verb].callback.__doc__
    assert registered[verb].rich_help_panel in (cli.DAG_TASKS, cli.BY_HAND, cli.ARMS, cli.ONE_MACHINE, cli.YOUR_DATA)


def test_a_table_becomes_a_configuration_and_its_faults_are_an_exit_code(tmp_path: Path) -> None:
    rows = [f"u{n % 7},i{n % 5},2026-05-{1 + n // 40:02d} 08:{n % 40:02d},{n % 2}" for n in range(400)]
    table, out, result = tmp_path / "events.csv", tmp_path / "mine.toml", tmp_path / "result.json"
    table.write_text("\n".join(["user,item,at,bought", *rows]))
    done = limaml("init", str(table), "--out", str(out))
    assert done.returncode == 2
    assert "--timezone (guess 'UTC'" in done.stderr
    done = limaml("init", str(table), "--out", str(out), "--timezone", "UTC", "--result", str(result))
    assert (done.returncode, read(result)) == (0, {"verb": "init", "status": "ok", "config": str(out), "features": 0})
    done = limaml("check", "--config", str(out), "--today", "2026-06-01")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Nothing is wrong."), done.stderr
    table.write_text(table.read_text().replace("u3,", f"{'u' * 300},", 1))
    done = limaml("check", "--config", str(out), "--today", "2026-06-01")
    assert done.returncode == 65
    assert "catalogue of users: expect_column_value_lengths_to_be_between(user_id)" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_unknown_key_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = limaml("status", "--set", "meta.inner_stepz=3", "--result", str(result))
    assert done.returncode == 2
    assert "meta.inner_stepz is not a known key (value 3)" in done.stderr
    assert "Traceback" not in done.stderr
    assert read(result)["status"] == "failed"
    assert read(result)["error"] == "ConfigError"
    assert "meta.inner_stepz" in str(read(result)["message"])


def test_a_value_out_of_range_is_a_usage_error_with_the_rule_and_the_value(tmp_path: Path) -> None:
    done = limaml("status", "--set", "meta.inner_steps=51", "--set", f"local.run_root={tmp_path}/run")
    assert done.returncode == 2
    assert "meta.inner_steps: Input should be less than or equal to 50, got 51" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_configuration_is_named() -> None:
    done = limaml("status", "--config", "configs/none.toml")
    assert done.returncode == 2
    assert "configuration configs/none.toml does not exist" in done.stderr


BROKEN = {
    "latin-1.toml": (
        "[source]\nkind = 'parquet'  # caf\xe9\n".encode("latin-1"),
        "must be UTF-8, got byte 0xe9 at position 32",
    ),
    "list.json": (b"[1, 2]", "must hold sections, got a JSON list"),
    "half.json": (b'{"source": {', "is not JSON"),
    "half.toml": (b"[source", "is not TOML"),
    "plain": (b"source: parquet", "is not TOML"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_configuration_that_is_none_is_a_usage_error(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"configuration {tmp_path / name} {message}")):
        config.load(tmp_path / name)


def test_a_folder_as_configuration_is_a_usage_error(tmp_path: Path) -> None:
    done = limaml("status", "--config", str(tmp_path))
    assert done.returncode == 2
    assert f"configuration {tmp_path} must be a file that can be read, but: Is a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "windows.toml").write_text("[source]\r\nkind = 'synthetic'\r\n", encoding="utf-8-sig")
    assert config.load(tmp_path / "windows.toml").source.kind == "synthetic"


@pytest.mark.parametrize("override", ["task_kinds.name=x", "source.kind.x=1", "source", "=1", "a.b"])
def test_an_override_of_what_is_no_key_of_a_section_is_a_usage_error(tmp_path: Path, override: str) -> None:
    (tmp_path / "c.toml").write_text("task_kinds = [{name = 'user'}]\n[source]\nkind = 'synthetic'\n")
    with pytest.raises(ConfigError, match=f"override must .*got {re.escape(repr(override))}"):
        config.load(tmp_path / "c.toml", [override])


def test_secrets_stay_out_of_the_configuration_and_of_its_messages() -> None:
    for setting in ("feast.online_connection=cache:1,password=hunter2", "feast.online_password=hunter2"):
        with pytest.raises(ConfigError, match="environment") as caught:
            config.load(ROOT / "configs" / "movielens.toml", [setting])
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("day", ["2026-02-30", "2026-2-1", "yesterday", "$(touch x)"])
def test_a_day_that_is_none_is_a_usage_error(day: str) -> None:
    done = limaml("adapt", "--day", day)
    assert done.returncode == 2
    assert "--day" in done.stderr


def test_ingest_takes_exactly_one_of_day_and_through() -> None:
    done = limaml("ingest", "--set", "monitoring.textfile_dir=")
    assert done.returncode == 2
    assert "one of --through and --day" in done.stderr


def test_success_leaves_a_small_result(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert run_verb(lambda cfg: {"candidate": "/c"}, path) == 0
    assert read(path) == {"verb": "train", "status": "ok", "candidate": "/c"}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_verb_runs_in_utc_whatever_its_callers_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    assert run_verb(lambda cfg: {"zone": time.localtime(0).tm_zone, "variable": os.environ["TZ"]}, path) == 0
    assert (read(path)["zone"], read(path)["variable"]) == ("UTC", "UTC")


def test_a_result_that_carries_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert run_verb(lambda cfg: {"rows": ["x" * 100] * 50}, path) == 1
    assert "must be at most 4096 bytes" in str(read(path)["message"])


def test_nothing_to_do_is_exit_code_99(tmp_path: Path) -> None:
    def nothing(cfg: object) -> dict[str, object]:
        raise NothingToDo("trained already")

    path = tmp_path / "result.json"
    assert run_verb(nothing, path) == 99
    assert read(path) == {"verb": "train", "status": "unchanged", "reason": "trained already"}
    assert run_verb(nothing, path, "evaluate") == 99
    assert read(path)["status"] == "refused"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("day 2026-01-01 is missing"), 65),
        (LimamlError("the store does not answer"), 1),
        (RuntimeError("unforeseen"), 1),
    ],
)
def test_an_error_is_in_the_result_and_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(cfg: object) -> dict[str, object]:
        raise error

    path = tmp_path / "result.json"
    assert run_verb(fail, path) == code
    assert read(path) == {"verb": "train", "status": "failed", "error": type(error).__name__, "message": str(error)}
    shown = capsys.readouterr()
    assert str(error) in shown.err
    assert ("Traceback" in shown.err) == isinstance(error, RuntimeError)
    assert shown.out == ""


def test_a_failed_gate_names_its_expectations_and_stays_small(tmp_path: Path) -> None:
    def fail(cfg: object) -> dict[str, object]:
        raise GateError("x" * 10_000, [f"expectation_{number}" for number in range(30)])

    path = tmp_path / "result.json"
    assert run_verb(fail, path) == 65
    assert read(path)["failed"] == [f"expectation_{number}" for number in range(30)]
    assert RESULT_LIMIT_BYTES - 20 < path.stat().st_size <= RESULT_LIMIT_BYTES
    assert "x ... (cut; the log has all of it) ... x" in str(read(path)["message"])


@pytest.mark.parametrize("letter", ["订", "x", "\x00", "\U0001f600", '"'])
def test_a_result_is_cut_by_bytes_and_keeps_its_code(tmp_path: Path, letter: str) -> None:
    path = tmp_path / "result.json"

    def refuse(cfg: object) -> dict[str, object]:
        raise GateError(letter * 3000, [f"expect({letter * 40}{number})" for number in range(200)])

    def nothing(cfg: object) -> dict[str, object]:
        raise NothingToDo(letter * 9000)

    for body, code, key in ((refuse, 65, "message"), (nothing, 99, "reason")):
        assert run_verb(body, path) == code
        assert path.stat().st_size <= RESULT_LIMIT_BYTES
        assert str(read(path)[key]).startswith(letter * 70)
    assert run_verb(refuse, path) == 65
    assert list(read(path)["failed"])[-1] == "... (cut; the log has all of it) ..."


def test_without_a_result_path_the_result_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    run_verb(lambda cfg: {"version": "3"}, None)
    assert json.loads(capsys.readouterr().out) == {"verb": "train", "status": "ok", "version": "3"}
    run_verb(lambda cfg: {"version": "3"}, None, spoken=True)
    assert capsys.readouterr().out == ""


def test_a_verb_of_the_dags_leaves_its_metrics(tmp_path: Path) -> None:
    done = limaml("ingest", "--set", f"monitoring.textfile_dir={tmp_path}")
    assert done.returncode == 2
    shown = (tmp_path / "limaml_ingest.prom").read_text()
    assert 'limaml_verb_finished_timestamp_seconds{status="failed",verb="ingest"}' in shown
    assert 'limaml_verb_duration_seconds{verb="ingest"}' in shown


def test_sigterm_leaves_through_finally(tmp_path: Path) -> None:
    """A lease is given back in a `finally`; a verb that is told to end must get there."""
    script = """
import pathlib, sys, time
from limaml import cli
def body(cfg):
    try:
        pathlib.Path(sys.argv[1], "started").touch()
        time.sleep(600)
    finally:
        pathlib.Path(sys.argv[1], "given_back").touch()
cli._run("train", body, pathlib.Path("configs/movielens.toml"), [], None, False)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert (tmp_path / "given_back").exists()


def test_a_verb_whose_parent_is_gone_already_does_not_start() -> None:
    environment = {**os.environ, cli.PARENT_VARIABLE: "1999999999"}
    done = subprocess.run(
        [sys.executable, "-m", "limaml.cli", "status"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
