"""The page of the faults is made of the tests' marks, which `test_pages` holds it to; these hold the marks to the tests."""

import re

from tests.rules.test_repository import ROOT
from tools.faults import faults


def test_every_mark_belongs_to_a_test_and_names_one_fault() -> None:
    marks = [text for path in (ROOT / "tests").rglob("test_*.py") if "site-packages" not in path.parts
             for text in re.findall(r"^@pytest\.mark\.fault\(", path.read_text(), re.MULTILINE)]  # fmt: skip
    found = faults()
    assert len(found) == len(marks), "a mark that is not on a function at the top of its module is not on the page"
    assert len({fault.what for fault in found}) == len(found)
    assert all(fault.what and fault.after for fault in found)


def test_every_fault_that_a_deployment_must_survive_has_a_test() -> None:
    told = "\n".join(fault.what for fault in faults())
    needed = [
        "kill -9 of a training worker",
        "kill -9 of the Ray node",
        "kill -9 of an adapting task mid-shard",
        "kill -9 of the publisher mid-slot",
        "kill -9 of Airflow's scheduler",
        "kill -9 of the holder of the lease between its check and its write",
        "Redis killed while it is published to",
        "kill -9 of Redis while serving",
        "Postgres crashes and restarts under MLflow and the lease",
        "Postgres crashes and restarts under Airflow",
        "S3 that answers 503",
        "disk full while the partitions",
        "disk full while a checkpoint",
        "disk full while a bundle",
        "a truncated partition",
        "a flipped byte in",
        "two publications of one day at once",
        "a cut-over while a daily run publishes",
        "the clock steps back",
        "a network to Redis that drops",
        "a network to Redis that delays",
    ]
    assert not [fault for fault in needed if fault not in told]
