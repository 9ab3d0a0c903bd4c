"""Both DAGs with a real scheduler on generated data, and the real service, by the command that `make run` calls.

One run (a module's fixture) for all tests here; the last one stops it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rich.console import Console

from limaml.config import Config
from limaml.local import demo, processes, stack
from limaml.local.airflow_api import AirflowApi
from limaml.local.follow import Display, TaskFailedError, follow
from tests.e2e.installed import installed

ROOT = Path(__file__).parents[2]
TRAIN_TASKS = ["apply", "embed_items", "ingest", "train", "evaluate", "plan_fill", "fill[0]", "fill[1]", "cut_over"]
DAILY_TASKS = ["embed_items", "ingest", "adapt", "publish", "consistency", "drift", "retain"]
SKIPPED = {"embed_items", "consistency", "retain"}
"""No vector is made here, no request of a day was logged when the day is taken in, and nothing is past its retention."""


@dataclass
class World:
    """A run folder, its configuration, and what the first `limaml up` printed."""

    cfg: Config
    config_path: Path
    home: Path
    output: str = ""

    def limaml(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "limaml.cli", *arguments, "--config", str(self.config_path)]
        environment = {**os.environ, "HOME": str(self.home)}
        return subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def status(self) -> dict[str, Any]:
        path = self.config_path.with_name("status.json")
        done = self.limaml("status", "--result", str(path))
        assert done.returncode == 0, done.stderr
        return json.loads(path.read_text())

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((Path(self.cfg.local.run_root) / "stack.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("e2e")
    cfg = installed(folder / "run", free_ports(3))
    config_path = folder / "config.json"
    config_path.write_text(cfg.model_dump_json())
    (folder / "home").mkdir()
    made = World(cfg, config_path, folder / "home")
    try:
        done = made.limaml("up")
        made.output = done.stdout
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        yield made
    finally:
        made.limaml("stop")


@pytest.fixture
def api(world: World) -> Iterator[AirflowApi]:
    running = stack.load_stack(world.cfg, world.config_path)
    assert running is not None
    client = AirflowApi(running.urls["airflow"], "admin", running.password)
    yield client
    client.close()


def runs(api: AirflowApi) -> list[tuple[str, str, str]]:
    """(DAG, type, state) of every run, in the order of their start."""
    found = api._call("GET", "/api/v2/dags/~/dagRuns", params={"order_by": "start_date"})["dag_runs"]
    return [(run["dag_id"], run["run_type"], run["state"]) for run in found]


def test_every_task_ran_once_and_the_days_in_order(world: World, api: AirflowApi) -> None:
    assert runs(api) == [("limaml_train", "manual", "success"), *[("limaml_daily", "manual", "success")] * 2]
    train, first, second = api._call("GET", "/api/v2/dags/~/dagRuns", params={"order_by": "start_date"})["dag_runs"]
    for run, names in ((train, TRAIN_TASKS), (first, DAILY_TASKS), (second, DAILY_TASKS)):
        tasks = api.task_instances(run["dag_id"], run["dag_run_id"])
        assert sorted(task.name for task in tasks) == sorted(names)
        states = {task.name: "skipped" if task.name in SKIPPED else "success" for task in tasks}
        assert {task.name: (task.state, task.try_number) for task in tasks} == {name: (states[name], 1) for name in states}
    through = datetime.fromisoformat(train["conf"]["through"])
    assert [run["conf"]["day"] for run in (first, second)] == [f"{through + timedelta(days=n):%Y-%m-%d}" for n in (1, 2)]


def test_status_fits_one_screen_and_says_what_serves(world: World) -> None:
    screen = world.limaml("status").stdout.splitlines()
    assert len(screen) <= 24
    assert "version 1 serves, trained on the data, configuration and code of now" in screen[0]
    assert any("version 1 serves, complete through" in line for line in screen[1:])
    assert any("all online" in line for line in screen)
    assert any("days passed" in line for line in screen)


def test_all_days_are_online_for_the_champion(world: World) -> None:
    status = world.status()
    assert status["champion"] == "1"
    assert status["current"] is True
    assert status["pending"] == []
    end = datetime.fromisoformat(status["last_day"]).replace(tzinfo=UTC) + timedelta(days=1)
    assert datetime.fromisoformat(status["complete_through"]) == end


def test_each_day_changed_rows_online(world: World, api: AirflowApi) -> None:
    for run in api._call("GET", "/api/v2/dags/limaml_daily/dagRuns")["dag_runs"]:
        [publish] = [t for t in api.task_instances("limaml_daily", run["dag_run_id"]) if t.task_id == "publish"]
        result = api.result("limaml_daily", run["dag_run_id"], publish)
        assert result["written"] > 0, result


def test_the_verbs_left_their_metrics(world: World) -> None:
    shown = {path.stem: path.read_text() for path in Path(world.cfg.monitoring.textfile_dir).glob("*.prom")}
    verbs = (
        "apply",
        "embed-items",
        "ingest",
        "train",
        "evaluate",
        "plan-fill",
        "fill",
        "cut-over",
        "adapt",
        "publish",
        "consistency",
        "drift",
        "retain",
    )
    assert set(shown) == {f"limaml_{verb}" for verb in verbs}
    assert 'limaml_last_published_timestamp_seconds{kind="user"}' in shown["limaml_publish"]
    assert 'limaml_published_entities{kind="user",state="within_1d"}' in shown["limaml_publish"]
    assert 'status="unchanged",verb="consistency"' in shown["limaml_consistency"]


def test_the_service_ranks_for_all_three_users(world: World) -> None:
    much, few, never = demo.choose_users(world.cfg)
    url = world.state["urls"]["service"]
    for user in (much, few, never):
        answer = demo.ask(url, user)
        scores = [item["score"] for item in answer["items"]]
        assert sorted(item["item_id"] for item in answer["items"]) == sorted(user.candidates)
        assert scores == sorted(scores, reverse=True)
        assert answer["model_version"] == "1"
    assert demo.ask(url, much)["embeddings"]["user"]["fallback"] is None
    assert demo.ask(url, few)["embeddings"]["user"]["fallback"] is None
    unknown = demo.ask(url, never)["embeddings"]["user"]
    assert (unknown["fallback"], unknown["age_s"]) == ("missing", None)
    assert 'limaml_meta_embedding_lookups_total{kind="user",status="fresh"}' in httpx.get(f"{url}/metrics").text


def test_what_is_printed(world: World) -> None:
    for task in (*(f"limaml_train.{name}" for name in TRAIN_TASKS), *(f"limaml_daily.{name}" for name in DAILY_TASKS)):
        assert task in world.output, task
    for text in ("much history", "fewest rows", "never seen", "fallback to the prior: missing", "LiMAML", "Seconds per step"):
        assert text in world.output, text
    last = world.output[world.output.index("Everything is running") :]
    for url in world.state["urls"].values():
        assert url in last
    assert "password" in last


def test_only_loopback_listens_and_nothing_is_kept_at_home(world: World) -> None:
    listening = {
        connection.laddr.ip
        for process in processes.marked(world.state["stack_id"])
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    assert list(world.home.iterdir()) == []


def test_a_failing_task_ends_the_following_with_its_own_error(world: World, api: AirflowApi) -> None:
    api.set_paused("limaml_daily", False)
    run_id = api.trigger("limaml_daily", {"day": "2200-01-01"})
    with Display(Console(quiet=True)) as display, pytest.raises(TaskFailedError) as caught:
        follow(api, "limaml_daily", run_id, display, lambda: None)
    api.set_paused("limaml_daily", True)
    assert str(caught.value).startswith("limaml_daily.ingest failed (try 1): ConfigError: ")
    assert "2200-01-01" in str(caught.value)


def test_a_second_run_trains_and_publishes_nothing_and_says_so(world: World, api: AirflowApi) -> None:
    before, pids = runs(api), [one["pid"] for one in world.state["processes"]]
    done = world.limaml("up")
    assert done.returncode == 0, done.stderr
    assert "Nothing to train: model 1 serves" in done.stdout
    assert "Nothing to publish: all days through" in done.stdout
    assert runs(api) == before
    assert [one["pid"] for one in world.state["processes"]] == pids


def test_stop_ends_everything(world: World) -> None:
    state = world.state
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        done = world.limaml("stop")
        assert done.returncode == 0
        assert done.stdout.startswith("ended ")
        assert processes.marked(state["stack_id"]) == []
        assert not [one for one in state["processes"] if processes.is_alive(processes.Recorded(**one))]
        assert bystander.poll() is None
        assert world.limaml("stop").stdout == "nothing was running\n"
    finally:
        bystander.kill()
        bystander.wait()
