"""A training worker and the node it runs on are killed, and the disk of the checkpoints is full: training goes on from its last
checkpoint, and the candidate has the weights of an undisturbed run.

Real Ray, two workers. What befalls a worker is in a module that every interpreter imports at its start.
"""

import json
import os
from collections.abc import Iterator
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from limaml import schema
from limaml.config import Config
from limaml.events.logged import write_logged
from limaml.io.storage import Storage
from tests import declared
from tests.faults.process import DEADLINE_S, Verb
from tests.faults.test_disk_full import Disk, small_disk
from tests.unit.conftest import make_logged

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
AT_STEP = 7
"""Of the twin, whose checkpoints are of steps 5 and 10."""
WEIGHTS = ("refit.safetensors", "twin.safetensors", "prior.safetensors", "refit.encoder.json", "twin.encoder.json")
SAME = "weights and encoders equal an undisturbed run's, byte for byte"
AT_START = """
import os, pathlib, signal, sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "limaml.training.fit":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def executed(module):
            execute(module)
            step = module.outer_step
            def disturbed(model, optimizer, objective, cfg, number, workers):
                once = pathlib.Path({once!r})
                if number == {step} and workers.rank == 0 and not once.exists():
                    once.touch()
                    {what}
                return step(model, optimizer, objective, cfg, number, workers)
            module.outer_step = disturbed
        spec.loader.exec_module = executed
        return spec

sys.meta_path.insert(0, Finder)
"""
KILL_WORKER = "os.kill(os.getpid(), signal.SIGKILL)"
# The raylet, which started this worker and ends it in turn; a training as small as this one is done sooner.
KILL_NODE = "os.kill(os.getppid(), signal.SIGKILL); signal.pause()"


class Trainings:
    """Verbs `train` on the same rows, each with a run folder and checkpoints of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        logged, storage = make_logged(), Storage(str(root / "data"))
        first, last = (value.as_py().astimezone(UTC).date() for value in pc.min_max(logged["timestamp"]).values())
        for number in range((last - first).days + 1):
            day = first + timedelta(days=number)
            after = pc.greater_equal(logged["timestamp"], schema.day_start(day))
            rows = logged.filter(pc.and_(after, pc.less(logged["timestamp"], schema.day_end(day))))
            write_logged(storage, day, rows, 1)
        self.through = last
        self.weights = self.run("undisturbed").weights()

    def run(self, name: str, what: str = "", checkpoints: Path | None = None) -> "Training":
        folder = self.root / name
        folder.mkdir()
        cfg = Config.model_validate(
            {
                "features": declared.FEATURES,
                "source": {"kind": "synthetic"},
                "storage": {"root": str(self.root / "data")},
                "model": {"embedding_dim": 4, "global_hidden": [16], "dropout": 0.0},
                "meta": {"support_rows": 12, "query_rows": 8},
                "training": {
                    "num_workers": 2,
                    "max_steps": 10,
                    "tasks_per_step": 8,
                    "validate_every": 5,
                    "checkpoint_every": 5,
                    "storage_path": str(checkpoints or folder / "results"),
                },
                "evaluation": {"held_out": "late", "first_k": [0, 2, 5]},
                "promotion": {"protocol": "first_k", "gate_k": 5},
                "registry": {"tracking_uri": f"sqlite:///{self.root}/mlflow.db", "artifact_root": str(self.root / "artifacts")},
                "local": {"run_root": str(folder)},
            }
        )
        (folder / "config.json").write_text(json.dumps(cfg.model_dump(mode="json")))
        if what:
            at_start = AT_START.format(once=str(folder / "happened"), step=AT_STEP, what=what)
            (folder / "at_start").mkdir()
            (folder / "at_start" / "sitecustomize.py").write_text(at_start)
        return Training(folder, self.through)


class Training:
    """`limaml train`, as often as it is asked for."""

    def __init__(self, folder: Path, through: Any) -> None:
        self.folder, self.through = folder, through

    def start(self) -> Verb:
        path = os.pathsep.join([str(self.folder / "at_start"), str(ROOT)])
        arguments = ["train", "--config", str(self.folder / "config.json"), f"--through={self.through}"]
        return Verb(self.folder, arguments, PYTHONPATH=path, HOME=str(self.folder))

    def weights(self) -> dict[str, bytes]:
        """Of the candidate that one more call leaves."""
        bundle = Path(self.start().done()["candidate"]) / "bundle"
        return {name: (bundle / name).read_bytes() for name in WEIGHTS}

    def happened(self) -> bool:
        return (self.folder / "happened").exists()


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


@pytest.mark.fault("kill -9 of a training worker", after=f"the workers are started again, within the same run; {SAME}")
def test_a_worker_is_killed(trainings: Trainings) -> None:
    training = trainings.run("worker", KILL_WORKER)
    weights = training.weights()
    assert training.happened()
    assert weights == trainings.weights


@pytest.mark.fault(
    "kill -9 of the Ray node (raylet) of a training",
    after=f"the run fails in time; the next one goes on from the checkpoint; {SAME}",
)
def test_the_node_is_killed(trainings: Trainings) -> None:
    training = trainings.run("node", KILL_NODE)
    failed = training.start()
    failed.process.join(DEADLINE_S)
    assert failed.process.exitcode not in (0, None), failed.log()
    assert training.happened()
    again = training.start()
    bundle = Path(again.done()["candidate"]) / "bundle"
    assert "training_resumed" in again.log()
    assert {name: (bundle / name).read_bytes() for name in WEIGHTS} == trainings.weights


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from small_disk(tmp_path)


@pytest.mark.fault(
    "disk full while a checkpoint is written",
    after=f"the run fails in time; with room again, the next one goes on, or starts afresh; {SAME}",
)
def test_the_disk_of_the_checkpoints_is_full(trainings: Trainings, disk: Disk) -> None:
    full = f"os.system('cat /dev/zero > {disk.root}/.filler')"
    training = trainings.run("disk", full, checkpoints=disk.root)
    code, result = training.start().ended()
    assert (code, result["status"]) == (1, "failed"), "a retry may cure it"
    assert training.happened()
    disk.empty()
    assert training.weights() == trainings.weights
