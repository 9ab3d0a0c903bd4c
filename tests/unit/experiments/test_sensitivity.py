"""Cells of the sensitivity table: their settings, and one fit on planted rows."""

import pytest

from experiments.cached_jobs import JobOutput
from experiments.origin_data import OriginData
from experiments.origins import rolling_origins
from experiments.tables import sensitivity
from limaml.config import load


def test_one_cell_is_what_ships_and_no_two_are_alike():
    shipped = load(sensitivity.SHIPPED)
    found = [load(sensitivity.SHIPPED, sensitivity.overrides(job.params)) for job in sensitivity.jobs(quick=False)]
    assert found.count(shipped) == 1
    assert len({each.fingerprint() for each in found}) == len({job.key for job in sensitivity.jobs(quick=False)}) == 108


def test_rates_are_multiples_of_the_shipped_ones():
    params = {"inner_steps": 5, "inner_rate": 3.0, "learned": False, "outer_rate": 0.3, "second_order": False, "quick": True}
    cfg, shipped = load(sensitivity.SHIPPED, sensitivity.overrides(params)), load(sensitivity.SHIPPED)
    assert (cfg.meta.inner_lr, cfg.meta.factor_inner_lr) == (3 * shipped.meta.inner_lr, 3 * shipped.meta.factor_inner_lr)
    assert (cfg.meta.inner_steps, cfg.meta.learn_inner_lr, cfg.meta.second_order) == (5, False, False)
    assert (cfg.training.outer_lr, cfg.training.max_steps) == (0.3 * shipped.training.outer_lr, sensitivity.QUICK_STEPS)


SMALL = ["training.max_steps=8", "training.num_workers=1", "training.tasks_per_step=8", "training.validate_every=4"]
SMALL += ["evaluation.first_k=[0, 3, 6]"]


@pytest.fixture
def data(make_planted, small_config):
    logged = make_planted(num_users=100)
    return OriginData(small_config(), rolling_origins(logged)[0], logged)


def test_the_figure_is_the_mean_of_its_two_halves(data):
    found = sensitivity.fit_cell(data, SMALL)
    assert found["validation_auc"] == pytest.approx((found["pooled"] + found["peruser"]) / 2)
    assert found["pooled"] != found["peruser"]
    assert 0.5 < found["validation_auc"] <= 1.0
    assert found["train_seconds"] > 0.0
    assert found["best_step"] in (4, 8)


def test_a_fit_that_diverges_is_worth_chance(data):
    found = sensitivity.fit_cell(data, [*SMALL, "training.outer_lr=1e30", "training.warmup_steps=0"])
    assert found["diverged"] == 1.0
    assert found["validation_auc"] == 0.5


def test_cells_are_in_the_order_of_their_settings():
    cells = [
        {"order": o, "outer_rate": 1e-3, "learned": True, "inner_steps": s, "inner_rate": 1.0}
        for o, s in (("s", 3), ("f", 9), ("s", 1))
    ]
    found = sensitivity.assemble({str(n): JobOutput({"cell": cell}) for n, cell in enumerate(cells)})["sensitivity"]
    assert [(cell["order"], cell["inner_steps"]) for cell in found] == [("f", 9), ("s", 1), ("s", 3)]
