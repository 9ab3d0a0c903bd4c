"""One real Ray run: two workers, both fits, a candidate on disk, its curves in MLflow."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, date, timedelta
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from structlog.testing import capture_logs

from limaml import schema
from limaml.errors import DataError, LimamlError, NothingToDo, TrainingError
from limaml.events.logged import write_logged
from limaml.io.storage import Storage
from limaml.models import bundle as bundles
from limaml.registry import FINGERPRINT, Registry
from limaml.tasks.splits import split_events
from limaml.training import ray_entry
from limaml.training.candidate import fingerprint, fit_candidate, read_candidate, read_training_history
from limaml.training.prepare import fit_encoders, load_training_data, read_history
from limaml.training.step import Workers
from limaml.training.twin_and_refit import train_twin_and_refit

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """One MLflow database for the module: creating its tables takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    return {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_root": str(folder / "artifacts")}


@pytest.fixture
def workplace(planted_logged, small_config, tracking, tmp_path):
    """Logged rows in a storage, and the configuration that reads them; returns (cfg, through)."""
    cfg = small_config(
        storage={"root": str(tmp_path / "data")},
        model={"dropout": 0.0},
        training={"num_workers": 2, "max_steps": 10, "storage_path": str(tmp_path / "results")},
        registry={**tracking, "experiment": tmp_path.name, "model_name": tmp_path.name},
        local={"run_root": str(tmp_path / "run")},
    )
    storage = Storage(cfg.storage.root)
    first, last = (value.as_py().astimezone(UTC).date() for value in pc.min_max(planted_logged["timestamp"]).values())
    for number in range((last - first).days + 1):
        day = first + timedelta(days=number)
        after = pc.greater_equal(planted_logged["timestamp"], schema.day_start(day))
        write_logged(
            storage, day, planted_logged.filter(pc.and_(after, pc.less(planted_logged["timestamp"], schema.day_end(day)))), 1
        )
    return cfg, last


def listening_ports() -> set[str]:
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    inodes = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()}
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


# Ray's own, while it imports its data package and starts its workers.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
@pytest.mark.slow
def test_two_ray_workers_leave_a_candidate_equal_to_one_process(workplace, tmp_path, monkeypatch):
    cfg, through = workplace
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    before = listening_ports()
    with capture_logs() as lines:
        result = fit_candidate(cfg, through)
    # The worker's own words, in the log of who waits; a step is quick here, so some are not seen.
    heard = [line for line in lines if line["event"] == "training"]
    assert heard[-1].keys() >= {"phase", "step", "of", "train_loss", "tasks_per_s", "left_s"}
    assert (heard[-1]["phase"], heard[-1]["step"], heard[-1]["left_s"]) == ("refit", heard[-1]["of"], 0)
    folder = Path(result["candidate"])

    assert listening_ports() == before
    assert not (tmp_path / "home" / ".ray").exists()
    assert list((tmp_path / "results").iterdir()) == []
    assert not list((tmp_path / "run" / "ray").glob("session_2*"))

    bundle = bundles.load(folder / "bundle")
    assert bundle.lineage["through"] == through.isoformat()
    assert bundle.lineage["fingerprint"] == fingerprint(cfg, through) == result["fingerprint"]
    logged = read_history(cfg, through)
    split = split_events(logged, cfg.evaluation)
    data = load_training_data(cfg, through, *fit_encoders(cfg, logged, split))
    alone = train_twin_and_refit(cfg, data, Workers(), torch.device("cpu"), resume=None, save=lambda state: None)
    assert read_candidate(folder).best_step == alone.twin_progress.best_step
    for weights, network in ((alone.twin, bundle.twin.network), (alone.network, bundle.refit.network)):
        for name, value in network.state_dict().items():
            # float32 sums over two workers in another order, carried through ten AdamW steps.
            torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-3)

    history = read_training_history(folder)
    assert [entry["step"] for entry in history["twin"]] == [5, 10]
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=cfg.registry.tracking_uri)
    metrics = client.get_run(result["run_id"]).data.metrics
    assert {"twin_train_loss", "twin_validation_auc", "twin_tasks_per_s", "refit_train_loss"} <= metrics.keys()

    # The same again: nothing is trained while the candidate waits for its judgement, nor once it serves.
    def no_training(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("limaml.training.candidate.train_on_ray", no_training)
    assert fit_candidate(cfg, through) == result
    registry = Registry(cfg.registry)
    registry.set_champion(registry.register(folder / "bundle", result["run_id"], {FINGERPRINT: result["fingerprint"]}))
    with pytest.raises(NothingToDo, match="champion version 1 was trained on the same data, configuration and code"):
        fit_candidate(cfg, through)
    assert fingerprint(cfg, through - timedelta(days=1)) != result["fingerprint"]


# Read by every interpreter at its start: those whose command line holds one of the words start late.
LATE = """
import pathlib, time
words = pathlib.Path("/proc/self/cmdline").read_text()
if any(word in words for word in {words!r}):
    end = time.monotonic() + {seconds}
    while time.monotonic() < end: time.sleep(0.1)
"""
AGENTS = ("dashboard/agent.py", "runtime_env/agent/main.py")
AGENTS_LATE_BY_S = 35
"""Ray's raylet waits 15 s for the port of an agent, and 30 s for a worker's environment from it."""
START_RAY = """
import json, sys
from limaml.config import load
from limaml.training import ray_entry

cfg = load("configs/synthetic.toml", [f"local.run_root={sys.argv[1]}", f"training.ray_start_timeout_s={sys.argv[2]}"])
with ray_entry._cluster(cfg):
    import ray

    @ray.remote
    def environment():
        import os

        return os.environ["WORD"]

    print(json.dumps(ray.get(environment.options(runtime_env={"env_vars": {"WORD": "here"}}).remote())))
"""
RESOLVE = """
import json, os
from limaml.io.ray_compat import start_limits

os.environ.update(start_limits(777))
from ray._private import ray_constants
from ray._raylet import Config

print(json.dumps({
    "request_s": ray_constants.GCS_SERVER_REQUEST_TIMEOUT_SECONDS,
    "connect_s": Config.py_gcs_connect_timeout_s(),
    "raylet_tries": Config.raylet_client_num_connect_attempts(),
    "worker_s": Config.worker_register_timeout_seconds(),
    "health_ms": Config.health_check_timeout_ms(),
    "health_failures": Config.health_check_failure_threshold(),
}))
"""


def fresh_python(program, *arguments, path=(), **environment):
    """What a new interpreter printed on its last line, as JSON; `path` goes before the repository's root."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), **environment}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LimamlError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def test_ray_resolves_the_start_limit():
    assert fresh_python(RESOLVE) == {
        "request_s": 777,
        "connect_s": 777,
        "raylet_tries": 777,
        "worker_s": 777,
        "health_ms": 155_000,
        "health_failures": 5,
    }


def test_the_start_limit_is_not_part_of_what_is_trained(small_config, tmp_path):
    first, second, other = (
        small_config(storage={"root": str(tmp_path)}, training=training)
        for training in ({}, {"ray_start_timeout_s": 3600}, {"seed": 1})
    )
    day = date(2026, 1, 31)
    assert fingerprint(first, day) == fingerprint(second, day) != fingerprint(other, day)


@pytest.mark.slow
@pytest.mark.fault("a machine so loaded that Ray's agents start later than Ray waits", after="Ray starts all the same")
def test_ray_starts_although_its_agents_are_later_than_its_own_limits(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LATE.format(words=AGENTS, seconds=AGENTS_LATE_BY_S))
    started = time.monotonic()
    assert fresh_python(START_RAY, tmp_path / "run", 300, path=[tmp_path], HOME=str(tmp_path)) == "here"
    assert time.monotonic() - started > AGENTS_LATE_BY_S


@pytest.mark.slow
@pytest.mark.fault("a raylet that dies while it starts", after="the training fails in time and says why")
def test_a_raylet_that_ends_is_not_waited_for(tmp_path):
    broken = "from ray._private import services\nservices.RAYLET_EXECUTABLE = '/bin/false'\n"
    # What the start sets itself comes too late here: Ray is imported before it.
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    started = time.monotonic()
    with pytest.raises(LimamlError, match=r"LimamlError: Ray's raylet ended with 1 before it was ready; the start of /"):
        fresh_python(broken + START_RAY, tmp_path / "run", 300, HOME=str(tmp_path), **secret)
    # The longest that one look for it takes, by Ray's own limit, is 30 s.
    assert time.monotonic() - started < 150


def test_a_long_path_gets_a_private_folder_that_is_removed(tmp_path):
    with ray_entry._temporary_folder(tmp_path / ("x" * 60)) as folder:
        assert len(os.fsencode(folder)) + ray_entry._SOCKET_SUFFIX_BYTES <= 107
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "session").mkdir()
        # The bound is the kernel's: a socket at the longest path Ray makes can be bound.
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{folder}/session/".ljust(107, "s"))
    assert not folder.exists()


def test_a_short_path_is_used_as_it_is():
    with ray_entry._temporary_folder(Path("/tmp/limaml-test-ray")) as folder:
        assert folder == Path("/tmp/limaml-test-ray")
    folder.rmdir()


def test_no_rows_and_no_candidate_say_what_to_do(workplace, tmp_path):
    cfg, through = workplace
    with pytest.raises(DataError, match=r"needs logged rows, there are none in .* ingest first"):
        fit_candidate(cfg, through - timedelta(days=365))
    with pytest.raises(DataError, match=r"must hold candidate.json, .* run `limaml train` again"):
        read_candidate(tmp_path)


def test_a_training_error_ends_the_run_as_failed(workplace, monkeypatch):
    cfg, through = workplace

    def broken(*args, **kwargs):
        raise TrainingError("outer loss must stay finite")

    monkeypatch.setattr("limaml.training.candidate.train_on_ray", broken)
    with pytest.raises(TrainingError, match="finite"):
        fit_candidate(cfg, through)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=cfg.registry.tracking_uri)
    experiment = client.get_experiment_by_name(cfg.registry.experiment)
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED"]
