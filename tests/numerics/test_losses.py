"""Losses of a task's rows against plain loops over rows and pairs, in float64."""

import math

import pytest
import torch

from limaml.meta import engine, losses


def make_rows(seed=0, tasks=4, width=6):
    """Scores, labels and masks; task 0 has one class only, task 1 no row."""
    generator = torch.Generator().manual_seed(seed)
    logit = torch.randn(tasks, width, generator=generator, dtype=torch.float64) * 3
    label = (torch.rand(tasks, width, generator=generator) < 0.5).double()
    mask = (torch.rand(tasks, width, generator=generator) < 0.8).double()
    label[0], mask[1] = 1.0, 0.0
    label[2, :2], mask[2, :2] = torch.tensor([0.0, 1.0], dtype=torch.float64), 1.0
    return logit, label, mask


def pairs_of(logit, label, mask, task):
    rows = [row for row in range(logit.shape[1]) if mask[task, row]]
    positive, negative = ([row for row in rows if label[task, row] == value] for value in (1.0, 0.0))
    return [math.log1p(math.exp(logit[task, j] - logit[task, i])) for i in positive for j in negative]


def test_pairwise_is_the_mean_over_pairs_of_a_positive_and_a_negative_row():
    logit, label, mask = make_rows()
    expected = [sum(found) / len(found) if (found := pairs_of(logit, label, mask, task)) else 0.0 for task in range(4)]
    assert expected[0] == expected[1] == 0.0
    assert expected[2] > 0.0
    assert losses.pairwise(logit, label, mask).tolist() == pytest.approx(expected, abs=1e-12)


def test_only_the_order_inside_a_task_counts_for_pairs():
    logit, label, mask = make_rows()
    shifted = logit + torch.tensor([[5.0], [1.0], [-3.0], [2.0]])
    torch.testing.assert_close(
        losses.pairwise(shifted, label, mask), losses.pairwise(logit, label, mask), rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(losses.pointwise(shifted, label, mask)[2:], losses.pointwise(logit, label, mask)[2:])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mixture_has_both_with_their_shares(share):
    logit, label, mask = make_rows()
    both = share * losses.pairwise(logit, label, mask) + (1 - share) * losses.pointwise(logit, label, mask)
    torch.testing.assert_close(losses.mixed(logit, label, mask, share), both, rtol=1e-12, atol=1e-12)


def test_padding_takes_no_part_and_large_scores_stay_finite():
    logit, label, mask = make_rows()
    wild = torch.where(mask > 0, logit, 1e4).requires_grad_()
    loss = losses.mixed(wild * 300.0, label, mask, 0.5)
    torch.testing.assert_close(loss, losses.mixed(logit * 300.0, label, mask, 0.5))
    (gradient,) = torch.autograd.grad(loss.sum(), wild)
    assert gradient.isfinite().all()
    assert not gradient[mask == 0].any()


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_outer_gradient_of_pairs_equals_finite_differences(config, network, batch, share):
    """Along a random direction in the space of all parameters, through a Newton step."""
    net, tasks = (
        network(config(meta={"pairwise_share": share, "inner_step": "newton"}), seed=3),
        batch([4, 1, 0], [5, 4, 3], seed=5),
    )
    parameters = [p for p in net.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def loss():
        return engine.outer_loss(net, tasks, num_steps=2, second_order=True).loss

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True) if g is not None)
    # Central differences err by O(h^2) and by rounding O(1e-16 / h): h = 1e-5 leaves about 1e-10 of each.
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss().item())
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * step)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-7)
