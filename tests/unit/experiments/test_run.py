"""What a run of the experiments leaves besides its results."""

import pytest
import typer
from mlflow import MlflowClient

from experiments.cached_jobs import Job, JobOutput
from experiments.run import experiments, mlflow_log


def test_every_unit_is_a_run_in_mlflow(tmp_path):
    log = mlflow_log(tmp_path, "looks")
    log(
        Job("methods", "stored/origin0/seed1", {"method": "stored", "seed": 1}),
        JobOutput({"validation": 0.7, "seconds": 2, "notes": {}}),
    )
    log(Job("cost", "all"), JobOutput({"seconds": 3.0}))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("looks").experiment_id])
    assert {run.info.run_name for run in runs} == {"methods/stored/origin0/seed1", "cost/all"}
    stored = next(run for run in runs if run.info.run_name.startswith("methods"))
    assert stored.data.params == {"method": "stored", "seed": "1"}
    assert stored.data.metrics == {"validation": 0.7, "seconds": 2.0}
    assert stored.data.tags["table"] == "methods"
    assert stored.info.status == "FINISHED"


def test_a_run_of_some_tables_may_not_replace_the_results_of_all(monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.run.RESULTS", tmp_path / "results")  # so that a failure here replaces none either
    with pytest.raises(
        typer.BadParameter, match=r"must be all of them where .*results is written, got cost; name another --out"
    ):
        experiments(tables="cost")
    with pytest.raises(typer.BadParameter, match=r"must be among methods, .*, got costs"):
        experiments(tables="costs")
