"""Units: kept, taken up again, and computed anew where they would differ."""

import numpy as np
import pytest
from rich.console import Console

from experiments.cached_jobs import Job, JobCache, JobOutput
from experiments.progress import follow


def double(job: Job) -> JobOutput:
    if job.params["number"] < 0:
        raise ValueError("numbers must be positive")
    return JobOutput({"doubled": 2 * job.params["number"]}, {"both": np.full(2, job.params["number"])})


def numbers(*values):
    return [Job("double", f"n{value}", {"number": value}) for value in values]


def run(jobs, cache):
    return {job.key: output for job, output in follow(jobs, {"double": double}, cache, 1, Console(quiet=True)).items()}


def test_what_is_finished_is_not_computed_again(tmp_path):
    cache = JobCache(tmp_path, "mark")
    first = run(numbers(3), cache)
    again = run(numbers(3, 4), cache)
    assert again["n4"].values["doubled"] == 8
    assert again["n3"].values["doubled"] == 6
    assert np.array_equal(again["n3"].arrays["both"], [3, 3])
    assert again["n3"].values["seconds"] == first["n3"].values["seconds"] > 0


def test_other_code_or_parameters_are_another_unit(tmp_path):
    (job,) = numbers(3)
    JobCache(tmp_path, "mark").write(job, JobOutput({"doubled": 6}))
    assert JobCache(tmp_path, "mark").read(job) is not None
    assert JobCache(tmp_path, "other").read(job) is None
    assert JobCache(tmp_path, "mark").read(Job("double", "n3", {"number": 4})) is None


def test_a_failure_names_its_unit_and_leaves_the_finished_ones(tmp_path):
    cache = JobCache(tmp_path, "mark")
    with pytest.raises(ValueError, match="must be positive") as caught:
        run(numbers(3, -1), cache)
    assert caught.value.__notes__ == ["job double/n-1 with {'number': -1}"]
    assert cache.read(numbers(3)[0]) is not None
    assert cache.read(numbers(-1)[0]) is None
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
