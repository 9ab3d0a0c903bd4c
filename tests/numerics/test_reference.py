"""The plain reference against mathematics derived by hand, and against finite differences, in float64."""

import math

import pytest
import torch
from torch import Tensor

from limaml.meta import engine, reference
from limaml.models.blocks import FACTORS, LEVEL

BLOCKS = (
    {"meta_block": "task_vector"},
    {"meta_block": "posterior"},
    {"meta_block": "id_mlp"},
    {"meta_block": "row_mlp"},
    {"meta_block": "sequence", "sequence_adapts": "all"},
    {"meta_block": "sequence", "sequence_adapts": "last"},
    {"meta_block": "set"},
    {"meta_block": "hybrid"},
    {"meta_block": "task_vector", "pool_half_life_days": 0.5},
    {"meta_block": "sequence", "pool_half_life_days": 0.5},
)


def test_inner_loop_on_a_quadratic_is_the_closed_form():
    """L(phi) = a/2 (phi - b)^2 gives phi_K = b + r^K (theta - b), r = 1 - lr a, for every K; theta is left as it was."""
    a, b, lr, start = 0.7, 2.0, 0.3, -1.0
    theta = {"x": torch.tensor(start, dtype=torch.float64, requires_grad=True)}
    rates = {"x": torch.tensor(lr, dtype=torch.float64)}
    for num_steps in range(5):
        phi = reference.adapt(theta, lambda p: a / 2 * (p["x"] - b) ** 2, rates, num_steps=num_steps)
        assert phi["x"].item() == pytest.approx(b + (1 - lr * a) ** num_steps * (start - b), abs=1e-14)
    assert theta["x"].item() == start


@pytest.mark.parametrize("second_order", [True, False])
def test_outer_gradient_on_a_quadratic_is_the_closed_form(second_order):
    """With outer loss (phi_K - c)^2 / 2 and r = 1 - lr a:

    second order: d/dtheta = (phi_K - c) r^K and d/dlr = -(phi_K - c) K r^(K-1) a (theta - b);
    first order (gradients are constants): d/dtheta = phi_K - c and d/dlr = -(phi_K - c) sum_k a r^k (theta - b).
    """
    a, b, c, steps = 0.7, 2.0, 0.5, 3
    theta = {"x": torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)}
    rates = {"x": torch.tensor(0.3, dtype=torch.float64, requires_grad=True)}
    phi = reference.adapt(theta, lambda p: a / 2 * (p["x"] - b) ** 2, rates, num_steps=steps, second_order=second_order)["x"]
    by_theta, by_rate = torch.autograd.grad((phi - c) ** 2 / 2, [theta["x"], rates["x"]])
    r, residual, offset = 1 - 0.3 * a, phi.item() - c, -1.0 - b
    if second_order:
        assert by_theta.item() == pytest.approx(residual * r**steps, abs=1e-14)
        assert by_rate.item() == pytest.approx(-residual * steps * r ** (steps - 1) * a * offset, abs=1e-14)
    else:
        assert by_theta.item() == pytest.approx(residual, abs=1e-14)
        assert by_rate.item() == pytest.approx(-residual * sum(a * r**k for k in range(steps)) * offset, abs=1e-14)


def test_one_step_of_the_task_vector_is_logistic_regression(config, network, batch):
    """With logit = b + e_1 v + e_2: e' = e - rate / (n + c) * sum over rows of (sigmoid - y) [v, 1], rate and c per entry."""
    net = network(config({"embedding_dim": 2}, {"inner_steps": 1, "inner_step": "gradient"}))
    bias, v, e, rate, c = 0.3, -1.3, (0.4, -0.2), (0.25, 0.9), (1.7, 0.6)
    with torch.no_grad():
        net.global_block.mlp.linears[-1].weight.zero_()
        net.global_block.mlp.linears[-1].bias.fill_(bias)
        net.global_block.items.item.fill_(v)
        net.block("user").vector.copy_(torch.tensor(e))
        for at, name in enumerate((FACTORS, LEVEL)):
            net.step("user").log_rates[name].fill_(math.log(rate[at]))
            net.step("user").log_damping[name].fill_(math.log(c[at]))
    tasks = batch([3], [1])
    tasks.support.item_index_TR.clamp_(min=1)
    prior = net.block("user").vector.tolist()
    surprise = (1 / (1 + math.exp(-(bias + prior[0] * v + prior[1]))) - tasks.support.label_TR[0]).sum()
    expected = [prior[j] - rate[j] / (3 + c[j]) * surprise.item() * (v, 1.0)[j] for j in range(2)]
    support, entity = reference.real_rows(tasks.support, 0), tasks.entity_index_T[0]
    by_reference = reference.task_embedding(net, "user", support, entity, num_steps=1, second_order=True)
    by_engine = engine.embed_tasks(net, "user", tasks.support, tasks.entity_index_T)[0]
    assert by_reference.tolist() == pytest.approx(expected, abs=1e-13)
    assert by_engine.tolist() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("inner_step", ["gradient", "newton"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda model: "-".join(map(str, model.values())))
def test_outer_gradient_equals_finite_differences(config, network, batch, block, inner_step):
    """Along a random direction in the space of all parameters, rates, damping and the prior's width included."""
    net = network(config(block, {"inner_step": inner_step}), seed=3)
    tasks = batch([4, 1, 0], [3, 2, 2], seed=5)
    parameters = [p for p in net.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def loss() -> Tensor:
        return reference.outer_loss(net, tasks, num_steps=2, second_order=True)[0]

    # A block that takes no steps has no use for its rates.
    gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True, allow_unused=True)
    slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
    # Central differences err by O(h^2) and by rounding O(1e-16 / h): h = 1e-5 leaves about 1e-10 of each.
    step = 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
        values.append(loss().item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * step)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6, abs=1e-8)
