"""What a shard's rows were made from: a plan that differs in anything they follow from has another digest."""

from dataclasses import replace
from datetime import date

import pytest

from limaml.config import TaskKindConfig
from limaml.embeddings.partition import FillPlan

PLAN = FillPlan(TaskKindConfig(), "7", date(2026, 1, 5), 2, {"2026-01-04": 1, "2026-01-05": 1}, ("u1", "u2"))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"num_shards": 3}, id="other shards hold other entities"),
        pytest.param({"revisions": {"2026-01-04": 2, "2026-01-05": 1}}, id="a day it reads was corrected"),
        pytest.param({"revisions": {"2026-01-05": 1}}, id="it reads fewer days"),
        pytest.param({"entities": ("u1", "u3")}, id="other entities"),
    ],
)
def test_a_plan_that_differs_has_another_digest(change: dict[str, object]) -> None:
    assert replace(PLAN, **change).digest != PLAN.digest  # type: ignore[arg-type]
    assert replace(PLAN).digest == PLAN.digest
