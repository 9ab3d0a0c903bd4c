"""Ray 2.60 through its private interface: limits on a start that have no setting, and words from a worker to who waits for it.

The raylet, which runs the node, ends itself where one of its two agents has not written down the port it listens on within 15 s
(`WaitForPersistedPort`, src/ray/util/port_persistence.h). An agent is a Python process that imports for seconds, so on a loaded
machine none is in time. Ports that were chosen before are not waited for.
`ray.init` gives up where the raylet has not registered after 30 s (`Node.__init__`), dead or alive.
"""

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from limaml.errors import LimamlError

_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
# Below the ports that the kernel gives by itself (32768 and up on Linux): no other part of Ray takes one in between.
_PORTS = range(20_000, 32_000)
_LOG_LINES = 5
_NAMESPACE = "limaml"


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


@contextmanager
def patient_start(limit_s: float) -> Iterator[None]:
    """In the block, a Ray that is started has `limit_s` for it.

    `ray.init` raises LimamlError where it took longer, or its raylet ended before.
    """
    from ray._private import services
    from ray._raylet import DASHBOARD_AGENT_LISTEN_PORT_NAME, persist_port  # type: ignore[attr-defined]

    start_raylet, get_node = services.start_raylet, services.get_node
    started: list[Any] = []

    def start_with_ports(*arguments: Any, **named: Any) -> Any:
        node_id, session_dir, ports = arguments[2], arguments[11], _free_ports()
        # The one port that Ray does not hand to the raylet, which reads it here.
        persist_port(session_dir, node_id, DASHBOARD_AGENT_LISTEN_PORT_NAME, ports["dashboard_agent_listen_port"])
        raylet = start_raylet(*arguments, **{**named, **ports})
        started.append((raylet.process, Path(named["raylet_stderr_filepath"])))
        return raylet

    def get_registered_node(*arguments: Any, **named: Any) -> Any:
        deadline = monotonic() + limit_s
        while True:
            try:
                return get_node(*arguments, **named)  # waits by itself, for 30 s
            except RuntimeError as error:
                for process, log in started:
                    if process.poll() is not None:
                        raise LimamlError(_ended(process.returncode, log)) from None
                if monotonic() > deadline:
                    raise LimamlError(
                        f"Ray must start within training.ray_start_timeout_s ({limit_s:g} s), it has not; where the machine is "
                        f"only slow, raise it with --set training.ray_start_timeout_s=SECONDS: {error}"
                    ) from None

    services.start_raylet, services.get_node = start_with_ports, get_registered_node
    try:
        yield
    finally:
        services.start_raylet, services.get_node = start_raylet, get_node


def tell(name: str, words: bytes) -> None:
    """Leave `words` under `name` in the cluster's key-value store, over what was there: a worker's log stays on its node."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(name, words, overwrite=True, namespace=_NAMESPACE)


def told(name: str) -> bytes | None:
    """What was left last under `name`; the process may be connected to the cluster from elsewhere."""
    from ray.experimental.internal_kv import _internal_kv_get

    words: bytes | None = _internal_kv_get(name, namespace=_NAMESPACE)
    return words


def forget(name: str) -> None:
    """Remove what was left under `name`."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(name, namespace=_NAMESPACE)


def _ended(code: int, log: Path) -> str:
    start = log.read_text(errors="replace").splitlines()[:_LOG_LINES] if log.exists() else ["(none)"]
    return f"Ray's raylet ended with {code} before it was ready; the start of {log}:\n" + "\n".join(start)


def _free_ports() -> dict[str, int]:
    """A port for each agent, on which nobody listens; no seed decides, as two runs may start at once."""
    ports: list[int] = []
    while len(ports) < len(_AGENT_PORTS):
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return dict(zip(_AGENT_PORTS, ports, strict=True))
