"""Run both fits on Ray Train: the only file that knows Ray (and `ray_compat`, of its start).

Without RAY_ADDRESS a Ray of our own is started on this machine, on loopback, without dashboard, and ended with the run, so that
its ports exist only while training runs. With RAY_ADDRESS that cluster is used and left as it is.

A run is named by what it trains: started again after a crash, it goes on from its last checkpoint; once it is done its folder
is removed. A worker that dies is restarted from there too, `training.max_failures` times.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from limaml import telemetry
from limaml.allocator import keep_freed_memory
from limaml.config import Config
from limaml.errors import LimamlError, TrainingError
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.training.checkpoint import TrainState, load_state, save_state
from limaml.training.ray_compat import patient_start

# <temp>/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store; a unix socket's path has at most 107 bytes.
_SOCKET_SUFFIX_BYTES = len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.99")
_MAX_SOCKET_BYTES = 107
_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray's own name for it, in a run's folder."""

_log = telemetry.get_logger(__name__)


def train_on_ray(cfg: Config, through: date, twin: Encoder, refit: Encoder, *, name: str) -> TrainState:
    """Train on the logged rows up to `through` and return the final state; `name` identifies what is trained.

    Raises TrainingError for a loss that is not finite, LimamlError for workers that failed more often than configured: a full
    disk or a lost node may be put right, and the next run goes on from the last checkpoint.
    """
    # Train polls its workers every 2 s otherwise, which every checkpoint and the end would wait for.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    # One process less to start: it watches for cloud nodes about to be reclaimed, which only a named cluster has.
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Relative paths in the configuration are meant from our working directory, not from the run's.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    with _cluster(cfg):
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        storage = cfg.training.storage_path
        storage = storage if "://" in storage else os.path.abspath(storage)
        _forget_unreadable(storage, name)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "config": _with_absolute_paths(cfg).model_dump(mode="json"),
                "through": through.isoformat(),
                "twin_encoder": twin.to_dict(),
                "refit_encoder": refit.to_dict(),
            },
            # How long a worker waits for the others, when they meet and at every step; never less than Ray's own half an hour.
            torch_config=TorchConfig(timeout_s=max(1800, cfg.training.ray_start_timeout_s)),
            scaling_config=ray.train.ScalingConfig(num_workers=cfg.training.num_workers, use_gpu=cfg.training.use_gpu),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=storage,
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


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    """What runs on every worker. A TrainingError is returned, not raised: trying again would end the same way."""
    import ray.train
    import ray.train.torch
    import torch

    from limaml.training.loop import train_twin_and_refit
    from limaml.training.prepare import load_training_data
    from limaml.training.step import Workers

    telemetry.configure()
    keep_freed_memory()
    cfg = Config.model_validate(job["config"])
    workers = Workers.current()
    encoders = [Encoder.from_dict(job[name]) for name in ("twin_encoder", "refit_encoder")]
    data = load_training_data(cfg, date.fromisoformat(job["through"]), *encoders)
    device = ray.train.torch.get_device() if cfg.training.use_gpu else torch.device("cpu")
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

    try:
        train_twin_and_refit(cfg, data, workers, device, resume=resume, save=save)
    except TrainingError as error:
        return {"error": str(error)}
    return outcome


def start_limits(limit_s: int) -> dict[str, str]:
    """The environment in which Ray's own limits on a start are `limit_s`; behind each stands what it is by default."""
    return {
        # Finding the control store (GCS) and the node: the driver, the agents and the workers.
        "RAY_gcs_server_port_wait_time_s": f"{limit_s}",  # 30 s
        "RAY_gcs_server_request_timeout_seconds": f"{limit_s}",  # 60 s
        "RAY_gcs_rpc_server_connect_timeout_s": f"{limit_s}",  # 5 s
        "RAY_py_gcs_connect_timeout_s": f"{limit_s}",  # 30 s
        "RAY_raylet_client_num_connect_attempts": f"{limit_s}",  # 10, a second each
        # The raylet, for the agent that prepares a worker's environment and for the worker.
        "RAY_agent_register_timeout_ms": f"{limit_s * 1000}",  # 30 s
        "RAY_worker_register_timeout_seconds": f"{limit_s}",  # 60 s
        # Train, for the workers' places.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{limit_s}",  # 60 s
        # Signs of life, asked for beyond the start and never given less than by default: of the raylet, where the fifth failure
        # in a row counts, and of Train's workers.
        "RAY_health_check_timeout_ms": f"{max(10, limit_s // 5) * 1000}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{max(600, limit_s)}",
    }


@contextlib.contextmanager
def _cluster(cfg: Config) -> Iterator[None]:
    """Connect to RAY_ADDRESS, or start a Ray for the time of the block."""
    # Read where ray is imported, and by the processes that it starts.
    os.environ.update(start_limits(cfg.training.ray_start_timeout_s))
    if os.environ.get("RAY_ADDRESS"):
        import ray

        ray.init(logging_level="warning")
        try:
            yield
        finally:
            ray.shutdown()
        return
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
    root = cfg.storage.root
    if "://" in root:
        return cfg
    return cfg.model_copy(update={"storage": cfg.storage.model_copy(update={"root": os.path.abspath(root)})})


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
