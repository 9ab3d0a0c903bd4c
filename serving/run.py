"""Starts the service: `python -m serving.run --config configs/movielens.toml` from the repository's root.

It becomes BentoML's own process (its pid is the caller's to end with SIGTERM), listening where `[serving]` says. Exit code 2:
the configuration cannot be read, its token file neither, or it would have strangers served without a token.
"""

import argparse
import os
import sys
from collections.abc import Mapping

from limaml import config
from limaml.errors import ConfigError
from serving.auth import read_token

ENVIRONMENT = {
    # One request is a few thousand multiplications: threads would cost more than they save. Numpy reads it at import.
    "OMP_NUM_THREADS": "1",
    # BentoML wraps every request in a span, whether or not anybody collects them.
    "OTEL_SDK_DISABLED": "true",
    "BENTOML_DO_NOT_TRACK": "True",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A registry that is down is polled again; MLflow's own 7 tries would keep a recovered one waiting for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Holds the metrics of all workers; BentoML empties it at start, so two servers must not share it.
    "BENTOML_HOME": ".run/bentoml",
}


def environment_of(config_path: str, given: Mapping[str, str]) -> dict[str, str]:
    """What the service runs in: what its caller set, and ours where it set nothing; the zone is UTC always (contract 8)."""
    environment = {**ENVIRONMENT, **given, "TZ": "UTC", "LIMAML_CONFIG": os.path.abspath(config_path)}
    return environment | {"BENTOML_HOME": os.path.abspath(environment["BENTOML_HOME"])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving.run", description="Start the ranking service.")
    parser.add_argument("--config", required=True, help="configuration file, e.g. configs/movielens.toml")
    arguments = parser.parse_args()
    try:
        read_token(config.load(arguments.config).serving)
    except ConfigError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    environment = environment_of(arguments.config, os.environ)
    os.makedirs(environment["BENTOML_HOME"], exist_ok=True)
    os.execve(  # noqa: S606 - no shell is wanted: the pid must be the server's own
        sys.executable, [sys.executable, "-m", "serving.supervisor", "serve", "serving.service:Ranking"], environment
    )


if __name__ == "__main__":
    main()
