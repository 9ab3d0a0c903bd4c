"""The outer loop of networks that are compared."""

import pytest
import torch
from torch import nn

from limaml.config import TrainingConfig
from limaml.errors import TrainingError
from limaml.evaluation.best_average import best_average

CFG = TrainingConfig(outer_lr=0.1, warmup_steps=0, validate_every=2, patience=2, average_decay=0.0, weight_decay=0.0)


def line():
    return nn.Linear(1, 1, bias=False)


def towards(model, target):
    return lambda _step: (model.weight - target).square().sum().backward()


def test_the_average_that_validates_best_is_kept_and_training_stops_when_it_is_stale():
    model, seen = line(), []
    values = iter([0.1, 0.3, 0.2, 0.25, 0.9])

    def quality(average):
        seen.append(average.weight.item())
        return next(values)

    best, value, step = best_average(CFG, model, 100, towards(model, 3.0), quality)
    assert (value, step) == (0.3, 4)
    assert best.weight.item() == pytest.approx(seen[1])
    assert len(seen) == 4, "two validations without a better value end it"


def test_of_equal_averages_the_first_is_kept_and_an_equal_one_is_not_better():
    model, values = line(), iter([0.3] * 4)
    _, value, step = best_average(CFG, model, 100, towards(model, 3.0), lambda _: next(values))
    assert (value, step) == (0.3, 2)
    assert next(values) == 0.3, "two validations without a better value end it"


def test_the_last_step_is_validated():
    model = line()
    _, _, step = best_average(CFG, model, 3, towards(model, 3.0), lambda average: average.weight.item())
    assert step == 3


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = line()
    before = model.weight.item()
    with pytest.raises(TrainingError, match=r"got norm nan at step 0 of Linear; lower training.outer_lr"):
        best_average(CFG, model, 3, lambda _step: (model.weight * torch.nan).sum().backward(), lambda _: 0.0)
    assert model.weight.item() == before
