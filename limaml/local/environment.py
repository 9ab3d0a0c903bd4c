"""The environment of every process of the stack: what packages keep at home goes under the run folder, nothing calls home."""

import os
from math import ceil
from pathlib import Path

from limaml.config import Config
from limaml.config.secret import revealed_url
from limaml.local.processes import MARKER

# Settings of whoever calls us must not reach Airflow or Ray: the same run on every machine.
FOREIGN_PREFIXES = ("AIRFLOW", "BENTOML", "FEAST", "GUNICORN", "LIMAML", "MLFLOW", "PYTHON", "RAY", "UVICORN", "XDG_", "_TYPER")


def process_environment(cfg: Config, config_path: Path, root: Path, stack_id: str) -> dict[str, str]:
    """All variables, those of Airflow included; `root` is the absolute run folder."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
    local_hosts = ",".join(filter(None, (inherited.get("NO_PROXY"), "127.0.0.1", "localhost")))
    return {
        **inherited,
        MARKER: stack_id,
        "SPT_NOENV": "1",  # setproctitle writes its titles over the environment otherwise, and the marker is lost
        "LIMAML_CONFIG": str(config_path.absolute()),
        "TZ": "UTC",
        "HOME": str(root / "home"),
        "BENTOML_HOME": str(root / "bentoml"),
        "MPLCONFIGDIR": str(root / "home" / "matplotlib"),
        # DAG files import their neighbours as `dags.…`.
        "PYTHONPATH": os.getcwd(),
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": local_hosts,
        "no_proxy": local_hosts,
        # Two processes with a thread a core each, spinning for one another: training was 40 times slower.
        "OMP_NUM_THREADS": "1",
        "GX_ANALYTICS_ENABLED": "False",
        "FEAST_USAGE": "False",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "BENTOML_DO_NOT_TRACK": "True",
        "OTEL_SDK_DISABLED": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        **_airflow(cfg, root),
    }


def _airflow(cfg: Config, root: Path) -> dict[str, str]:
    home = root / "airflow"
    url = f"http://127.0.0.1:{cfg.local.airflow_port}"
    silent_s, late_s = str(ceil(cfg.local.ready_timeout_s)), str(ceil(cfg.local.start_timeout_s))
    settings = {
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": "2",
        "CORE__DAGS_FOLDER": str(Path("dags").absolute()),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        # SQLite gives up a lock after 5 s otherwise, and with it the scheduler.
        "DATABASE__SQL_ALCHEMY_CONN": revealed_url(cfg.local.airflow_database, "local.airflow_database")
        or f"sqlite:///{home / 'airflow.db'}?timeout={silent_s}",
        "API__HOST": "127.0.0.1",
        "API__PORT": str(cfg.local.airflow_port),
        "API__BASE_URL": url,
        "API__WORKERS": "1",
        "API_AUTH__JWT_SECRET": (home / "jwt_secret").read_text(),
        "DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        "DAG_PROCESSOR__PARSING_PROCESSES": "1",
        # A task is ready when its predecessor ends; a second of idling at each of them is a tenth of a daily run.
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
        "USAGE_DATA_COLLECTION__ENABLED": "False",
        # Airflow's own limits, 5 to 600 s, fail sound work on a loaded machine. First what must give a sign of life: an answer
        # to a task (which asks five times and so adds to the load), a heartbeat, a task's end once its work is done.
        "WORKERS__EXECUTION_API_TIMEOUT": silent_s,
        "SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": silent_s,
        "DAG_PROCESSOR__HEALTH_CHECK_THRESHOLD": silent_s,
        "CORE__TASK_SUCCESS_OVERTIME": silent_s,
        # Then what must be done: a DAG file be read, and its DAG be stored (else it counts as gone), a task leave the queue.
        # A task's heartbeat is among them, since it has 300 s by default.
        "CORE__DAGBAG_IMPORT_TIMEOUT": late_s,
        "DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": late_s,
        "DAG_PROCESSOR__STALE_DAG_THRESHOLD": late_s,
        "SCHEDULER__TASK_QUEUED_TIMEOUT": late_s,
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": late_s,
    }
    return {"AIRFLOW_HOME": str(home), **{f"AIRFLOW__{key}": value for key, value in settings.items()}}
