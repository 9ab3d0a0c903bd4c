"""Run both fits on Ray Train: the only file that knows it.

Without an address (`limaml.io.cluster`) a Ray of our own is started on this machine, on loopback, without dashboard, and ended
with the run, so that its ports exist only while training runs. A cluster that is there is used and left as it is.

A run is named by what it trains: started again after a crash, it goes on from its last checkpoint; once it is done its folder
is removed. A worker that dies is restarted from there too, `training.max_failures` times.
"""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from limaml import telemetry
from limaml.allocator import keep_freed_memory
from limaml.config import Config
from limaml.errors import LimamlError, TrainingError
from limaml.features.encoder import Encoder
from limaml.io import cluster
from limaml.io.ray_compat import forget, patient_start, start_limits, tell, told
from limaml.io.storage import Storage, absolute
from limaml.training.checkpoint import TrainState, load_state, save_state

# <temp>/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store; a unix socket's path has at most 107 bytes.
_SOCKET_SUFFIX_BYTES = len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.99")
_MAX_SOCKET_BYTES = 107
_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray's own name for it, in a run's folder."""

_LISTEN_S = 1.0

_log = telemetry.get_logger(__name__)


def train_on_ray(
    cfg: Config, through: date, twin: Encoder, refit: Encoder, *, name: str, champion: str | None = None
) -> TrainState:
    """Train on the logged rows up to `through` and return the final state; `name` identifies what is trained, and `champion` is
    the folder or URL of the bundle that it starts from.

    Raises TrainingError for a loss that is not finite, LimamlError for workers that failed more often than configured: a full
    disk or a lost node may be put right, and the next run goes on from the last checkpoint.
    """
    # Train polls its workers every 2 s otherwise, which every checkpoint and the end would wait for.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    # One process less to start: it watches for cloud nodes about to be reclaimed, which only a named cluster has.
    if not cluster.address(cfg):
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Relative paths in the configuration are meant from our working directory, not from the run's.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    cfg = _with_absolute_paths(cfg)
    job = {
        "config": cfg.model_dump(mode="json"),
        "through": through.isoformat(),
        "twin_encoder": twin.to_dict(),
        "refit_encoder": refit.to_dict(),
        "name": name,
        "champion": champion and absolute(champion),
    }
    with _cluster(cfg), _heard(name):
        return cluster.call_inside(_fit, cfg, job, name)


def _fit(cfg: Config, job: dict[str, Any], name: str) -> TrainState:
    """Run the workers, on the Ray that this process is connected to, and return the state of their last checkpoint."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    _forget_unreadable(cfg.training.storage_path, name)
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job,
        # How long a worker waits for the others, when they meet and at every step; never less than Ray's own half an hour.
        torch_config=TorchConfig(timeout_s=max(1800, cfg.training.ray_start_timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=_num_workers(cfg),
            use_gpu=cfg.training.use_gpu,
            elastic_resize_monitor_interval_s=cfg.ray.resize_interval_s,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=cfg.training.storage_path,
            failure_config=ray.train.FailureConfig(max_failures=cfg.training.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise LimamlError(f"training run {name} failed {cfg.training.max_failures + 1} times: {error}") from error
    outcome = result.return_value or {}
    if "error" in outcome:
        raise TrainingError(outcome["error"])
    if "resumed" in outcome:
        _log.info("training_resumed", run=name, resumed=outcome["resumed"])
    with result.checkpoint.as_directory() as folder:
        state = load_state(folder)
    _remove_run(result)
    return state


def _num_workers(cfg: Config) -> int | tuple[int, int]:
    """Fixed, or from as few to as many as there is room for; a Ray of our own has room for all."""
    fixed = not cfg.ray.min_workers or not cluster.address(cfg)
    return cfg.training.num_workers if fixed else (cfg.ray.min_workers, cfg.training.num_workers)


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    """What runs on every worker. A TrainingError is returned, not raised: trying again would end the same way."""
    import ray.train
    import ray.train.torch
    import torch

    from limaml.training.champion import read_champion
    from limaml.training.prepare import load_training_data
    from limaml.training.step import Workers
    from limaml.training.twin_and_refit import train_twin_and_refit

    telemetry.configure()
    keep_freed_memory()
    cfg = Config.model_validate(job["config"])
    workers = Workers.current()
    encoders = [Encoder.from_dict(job[name]) for name in ("twin_encoder", "refit_encoder")]
    data = load_training_data(cfg, date.fromisoformat(job["through"]), *encoders)
    device = ray.train.torch.get_device() if cfg.training.use_gpu else torch.device("cpu")
    champion = read_champion(job["champion"]) if job["champion"] else None
    resume, outcome = None, {}
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            resume = load_state(folder)
        outcome = {"resumed": f"{resume.phase} step {resume.progress.step}"}

    def save(state: TrainState) -> None:
        metrics = {"step": state.progress.step, "phase": state.phase}
        if workers.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_state(state, folder)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def say(how_far: dict[str, Any]) -> None:
        if workers.rank == 0:
            tell(job["name"], json.dumps(how_far).encode())

    try:
        train_twin_and_refit(cfg, data, workers, device, resume=resume, save=save, say=say, champion=champion)
    except TrainingError as error:
        return {"error": str(error)}
    return outcome


@contextlib.contextmanager
def _heard(name: str) -> Iterator[None]:
    """In the block, what the run's first worker says of itself is logged here, where Airflow shows it."""
    ended, last = threading.Event(), None

    def listen() -> None:
        nonlocal last
        # Once more after the end, for the last words.
        for is_over in iter(lambda: ended.wait(_LISTEN_S), None):
            if (words := told(name)) not in (None, last):
                last = words
                _log.info("training", **json.loads(words or b"{}"))
            if is_over:
                return

    forget(name)  # The words of an earlier try, on a cluster that stays.
    listener = threading.Thread(target=listen, name="training-progress", daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        listener.join()


@contextlib.contextmanager
def _cluster(cfg: Config) -> Iterator[None]:
    """Connect to the cluster that is there, or start a Ray for the time of the block."""
    if cluster.address(cfg):
        with cluster.connected(cfg):
            yield
        return
    # Read where ray is imported, and by the processes that it starts.
    os.environ.update(start_limits(cfg.training.ray_start_timeout_s))
    # Read when ray is imported: the node's address is loopback and not the one that faces the network.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Token authentication with a token that lives in this run's environment alone; by default it is kept in ~/.ray.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    with _temporary_folder(Path(cfg.local.run_root).absolute() / "ray") as folder:
        num_gpus = cfg.training.num_workers if cfg.training.use_gpu else 0
        with patient_start(cfg.training.ray_start_timeout_s):
            context = ray.init(
                num_cpus=max(cfg.training.num_workers, 1),
                num_gpus=num_gpus,
                include_dashboard=False,
                logging_level="warning",
                # Without the dashboard one of Train's helpers complains every second; errors reach us as exceptions.
                log_to_driver=False,
                # Weights and metrics are all that passes through it.
                object_store_memory=128 * 1024 * 1024,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
            )
        try:
            yield
        finally:
            ray.shutdown()
        # Logs of a run that failed are left to be read.
        shutil.rmtree(context.address_info["session_dir"], ignore_errors=True)


@contextlib.contextmanager
def _temporary_folder(wanted: Path) -> Iterator[Path]:
    """`wanted`, or a private folder under the system's own where sockets below `wanted` would have too long a path."""
    if len(os.fsencode(wanted)) + _SOCKET_SUFFIX_BYTES <= _MAX_SOCKET_BYTES:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted
        return
    folder = Path(tempfile.mkdtemp(prefix="limaml-ray-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_absolute_paths(cfg: Config) -> Config:
    storage = cfg.storage.model_copy(update={"root": absolute(cfg.storage.root)})
    training = cfg.training.model_copy(update={"storage_path": absolute(cfg.training.storage_path)})
    return cfg.model_copy(update={"storage": storage, "training": training})


def _forget_unreadable(storage: str, name: str) -> None:
    """Let a run start afresh whose list of checkpoints cannot be read.

    Ray writes it in place (Ray 2.60): a full disk leaves half of it, on which every later run of this name would end.
    """
    runs, path = Storage(storage), f"{name}/{_CHECKPOINT_LIST}"
    try:
        if runs.exists(path):
            runs.read_json(path)
    except ValueError as error:
        _log.warning("checkpoints_forgotten", run=name, path=runs.path(path), error=str(error))
        runs.delete_dir(name)


def _remove_run(result: Any) -> None:
    """Delete the run's folder: a later run of this name starts afresh."""
    result.filesystem.delete_dir(result.path)
