"""Airflow on Postgres while a day is taken in: its database crashes and restarts, then its scheduler is killed.

One run of the real DAG. What ends of Airflow is started again, as Kubernetes does. Meanwhile a verb stands still.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from limaml.config import Config
from limaml.errors import LimamlError
from limaml.local import processes, stack
from limaml.local.airflow_api import AirflowApi
from tests.faults.installation import Installation, require_same
from tests.faults.test_killed_verbs import BLUE, SAME
from tests.polling import wait_for
from tests.ports import unused_ports
from tests.postgres import Postgres, running_postgres

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
DEADLINE_S = 600.0
DAILY = "limaml_daily"
COMPONENTS = {"airflow-api-server": [], "airflow-scheduler": ["--skip-serve-logs"], "airflow-dag-processor": []}
# In the place of the interpreter that runs the verbs: two of them stand still, once.
PROGRAM = """#!{python}
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from tests.faults.process import Point
points = {{
    "adapt": Point("limaml.embeddings.stream:Adapter.embed", call=2, sends=signal.SIGSTOP),
    "publish": Point("limaml.embeddings.publish:OnlineView.write", call=2, sends=signal.SIGSTOP, of="{view}"),
}}
verb = sys.argv[3]
once = pathlib.Path({folder!r}, verb)
if verb in points and not once.exists():
    once.write_text(str(os.getpid()))
    points[verb].arm()
sys.argv = ["limaml", *sys.argv[3:]]
from limaml import cli
cli.main()
"""


class Airflow:
    """Its three components, on Postgres."""

    def __init__(self, cfg: Config, config_path: Path, dsn: str, program: Path) -> None:
        self.cfg, self.stack = cfg, stack.new_stack(cfg, config_path)
        settings = {
            "DATABASE__SQL_ALCHEMY_CONN": dsn.replace("postgresql://", "postgresql+psycopg2://"),
            # Of a task whose process is gone with the scheduler; half an hour otherwise.
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
            "LIMAML__PYTHON": str(program),
        }
        self.stack.environment |= {f"AIRFLOW__{key}": value for key, value in settings.items()}
        stack.start_airflow(self.stack)
        self.api = AirflowApi(self.stack.urls["airflow"], "admin", self.stack.password, cfg.local.ready_timeout_s)

    def wait(self, ready: Callable[[], object], what: str) -> None:
        """Poll, and start again what has ended meanwhile."""

        def answered() -> object:
            for name, more in COMPONENTS.items():
                if not self.stack.running(name):
                    self.stack.start(name, [sys.executable, "-m", "airflow", name.removeprefix("airflow-"), *more])
            with suppress(LimamlError):  # its database may be away
                return ready()
            return False

        wait_for(answered, what, DEADLINE_S)

    def kill_scheduler(self) -> None:
        os.kill(self.stack.newest("airflow-scheduler").pid, signal.SIGKILL)
        wait_for(lambda: not processes.is_alive(self.stack.newest("airflow-scheduler")), "the scheduler's end")

    def succeeded(self, run: str, task: str) -> bool:
        states = {one.task_id: one.state for one in self.api.task_instances(DAILY, run)}
        assert states.get(task) not in ("failed", "upstream_failed"), states
        return states.get(task) == "success"

    def stop(self) -> None:
        self.api.close()
        stack.stop(self.cfg)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    with running_postgres(tmp_path) as server:
        yield server


@pytest.fixture
def airflow(installation: Installation, postgres: Postgres, tmp_path: Path) -> Iterator[Airflow]:
    """On the installation before the day is adapted."""
    installation.begin("adapt")
    airflow, mlflow, service = unused_ports(3)
    cfg = installation.world.cfg
    local = {"run_root": str(tmp_path / "run"), "airflow_port": airflow, "mlflow_port": mlflow}
    cfg = cfg.model_copy(
        update={
            "local": cfg.local.model_copy(update=local),
            "serving": cfg.serving.model_copy(update={"port": service}),
            "monitoring": cfg.monitoring.model_copy(update={"textfile_dir": ""}),
        }
    )
    program = tmp_path / "python"
    program.write_text(PROGRAM.format(python=sys.executable, root=str(ROOT), folder=str(tmp_path), view=BLUE))
    program.chmod(0o700)
    started = Airflow(cfg, installation.root / "config.json", postgres.dsn, program)
    yield started
    started.stop()


@pytest.mark.slow
@pytest.mark.fault("Postgres crashes and restarts under Airflow, while a task adapts", after=f"the run goes on; {SAME}")
@pytest.mark.fault(
    "kill -9 of Airflow's scheduler mid-run, while a task publishes", after=f"started again, it ends the run; {SAME}"
)
def test_airflow_outlives_its_database_and_its_scheduler(
    installation: Installation, airflow: Airflow, postgres: Postgres, tmp_path: Path
) -> None:
    airflow.wait(lambda: airflow.api.has_dag(DAILY), "the DAG")
    airflow.api.set_paused(DAILY, False)
    run = airflow.api.trigger(DAILY, {"day": str(installation.day)})

    airflow.wait(lambda: stands_still(tmp_path / "adapt"), "an adaptation")
    postgres.stop(signal.SIGQUIT)
    postgres.start()
    go_on(tmp_path / "adapt")

    airflow.wait(lambda: stands_still(tmp_path / "publish"), "a publication")
    airflow.kill_scheduler()
    go_on(tmp_path / "publish")
    airflow.wait(lambda: airflow.succeeded(run, "publish"), "the end of the publication")
    require_same(installation.state(), installation.left_by("publish"))


def stands_still(once: Path) -> bool:
    if not (once.exists() and once.read_text()):
        return False
    return Path(f"/proc/{once.read_text()}/stat").read_text().rpartition(") ")[2].startswith("T")


def go_on(once: Path) -> None:
    with suppress(ProcessLookupError):  # ended with its task
        os.kill(int(once.read_text()), signal.SIGCONT)
