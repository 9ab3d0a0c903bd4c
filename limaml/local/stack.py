"""The stack of `make run`: Airflow, MLflow's UI and the service as processes on 127.0.0.1, all state under one folder.

Its record, `stack.json`, is written before the first process and after every one, so that `make stop` ends exactly what was
started, whatever happened in between.
"""

import json
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import psutil

from limaml.config import Config, LocalConfig
from limaml.config.secret import revealed_url
from limaml.errors import ConfigError, LimamlError
from limaml.io import atomic
from limaml.io.locks import held_file
from limaml.local import processes
from limaml.local.environment import process_environment
from limaml.local.processes import Recorded

HOST = "127.0.0.1"
POLL_S = 0.2
_OWNER_ONLY = 0o600
ANSWER_TIMEOUT_S = 30.0
"""A loaded machine answers late; asking again instead would only add to its load."""
BUSY_SHARE = 0.01
"""Of a core. Measured on a machine slowed to a twentieth: a start writes nothing for 100 s while it imports, and uses 2.4 % and
more; what only waits uses 0.1 %, and the service, asked five times a second whether it is ready, 0.7 %."""


@dataclass
class Stack:
    """What runs, and where: `urls` by name, `processes` in the order of their start."""

    root: Path
    stack_id: str
    urls: dict[str, str]
    processes: list[Recorded] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def password(self) -> str:
        """Of Airflow's user `admin`."""
        value: str = json.loads((self.root / "airflow" / "passwords.json").read_text())["admin"]
        return value

    def start(self, name: str, argv: list[str], **environment: str) -> Recorded:
        """Start a process; `environment` is for it alone."""
        log = self.root / "logs" / f"{name}.log"
        recorded = processes.start(name, argv, environment=self.environment | environment, log=log)
        self.processes.append(recorded)
        self.save()
        return recorded

    def running(self, name: str) -> bool:
        return any(one.name == name and processes.is_alive(one) for one in self.processes)

    def newest(self, name: str) -> Recorded:
        """The last process started under this name."""
        return next(one for one in reversed(self.processes) if one.name == name)

    def whole(self) -> bool:
        return all(processes.is_alive(one) for one in self.processes)

    def check_alive(self) -> None:
        """Raises LimamlError with the end of its log if a process of the stack has ended."""
        for one in self.processes:
            if not processes.is_alive(one):
                raise LimamlError(f"{one.name} (pid {one.pid}) has ended; the end of {one.log}:\n{processes.tail(one.log)}")

    def save(self) -> None:
        state = {"stack_id": self.stack_id, "urls": self.urls, "processes": [one.to_dict() for one in self.processes]}
        atomic.write(self.root / "stack.json", json.dumps(state, indent=1), mode=_OWNER_ONLY)


def load_stack(cfg: Config, config_path: Path) -> Stack | None:
    """The recorded stack, if there is one and any of its processes still runs."""
    root = Path(cfg.local.run_root).absolute()
    try:
        state = json.loads((root / "stack.json").read_text())
    except FileNotFoundError:
        return None
    stack = Stack(root, state["stack_id"], state["urls"], [Recorded(**one) for one in state["processes"]])
    if not any(processes.is_alive(one) for one in stack.processes):
        return None
    stack.environment = process_environment(cfg, config_path, root, stack.stack_id)
    return stack


def new_stack(cfg: Config, config_path: Path) -> Stack:
    """A stack with folders, secrets and free ports, nothing started yet. Raises LimamlError if a port is taken."""
    root = Path(cfg.local.run_root).absolute()
    _require_own_mlflow(cfg)
    ports = {
        "airflow": ("Airflow", "local.airflow_port", cfg.local.airflow_port),
        "mlflow": ("MLflow", "local.mlflow_port", cfg.local.mlflow_port),
        "service": ("the service", "serving.port", cfg.serving.port),
    }
    if not starts_mlflow(cfg):
        del ports["mlflow"]
    taken = {name: (setting, port) for name, setting, port in ports.values()}
    require_free_ports(taken | _dashboard_ports(cfg.local))
    for folder in ("home", "airflow", "mlflow", "bentoml", "logs", "feast"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    secret_file(root / "airflow" / "jwt_secret", lambda: secrets.token_hex(64))
    secret_file(root / "airflow" / "passwords.json", lambda: json.dumps({"admin": secrets.token_urlsafe(12)}))
    urls = {"mlflow": cfg.registry.tracking_uri} | {name: f"http://{HOST}:{port}" for name, (_, _, port) in ports.items()}
    stack = Stack(root, secrets.token_hex(8), urls)
    stack.environment = process_environment(cfg, config_path, root, stack.stack_id)
    stack.save()
    return stack


def stop(cfg: Config) -> int:
    """End everything the recorded stack started; returns the number of processes ended."""
    root = Path(cfg.local.run_root).absolute()
    path = root / "stack.json"
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return 0
    count = processes.end([Recorded(**one) for one in reversed(state["processes"])], state["stack_id"])
    path.unlink()
    return count


@contextmanager
def exclusive(cfg: Config) -> Iterator[None]:
    """One `make run` at a time in a run folder. Raises BusyError."""
    root = Path(cfg.local.run_root).absolute()
    with held_file(root / "run.lock", 0, f"another `make run` is at work in {root}; wait for it or end it"):
        yield


def require_free_ports(ports: dict[str, tuple[str, int]]) -> None:
    """Raises LimamlError naming every port that is taken, by whom, and the setting that moves it."""
    taken = [
        f"port {port} (for {name}) is taken by {_owner(port)}; end that, or choose another with --set {setting}=PORT"
        for name, (setting, port) in ports.items()
        if not _is_free(port)
    ]
    if taken:
        raise LimamlError("nothing was started: " + "; ".join(taken))


def _dashboard_ports(cfg: LocalConfig) -> dict[str, tuple[str, int]]:
    if not cfg.prometheus_port:
        return {}
    return {
        "Prometheus": ("local.prometheus_port", cfg.prometheus_port),
        "the node exporter": ("local.exporter_port", cfg.exporter_port),
    }


class _Silence:
    """How long a process has given no sign of life: its log has not grown, and it has used less than `BUSY_SHARE` of a core."""

    def __init__(self, watched: Recorded, limit_s: float) -> None:
        self._watched = watched
        self._busy_s = BUSY_SHARE * limit_s
        self._log_bytes, self._processor_s = processes.activity(watched)
        self._since = monotonic()

    def seconds(self) -> float:
        log_bytes, processor_s = processes.activity(self._watched)
        # Processor time falls where an ended child was nobody's to count: then something happened as well.
        if log_bytes != self._log_bytes or abs(processor_s - self._processor_s) > self._busy_s:
            self._log_bytes, self._processor_s = log_bytes, processor_s
            self._since = monotonic()
        return monotonic() - self._since


def wait_until(ready: Callable[[], bool], what: str, stack: Stack, name: str, limits: LocalConfig) -> None:
    """Poll until `ready`, which is the process `name`'s to bring about, for as long as that gives signs of life.

    Only its own log counts: another's heartbeats must not keep a hanging process waited for. Raises LimamlError with the end
    of its log when it is silent for `ready_timeout_s`, is not ready within `start_timeout_s`, or any process of the stack ends.
    """
    watched = stack.newest(name)
    started, silence = monotonic(), _Silence(watched, limits.ready_timeout_s)
    while not ready():
        stack.check_alive()
        waited_s, silent_s = monotonic() - started, silence.seconds()
        if silent_s > limits.ready_timeout_s or waited_s > limits.start_timeout_s:
            raise LimamlError(_given_up(what, watched, waited_s, silent_s, limits))
        sleep(POLL_S)


def _given_up(what: str, watched: Recorded, waited_s: float, silent_s: float, limits: LocalConfig) -> str:
    if silent_s > limits.ready_timeout_s:
        setting, rule = "ready_timeout_s", "be ready, write to its log or work within"
    else:
        setting, rule = "start_timeout_s", "be ready within"
    return (
        f"{what} must {rule} local.{setting} ({getattr(limits, setting):g} s), got {waited_s:.1f} s of waiting, the last "
        f"{silent_s:.1f} s without a sign of life of {watched.name} (pid {watched.pid}); where the machine is only slow, raise "
        f"it with --set local.{setting}=SECONDS; the end of {watched.log}:\n{processes.tail(watched.log)}"
    )


def answers(url: str) -> bool:
    """Whether `url` answers 200."""
    try:
        return httpx.get(url, timeout=ANSWER_TIMEOUT_S, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def start_airflow(stack: Stack) -> None:
    """Create or migrate Airflow's database, then start its three components (not waited for)."""
    airflow = [sys.executable, "-m", "airflow"]
    log = stack.root / "logs" / "airflow-db.log"
    migrate = processes.start("airflow-db", [*airflow, "db", "migrate"], environment=stack.environment, log=log)
    code = psutil.Process(migrate.pid).wait()
    if code != 0:
        raise LimamlError(f"airflow db migrate ended with {code}; the end of {log}:\n{processes.tail(log)}")
    stack.start("airflow-api-server", [*airflow, "api-server"])
    # Its log server would listen on every address; the api-server reads the files itself.
    stack.start("airflow-scheduler", [*airflow, "scheduler", "--skip-serve-logs"])
    stack.start("airflow-dag-processor", [*airflow, "dag-processor"])


def is_server(cfg: Config) -> bool:
    """Whether the registry is an MLflow server, not its database."""
    return cfg.registry.tracking_uri.startswith(("http://", "https://"))


def starts_mlflow(cfg: Config) -> bool:
    """Whether MLflow is ours to start."""
    return bool(cfg.local.mlflow_database) or not is_server(cfg)


def start_mlflow(stack: Stack, cfg: Config) -> None:
    """MLflow's UI on the registry's own database, or the registry's server (not waited for)."""
    key, url = "local.mlflow_database", cfg.local.mlflow_database
    if not is_server(cfg):
        key, url = "registry.tracking_uri", cfg.registry.tracking_uri
    arguments = {
        "--default-artifact-root": cfg.registry.artifact_root,
        "--host": HOST,
        "--port": str(cfg.local.mlflow_port),
        "--workers": "1",
    }
    command = [sys.executable, "-m", "mlflow", "server", *(part for pair in arguments.items() for part in pair)]
    # Everybody on the machine can read a process's arguments.
    stack.start("mlflow", command, MLFLOW_BACKEND_STORE_URI=revealed_url(url, key))


def start_service(stack: Stack) -> None:
    """The BentoML service (not waited for)."""
    stack.start("service", [sys.executable, "-m", "serving.run", "--config", stack.environment["LIMAML_CONFIG"]])


def _require_own_mlflow(cfg: Config) -> None:
    """Raises ConfigError where an MLflow that is started here would not be the registry."""
    if not cfg.local.mlflow_database:
        return
    wanted = f"http://{HOST}:{cfg.local.mlflow_port}"
    if cfg.registry.tracking_uri.rstrip("/") != wanted:
        raise ConfigError(
            f"registry.tracking_uri must be {wanted}, the MLflow that is started on local.mlflow_database, got "
            f"{cfg.registry.tracking_uri.split('@')[-1]}; set it, or leave local.mlflow_database empty"
        )


def secret_file(path: Path, make: Callable[[], str]) -> str:
    """The secret in `path`, made on first use, readable by its owner only."""
    if not path.exists():
        atomic.write(path, make(), mode=_OWNER_ONLY)
    return path.read_text()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _owner(port: int) -> str:
    listeners: list[Any] = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    pids = {c.pid for c in listeners if c.pid}
    if not pids:
        return "a process of another user"
    return ", ".join(f"{psutil.Process(pid).name()} (pid {pid})" for pid in sorted(pids))
