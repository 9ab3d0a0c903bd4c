"""The outer loop on a model of one weight. How it goes on from a checkpoint: test_twin_and_refit."""

import pytest
import torch
from torch import nn

from limaml.config import TrainingConfig
from limaml.errors import TrainingError
from limaml.training.fit import fit
from limaml.training.step import BatchLoss, OuterObjective
from limaml.training.validation import OBJECTIVE

CFG = TrainingConfig(
    outer_lr=0.1, warmup_steps=0, validate_every=2, patience=2, average_decay=0.0, weight_decay=0.0, max_steps=100
)


def towards(value):
    def loss(model, target, *, generator, num_tasks):
        found = (model.weight - target).square().sum()
        return BatchLoss(found, found.detach().reshape(1))

    return OuterObjective(lambda step: [(("one",), value)], loss)


def line():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def scripted(values):
    found = iter(values)
    return lambda _average: {OBJECTIVE: next(found)}


def test_the_average_that_validates_best_is_kept_and_training_stops_when_it_is_stale():
    seen, values = [], iter([0.1, 0.3, 0.2, 0.25, 0.9])

    def validate(average):
        seen.append(average.weight.item())
        return {OBJECTIVE: next(values)}

    best, progress = fit(line(), CFG, towards(3.0), validate=validate)
    assert (progress.best_value, progress.best_step, progress.step) == (0.3, 4, 8)
    assert best.weight.item() == pytest.approx(seen[1])
    assert len(seen) == 4, "two validations without a better value end it"
    assert not best.weight.requires_grad


def test_of_equal_averages_the_first_is_kept_and_an_equal_one_is_not_better():
    _, progress = fit(line(), CFG, towards(3.0), validate=scripted([0.3] * 3))
    assert (progress.best_value, progress.best_step, progress.step) == (0.3, 2, 6)


def test_a_value_that_is_not_defined_is_no_improvement_but_the_first_average_is_kept():
    best, progress = fit(line(), CFG, towards(3.0), validate=scripted([float("nan")] * 3))
    assert (progress.best_step, progress.step) == (2, 6)
    after_two, _ = fit(line(), CFG, towards(3.0), num_steps=2)
    assert best.weight.item() == after_two.weight.item() != 0.0


def test_the_last_step_is_validated_and_more_steps_may_be_planned_than_are_done():
    fits = [
        fit(line(), CFG.model_copy(update={"max_steps": planned}), towards(3.0), num_steps=3, validate=scripted([0.1, 0.2]))
        for planned in (3, 100)
    ]
    assert [progress.best_step for _, progress in fits] == [3, 3]
    # The rate follows the plan: it has fallen less after 3 of 100 steps than after 3 of 3.
    assert len({best.weight.item() for best, _ in fits}) == 2


def test_without_validation_the_last_average_is_returned():
    model = line()
    average, progress = fit(model, CFG, towards(3.0), num_steps=5)
    assert average.weight.item() == pytest.approx(model.weight.item())
    assert (progress.step, progress.best_value, len(progress.history)) == (5, None, 3)


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = line()
    before = model.weight.item()
    with pytest.raises(TrainingError, match=r"got loss nan and gradient norm nan at step 0 \(tasks one\)"):
        fit(model, CFG, towards(float("nan")), num_steps=3)
    assert model.weight.item() == before


def test_each_step_draws_its_own_dropout_unless_the_run_has_one_generator():
    def drawn(generator):
        seen = []

        def loss(model, batch, *, generator, num_tasks):
            seen.append(torch.rand((), generator=generator).item())
            return BatchLoss(model.weight.sum(), torch.zeros(1))

        fit(line(), CFG, OuterObjective(lambda step: [(("one",), 0.0)] * 2, loss, generator), num_steps=2)
        return seen

    steps, run = drawn(None), drawn(torch.Generator().manual_seed(0))
    assert steps == drawn(None)
    assert len({*steps, *run}) == 8
    assert run == torch.rand(4, generator=torch.Generator().manual_seed(0)).tolist()
