"""The DAGs as Airflow reads them: order, retries, time limits, parameters, documentation, imports, and how fast they parse."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest
from airflow.sdk import DAG
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.exceptions import AirflowFailException, ParamValidationError

from dags.limaml_daily import dag as daily
from dags.limaml_train import dag as train
from dags.parameters import day_of
from dags.verb import VerbOperator

ROOT = Path(__file__).parents[2]
DAGS = [train, daily]
PARSE_LIMIT_S = 0.5
"""Airflow's own import is not counted: the DAG processor has done it before it reads a file."""


def chain(dag: DAG) -> list[str]:
    """Task ids from the first to the last; fails if the DAG is not one chain."""
    ids = [task.task_id for task in dag.topological_sort()]
    for before, after in pairwise(ids):
        assert dag.get_task(before).downstream_task_ids == {after}
    return ids


def test_the_chains() -> None:
    assert chain(train) == ["apply", "embed_items", "ingest", "train", "evaluate", "plan_fill", "fill", "cut_over"]


def test_a_day_is_judged_once_it_is_published() -> None:
    """What judges it runs side by side, also after a publication that had nothing to do, and nothing waits for it."""
    order = {task.task_id: task.downstream_task_ids for task in daily.tasks}
    assert order == {
        "embed_items": {"ingest"},
        "ingest": {"adapt"},
        "adapt": {"publish"},
        "publish": {"consistency", "drift", "retain"},
        "consistency": set(),
        "drift": set(),
        "retain": set(),
    }
    assert after_a_skipped(daily) == {"ingest", "consistency", "drift"}
    assert daily.get_task("retain").trigger_rule == "all_done"


def after_a_skipped(dag: DAG) -> set[str]:
    """Tasks that run although one before them had nothing to do, unless one failed; the others do not."""
    found = {task.task_id for task in dag.tasks if task.trigger_rule == "none_failed"}
    others = {task.trigger_rule for task in dag.tasks if task.task_id not in found}
    assert others <= {"all_success", "all_done"}
    return found


def test_days_come_whether_or_not_an_item_is_new() -> None:
    assert after_a_skipped(train) == {"ingest"}


def test_fill_is_mapped_over_shards_and_never_over_entities() -> None:
    fill = train.get_task("fill")
    assert isinstance(fill, MappedOperator)
    assert set(fill.expand_input.value) == {"shard"}
    assert train.get_task("plan_fill").returns == "shards"


@pytest.mark.parametrize("dag", DAGS, ids=lambda dag: dag.dag_id)
def test_every_task_is_a_verb_with_retries_a_time_limit_and_a_purpose(dag: DAG) -> None:
    for task in dag.tasks:
        kind = task.operator_class if isinstance(task, MappedOperator) else type(task)
        assert kind is VerbOperator, task.task_id
        assert (task.retries, task.retry_delay) == (2, timedelta(seconds=10)), task.task_id
        assert task.execution_timeout is not None, task.task_id
        assert task.doc_md, task.task_id


@pytest.mark.parametrize("dag", DAGS, ids=lambda dag: dag.dag_id)
def test_the_documentation_says_purpose_inputs_outputs_and_triage(dag: DAG) -> None:
    for heading in ("Purpose.", "Inputs.", "Outputs.", "Triage."):
        assert f"**{heading}**" in dag.doc_md


@pytest.mark.parametrize("dag", DAGS, ids=lambda dag: dag.dag_id)
def test_switching_on_runs_nothing_of_the_past(dag: DAG) -> None:
    assert dag.catchup is False
    assert dag.start_date is None
    assert dag.timetable.run_immediately == timedelta(0)
    assert dag.max_active_runs == 1


def test_assets_are_outlets_and_trigger_nothing() -> None:
    outlets = {asset.name for dag in DAGS for task in dag.tasks for asset in task.outlets}
    assert outlets == {"limaml_events", "limaml_model", "limaml_embeddings"}
    assert all(type(dag.timetable).__name__ == "CronTriggerTimetable" for dag in DAGS)
    assert not [task.task_id for dag in DAGS for task in dag.tasks if task.inlets]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("through", "2026-1-31"),
        ("through", "2026-01-31; rm -rf x"),
        ("through", "$(touch x)"),
        ("through", 20260131),
        ("inner_steps", -1),
        ("inner_steps", "3"),
        ("inner_steps", 51),
        ("workers", 0),
        ("workers", 1.5),
    ],
)
def test_parameters_out_of_their_pattern_or_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ParamValidationError):
        train.params.get_param(name).resolve(value)


def rendered(dag: DAG, task_id: str, params: dict[str, Any], logical_date: datetime | None = None) -> list[str]:
    """Arguments of a task as a run with these parameters gets them, empty ones left out."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    defaults = {name: dag.params.get_param(name).value for name in dag.params}
    context = {
        "params": defaults | params,
        "dag_run": {"logical_date": logical_date},
        "ti": {"xcom_pull": lambda task_ids, key: {"candidate": "/c", "version": "7"}},
        **dag.user_defined_macros,
    }
    task = dag.get_task(task_id)
    templates = task.partial_kwargs["arguments"] if isinstance(task, MappedOperator) else task.arguments
    return [text for text in (environment.from_string(template).render(context) for template in templates) if text]


def test_what_the_verbs_are_given() -> None:
    params = {"through": "2026-01-31", "inner_steps": 5, "workers": 1}
    overrides = ["--set=meta.inner_steps=5", "--set=training.num_workers=1"]
    assert rendered(train, "ingest", params) == ["--through=2026-01-31"]
    assert rendered(train, "train", params) == ["--through=2026-01-31", *overrides]
    assert rendered(train, "evaluate", params) == ["--candidate=/c", *overrides]
    assert rendered(train, "train", {"through": "2026-01-31"}) == ["--through=2026-01-31"]
    assert rendered(train, "plan_fill", params) == ["--version=7", "--through=2026-01-31"]
    assert rendered(train, "fill", params) == ["--version=7"]
    for task in ("publish", "consistency", "drift", "retain"):
        assert rendered(daily, task, {"day": "2026-02-01"}) == ["--day=2026-02-01"]


def test_the_form_takes_an_empty_field() -> None:
    for dag in DAGS:
        for name in dag.params:
            assert dag.params.get_param(name).resolve() is None  # Text that may not be null is asked for: the button stays off.


def test_an_empty_day_is_the_day_before_the_logical_date() -> None:
    backfilled = datetime(2026, 3, 1, 1, tzinfo=UTC)
    assert rendered(daily, "ingest", {}, backfilled) == ["--day=2026-02-28"]
    assert rendered(train, "train", {}, backfilled)[0] == "--through=2026-02-28"
    assert rendered(daily, "ingest", {"day": "2026-01-05"}, backfilled) == ["--day=2026-01-05"]


def test_a_run_with_neither_day_nor_logical_date_fails_with_the_remedy() -> None:
    for empty in ("", None):
        with pytest.raises(AirflowFailException, match=re.escape('such as {"day": "2026-01-31"}')):
            day_of(empty, None)


def test_a_day_that_no_calendar_has_fails_without_retry() -> None:
    with pytest.raises(AirflowFailException, match="got '2026-02-30'"):
        day_of("2026-02-30", None)


@pytest.mark.parametrize("runner", ["process", "pod"])
def test_dag_files_parse_in_milliseconds_and_import_nothing_heavy(runner: str) -> None:
    script = """
import sys, time
import airflow.sdk
before = set(sys.modules)
started = time.process_time()
import dags.limaml_train, dags.limaml_daily
print(time.process_time() - started)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    environment = {**os.environ, "AIRFLOW__LIMAML__RUNNER": runner}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    seconds, imported = done.stdout.splitlines()[-2:]
    assert float(seconds) < PARSE_LIMIT_S
    assert not {"limaml", "torch", "ray", "feast", "bentoml", "mlflow", "pandas", "numpy", "kubernetes"} & set(imported.split())


def test_airflow_takes_only_the_dag_files_for_dags() -> None:
    """It imports every other file of the folder at each look, the runner of pods with its provider, too."""
    ignored = set((ROOT / "dags" / ".airflowignore").read_text().split())
    assert {path.name for path in (ROOT / "dags").glob("*.py")} - ignored == {"limaml_daily.py", "limaml_train.py"}
