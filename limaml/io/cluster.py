"""A Ray cluster that is there already: whether one is named, the connection to it, and calls on it.

`host:6379` is for a process on one of its nodes, `ray://host:10001` for one elsewhere, such as a pod of Airflow. What Ray
raises becomes ours: an error of ours in a task is raised here as it was, anything else is one that a retry may cure.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from limaml import telemetry
from limaml.config import Config
from limaml.errors import ConfigError, LimamlError
from limaml.io.ray_compat import start_limits

_TRIES = 3
_SERVER_FAILED = ("Starting Ray client server failed", "Proxy failed to Connect to backend")
"""What a cluster says where the server that it forks for a connection from elsewhere, beside gRPC's threads, ends or hangs at
once. Another one mostly does not."""
_log = telemetry.get_logger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def address(cfg: Config) -> str:
    """Of the cluster; empty if there is none."""
    return cfg.ray.address or os.environ.get("RAY_ADDRESS", "")


@contextmanager
def connected(cfg: Config) -> Iterator[None]:
    """Be connected to the cluster in the block; it is left as it is. Raises LimamlError if it does not answer."""
    # Read where ray is imported.
    os.environ.update(start_limits(cfg.training.ray_start_timeout_s))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cfg.ray.token_file:
        path = Path(cfg.ray.token_file).absolute()
        if not path.is_file():
            raise ConfigError(f"ray.token_file must be a file that holds the cluster's token, got {path}; correct it")
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    import ray

    # Feast and duckdb read instants in the process's zone.
    environment = {"env_vars": {"TZ": "UTC", "OMP_NUM_THREADS": "1"}}
    with ours():
        for tries_left in reversed(range(_TRIES)):
            try:
                ray.init(address(cfg), logging_level="warning", runtime_env=environment)
                break
            except (ConnectionError, RuntimeError) as error:
                if not tries_left or not any(said in str(error) for said in _SERVER_FAILED):
                    reason = f"the Ray cluster at {address(cfg)} must answer, it does not: {error}; is it running?"
                    raise LimamlError(reason) from error
                _log.warning("ray_client_server_not_started", tries_left=tries_left)
                ray.shutdown()
        try:
            yield
        finally:
            ray.shutdown()


def call_inside(function: Callable[Arguments, Result], *arguments: Arguments.args, **more: Arguments.kwargs) -> Result:
    """`function(…)`, called on the cluster where this process is connected from elsewhere, otherwise here."""
    import ray
    from ray.util import client

    if not client.ray.is_connected():
        return function(*arguments, **more)
    # It waits for others; what computes has the processors.
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    result: Result = ray.get(remote.remote(*arguments, **more))
    return result


@contextmanager
def ours() -> Iterator[None]:
    """Turn Ray's errors into ours."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, LimamlError):
            raise error.cause from error
        raise LimamlError(f"a task on the Ray cluster failed: {error}") from error
    except RayError as error:
        raise LimamlError(f"the Ray cluster lost what it was doing: {error}; run it again") from error
