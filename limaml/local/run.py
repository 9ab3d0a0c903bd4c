"""`make run`: start the stack, drive both DAGs, start the service, ask it, and say where everything is."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from limaml.config import Config
from limaml.errors import LimamlError
from limaml.evaluation.console_table import console_table
from limaml.local import demo, stack, watch
from limaml.local.airflow_api import AirflowApi
from limaml.local.follow import Display, Timing, follow
from limaml.local.stack import Stack
from limaml.local.status import Status, read_status

TRAIN, DAILY = "limaml_train", "limaml_daily"
OPTIONAL = "embed_items"
"""A task that may have nothing to do without those after it having less."""
ADMIN = "admin"
PARTS = {"metadatabase": "airflow-api-server", "scheduler": "airflow-scheduler", "dag_processor": "airflow-dag-processor"}
"""What Airflow calls healthy, and the process that each waits for."""


class Steps:
    """Seconds per step, for the table at the end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/bold]", highlight=False)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def print(self) -> None:
        table = Table(title="Seconds per step", title_justify="left", show_edge=False)
        table.add_column("step")
        table.add_column("s", justify="right")
        for name, seconds in self.seconds.items():
            table.add_row(name, f"{seconds:.1f}")
        table.add_row("all", f"{time.monotonic() - self._started:.1f}")
        self.console.print(table)


def up(cfg: Config, today: date, console: Console) -> Status:
    """Everything from nothing, or what is missing of it; leaves the stack running and returns where it stands.

    Raises LimamlError with the failing task's own error, or with the reasons if a first candidate is refused.
    """
    with stack.exclusive(cfg):
        steps = Steps(console)
        with steps.step("Airflow and MLflow"):
            running = ready_stack(cfg)
        api = AirflowApi(running.urls["airflow"], ADMIN, running.password, cfg.local.ready_timeout_s)
        try:
            _train(cfg, today, api, running, steps)
            _take_in_days(cfg, today, api, running, steps)
        finally:
            api.close()
        status = read_status(cfg, today)
        with steps.step("service"):
            _ready_service(cfg, running, status)
        with steps.step("dashboards"):
            _ready_dashboards(cfg, running, console)
        with steps.step("three users"):
            demo.show(console, cfg, running.urls["service"])
        _show_quality(cfg, str(status.champion), console)
        steps.print()
        _say_where(running, console)
        return status


def ready_stack(cfg: Config) -> Stack:
    """The running stack if it is whole and has this configuration; else a new one, after the end of what is left of it."""
    root = Path(cfg.local.run_root).absolute()
    config_path = root / "config.json"
    text = cfg.model_dump_json(indent=1)
    running = stack.load_stack(cfg, config_path)
    if running is not None and running.whole() and config_path.read_text() == text:
        return running
    stack.stop(cfg)
    running = stack.new_stack(cfg, config_path)
    config_path.write_text(text)
    if stack.starts_mlflow(cfg):
        stack.start_mlflow(running, cfg)
    stack.start_airflow(running)
    if stack.starts_mlflow(cfg) and stack.is_server(cfg):
        # Then the verbs ask it; otherwise they ask its database, and it only shows pages.
        health = f"{running.urls['mlflow']}/health"
        stack.wait_until(lambda: stack.answers(health), "MLflow", running, "mlflow", cfg.local)
    api = AirflowApi(running.urls["airflow"], ADMIN, running.password, cfg.local.ready_timeout_s)
    try:
        for part, process in PARTS.items():
            stack.wait_until(partial(api.healthy, part), f"Airflow ({part})", running, process, cfg.local)
        stack.wait_until(
            lambda: api.has_dag(TRAIN) and api.has_dag(DAILY), "the DAGs", running, "airflow-dag-processor", cfg.local
        )
    finally:
        api.close()
    return running


def _train(cfg: Config, today: date, api: AirflowApi, running: Stack, steps: Steps) -> None:
    status = read_status(cfg, today)
    for reason in status.left_out:
        steps.console.print(f"Left out: {reason}", highlight=False, markup=False)
    if status.current:
        steps.console.print(
            f"Nothing to train: model {status.champion} serves, trained through {status.through} on the same data, "
            "configuration and code."
        )
        return
    timing = _run_dag(api, running, steps, TRAIN, {"through": status.through.isoformat()})
    refused = [reason for task, reason in timing.skipped.items() if task != OPTIONAL]
    if not refused:
        return
    reasons = "; ".join(refused)
    if status.champion is None:
        raise LimamlError(f"the first candidate was not promoted, so nothing can serve: {reasons}")
    steps.console.print(f"The candidate was not promoted, model {status.champion} stays: {reasons}")


def _take_in_days(cfg: Config, today: date, api: AirflowApi, running: Stack, steps: Steps) -> None:
    status = read_status(cfg, today)
    if not status.pending:
        steps.console.print(f"Nothing to publish: all days through {status.last_day} are online.")
    for day in status.pending:
        _run_dag(api, running, steps, DAILY, {"day": day.isoformat()})


def _run_dag(api: AirflowApi, running: Stack, steps: Steps, dag_id: str, conf: dict[str, str]) -> Timing:
    """One run, followed to its end. The DAG is switched on for that long only: its schedule is the user's decision."""
    with steps.step(f"{dag_id} {' '.join(conf.values())}"):
        api.set_paused(dag_id, False)
        try:
            run_id = api.trigger(dag_id, dict(conf))
            with Display(steps.console) as display:
                timing = follow(api, dag_id, run_id, display, running.check_alive)
        except LimamlError:
            with suppress(LimamlError):  # the error that matters is the first one
                api.set_paused(dag_id, True)
            raise
        api.set_paused(dag_id, True)
    return timing


def _ready_service(cfg: Config, running: Stack, status: Status) -> None:
    """Start the service unless it runs; wait until it answers with the champion."""
    if not running.running("service"):
        stack.start_service(running)
    url = running.urls["service"]
    stack.wait_until(lambda: stack.answers(f"{url}/readyz"), "the service", running, "service", cfg.local)
    asked = demo.choose_users(cfg)[-1]
    stack.wait_until(
        lambda: demo.ask(url, asked, cfg.local.ready_timeout_s, demo.bearer(cfg))["model_version"] == status.champion,
        f"the service with model {status.champion}",
        running,
        "service",
        cfg.local,
    )


def _ready_dashboards(cfg: Config, running: Stack, console: Console) -> None:
    """Start the dashboards unless they run; where programs are missing, or they are not wanted, say what was left out."""
    if running.running("prometheus"):
        return
    if not cfg.local.prometheus_port:
        console.print("No dashboards: local.prometheus_port is 0.", highlight=False)
    elif missing := watch.missing():
        console.print(f"No dashboards: {' and '.join(missing)} are not installed ({watch.INSTALL}).", highlight=False)
    else:
        running.urls["dashboards"] = watch.start(running, cfg)
        running.save()
        url = running.urls["dashboards"]
        stack.wait_until(lambda: stack.answers(url), "the dashboards' page", running, "dashboards", cfg.local)


def _show_quality(cfg: Config, version: str, console: Console) -> None:
    """The promoted model's own evaluation, out of its bundle."""
    from limaml.models import bundle
    from limaml.registry import Registry

    with tempfile.TemporaryDirectory() as folder:
        metrics = bundle.load(Registry(cfg.registry).download(version, folder), parts=("refit",)).metrics
    console.print(f"[bold]Quality of model {version}[/bold]", highlight=False)
    console.print(console_table(metrics["evaluation"]), highlight=False, markup=False)


def _say_where(running: Stack, console: Console) -> None:
    urls = running.urls
    table = Table(title="Everything is running; `make stop` ends it", title_justify="left", show_header=False, show_edge=False)
    for name, where in (
        ("Airflow", f"{urls['airflow']}  user {ADMIN}  password {running.password}"),
        ("MLflow", urls["mlflow"]),
        ("service", f"{urls['service']}/rank"),
        ("OpenAPI page", urls["service"]),
        ("metrics", f"{urls['service']}/metrics"),
        *([("dashboards", urls["dashboards"])] if "dashboards" in urls else []),
        ("state and logs", str(running.root)),
    ):
        table.add_row(name, where)
    console.print(table)
