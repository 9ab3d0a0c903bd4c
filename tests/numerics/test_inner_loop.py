"""Newton's inner step against closed forms, another optimiser and finite differences, in float64; and on any table.

S support rows, K factors; L = K + 1 numbers of a task vector
"""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from limaml.config import MetaConfig
from limaml.meta import engine, inner_loop
from limaml.meta.inner_loop import MOST_LOGITS, Labels
from limaml.models.inner_step import NewtonStep
from limaml.training.warm_start import measure_gains

SHAPES = {"factors": torch.Size([3]), "level": torch.Size([1])}


def make_step(std=0.7, gains=(1.0, 1.0), rate=1.0):
    step = NewtonStep(SHAPES, MetaConfig(prior_std=std)).double()
    step.put_gains(dict(zip(SHAPES, torch.tensor(gains, dtype=torch.float64), strict=True)))
    with torch.no_grad():
        for log_rate in step.log_rates.values():
            log_rate.add_(np.log(rate))
    return step.requires_grad_(False)


class Example:
    """Rows of one task vector: logit = base + vector . factors + level."""

    def __init__(self, num_rows, seed=0, rate=0.5, scale=1.0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.theta = {"factors": normal(3), "level": normal(1)}
        self.design_SL = torch.cat([scale * normal(num_rows, 3), torch.ones(num_rows, 1, dtype=torch.float64)], dim=1)
        self.base_S = normal(num_rows)
        label_S = (torch.rand(num_rows, generator=generator, dtype=torch.float64) < rate).double()
        self.labels = Labels(label_S, torch.ones(num_rows, dtype=torch.float64))

    def logits(self, phi):
        return self.base_S + self.design_SL @ flat(phi)

    def adapt(self, step, num_steps, second_order=False):
        return inner_loop.adapt(self.theta, self.logits, self.labels, step, num_steps=num_steps, second_order=second_order)

    def precision(self, step):
        return torch.diag(torch.cat([(1 / s**2).expand(SHAPES[name].numel()) for name, s in step.scales().items()]))

    def loss(self, phi_L, step):
        """-log posterior, but for a constant."""
        logit_S = self.base_S + self.design_SL @ phi_L
        moved_L = phi_L - flat(self.theta)
        likelihood = torch.nn.functional.binary_cross_entropy_with_logits(logit_S, self.labels.label_S, reduction="sum")
        return likelihood + moved_L @ self.precision(step) @ moved_L / 2


def flat(phi):
    return torch.cat([phi[name].flatten() for name in SHAPES])


def ridge(example, step):
    """Where one whole step ends: z = x theta + (y - p) / h with weights h, p and h at theta (reweighted least squares)."""
    theta_L, x = flat(example.theta), example.design_SL
    p = torch.sigmoid(example.logits(example.theta))
    h = torch.diag(p * (1 - p))
    z = x @ theta_L + (example.labels.label_S - p) / (p * (1 - p))
    prior = example.precision(step)
    return torch.linalg.solve(x.T @ h @ x + prior, x.T @ h @ z + prior @ theta_L)


# 2 rows: solved in the space of rows; 30: of parameters.
@pytest.mark.parametrize("num_rows", [1, 2, 30])
def test_one_step_is_ridge_regression_of_working_responses(num_rows):
    """A rate is a share of it."""
    example, wide = Example(num_rows), {"std": 0.4, "gains": (2.0, 0.5)}
    theta_L, expected = flat(example.theta), ridge(example, make_step(**wide))
    assert (example.design_SL @ (expected - theta_L)).abs().max() < MOST_LOGITS
    torch.testing.assert_close(flat(example.adapt(make_step(**wide), 1)), expected, rtol=1e-12, atol=1e-12)
    slow = flat(example.adapt(make_step(**wide, rate=0.25), 1))
    torch.testing.assert_close(slow, theta_L + 0.25 * (expected - theta_L), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_rows", [2, 30])
def test_a_step_that_would_move_a_logit_too_far_is_shortened(num_rows):
    """Along its direction, so that the row which moves most moves by the bound."""
    example, step = Example(num_rows), make_step(20.0)
    theta_L, whole = flat(example.theta), ridge(example, step)
    most = (example.design_SL @ (whole - theta_L)).abs().max()
    assert most > MOST_LOGITS
    expected = theta_L + (whole - theta_L) * MOST_LOGITS / most
    torch.testing.assert_close(flat(example.adapt(step, 1)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_rows", [1, 3, 30])
def test_twenty_steps_end_at_the_most_likely_point(num_rows):
    """Where the gradient of -log posterior is zero, and where another optimiser ends."""
    example, step = Example(num_rows, seed=num_rows), make_step(gains=(2.0, 0.5))
    found_L = flat(example.adapt(step, 20)).requires_grad_()
    (gradient_L,) = torch.autograd.grad(example.loss(found_L, step), found_L)
    assert gradient_L.abs().max() < 1e-10

    def fun(phi):
        at_L = torch.from_numpy(phi).requires_grad_()
        value = example.loss(at_L, step)
        return value.item(), torch.autograd.grad(value, at_L)[0].numpy()

    best = minimize(fun, flat(example.theta).numpy(), jac=True, method="BFGS", options={"gtol": 1e-9})
    # BFGS stops at a gradient of 1e-9, and the curvature is at least 1: the point is as near.
    np.testing.assert_allclose(found_L.detach().numpy(), best.x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 30])
def test_both_solves_give_the_same_step(num_rows, monkeypatch):
    """Systems of rows and of parameters: what is solved is chosen by their number alone."""
    example, step = Example(num_rows, seed=3), make_step()
    phi = example.adapt(step, 1)
    j_SP = inner_loop.jacobian(phi, example.logits, example.labels, step.scales())
    psi_P = torch.cat([((phi[n] - example.theta[n]) / step.scales()[n]) for n in SHAPES])
    h_S, residual_S = inner_loop._curvature(example.logits(phi), example.labels)
    systems = []
    solve = inner_loop._solve_positive
    monkeypatch.setattr(inner_loop, "_solve_positive", lambda a, b: (systems.append(len(a)), solve(a, b))[1])
    found = inner_loop._solve(j_SP, h_S, residual_S, psi_P)
    # Rows of padding make a task of few rows one of many, and the other way round zeros of parameters.
    many = [torch.cat([part, part.new_zeros(40, *part.shape[1:])]) for part in (j_SP, h_S, residual_S)]
    by_parameters = inner_loop._solve(*many, psi_P)
    few = [torch.cat([part, part.new_zeros(*part.shape[:-1], 40)], dim=-1) for part in (j_SP, psi_P)]
    by_rows = inner_loop._solve(few[0], h_S, residual_S, few[1])
    assert systems == [min(num_rows, 4), 4, num_rows]
    torch.testing.assert_close(by_parameters, found, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_rows[:4], found, rtol=1e-12, atol=1e-12)


def test_a_narrow_prior_keeps_theta_and_a_wide_one_reaches_the_maximum_likelihood():
    example = Example(200, seed=1)
    narrow = flat(example.adapt(make_step(1e-6), 5))
    # A thousand times the prior's width is what 200 rows' gradients of at most 3 each cannot reach.
    torch.testing.assert_close(narrow, flat(example.theta), rtol=0, atol=1e-9)
    wide = flat(example.adapt(make_step(1e6), 20)).requires_grad_()
    likelihood = example.loss(wide, make_step(1e6))
    (gradient_L,) = torch.autograd.grad(likelihood, wide)
    assert gradient_L.abs().max() < 1e-9
    # The prior says next to nothing: rows alone are the same point.
    p = torch.sigmoid(example.base_S + example.design_SL @ wide.detach())
    assert (example.design_SL.T @ (p - example.labels.label_S)).abs().max() < 1e-9


def test_laplaces_covariance_is_the_inverse_of_the_hessian():
    example, step = Example(12), make_step(gains=(2.0, 0.5))
    phi = example.adapt(step, 20)
    hessian_LL = torch.autograd.functional.hessian(lambda phi_L: example.loss(phi_L, step), flat(phi))
    covariance_LL = inner_loop.laplace(phi, example.logits, example.labels, step)
    torch.testing.assert_close(covariance_LL @ hessian_LL, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    # Without rows it is the prior's.
    none = Labels(example.labels.label_S, torch.zeros(12, dtype=torch.float64))
    prior_LL = inner_loop.laplace(phi, example.logits, none, step)
    torch.testing.assert_close(prior_LL @ example.precision(step), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_covariance_of_a_networks_tasks_is_that_of_their_rows(config, network, batch):
    """Of each task by itself, at its own embedding: (V^T h V + 1 / s^2)^-1; of an empty support the prior's."""
    net = network(config({"meta_block": "posterior"}))
    tasks, step = batch([4, 0, 7], [1, 1, 1]), net.step("user")
    found_TPP = engine.posterior_covariance(net, "user", tasks.support, tasks.entity_index_T)
    embedding_TD = engine.embed_tasks(net, "user", tasks.support, tasks.entity_index_T)
    state, scales = net.global_block.encode(tasks.support), step.scales()
    prior_P = torch.cat([(1.0 / scales[name] ** 2).expand(step.shapes[name]) for name in step.names]).detach()
    for task, count in enumerate((4, 0, 7)):
        v_RD = state.vectors["user"][task, :count].detach()
        p_R = torch.sigmoid(state.encoded[task, :count].detach() + v_RD @ embedding_TD[task])
        precision_PP = v_RD.T @ ((p_R * (1 - p_R)).unsqueeze(1) * v_RD) + torch.diag(prior_P)
        torch.testing.assert_close(found_TPP[task], torch.linalg.inv(precision_PP), rtol=1e-8, atol=1e-12)
    plain = network(config(meta={"inner_step": "gradient"}))
    with pytest.raises(ValueError, match=r"set meta\.inner_step to newton"):
        engine.posterior_covariance(plain, "user", tasks.support, tasks.entity_index_T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("num_rows", [1, 384])
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("level", [-30.0, 0.0, 30.0, 200.0], ids=lambda level: f"logits of {level:g}")
def test_it_is_finite_and_no_worse_than_the_prior_whatever_the_table(num_rows, rate, level, dtype):
    """No labels of one kind, one row, many, and rows that the prior is quite sure of, rightly or not."""
    example, step = Example(num_rows, seed=5, rate=rate), make_step().to(dtype)
    example.base_S = (example.base_S + level).to(dtype)
    example.design_SL, example.labels = example.design_SL.to(dtype), Labels(*(part.to(dtype) for part in example.labels))
    theta = {name: part.to(dtype) for name, part in example.theta.items()}
    example.theta = {name: part.requires_grad_() for name, part in theta.items()}
    for num_steps in (1, 3, 20):
        phi = flat(example.adapt(step, num_steps, second_order=True))
        assert torch.isfinite(phi).all()
        before, after = example.loss(flat(example.theta), step), example.loss(phi, step)
        # Sums over 384 rows; in float32 they are exact to 1e-5.
        assert after <= before * (1 + 1e-5), f"{num_steps} steps: {before} -> {after}"
    gradients = torch.autograd.grad(after, list(example.theta.values()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_no_step_raises_what_it_minimises_where_the_prior_expects_one_label_in_a_hundred(share):
    example, step = Example(384, seed=2, rate=share), make_step()
    example.theta, example.base_S = {name: torch.zeros_like(p) for name, p in example.theta.items()}, example.base_S - 4.6
    losses = [example.loss(flat(example.adapt(step, num_steps)), step).item() for num_steps in range(10)]
    assert all(after <= before + 1e-9 for before, after in pairwise(losses))
    assert losses[8] == pytest.approx(losses[-1], rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("interaction", ["product", "both"])
def test_logits_do_not_change_with_the_scale_of_vectors(config, network, batch, interaction, scale):
    """Where the task vector's own numbers shrink as the vectors grow, as they do in a fit, and gains are measured again."""
    net = network(config({"meta_block": "posterior", "interaction": interaction}, {"inner_steps": 3}))
    other, tasks = copy.deepcopy(net), batch([5, 1, 9], [4, 4, 4])
    with torch.no_grad():
        for parameter in other.global_block.items.parameters():
            parameter.mul_(scale)
        other.block("user").vector[:-1] /= scale
        if interaction == "both":
            # The factors are inputs of the MLP as well.
            first, num_features = other.global_block.mlp.linears[0], other.global_block.mlp.num_features
            first.weight[:, num_features : num_features + 2] *= scale
    found = []
    for each in (net, other):
        measure_gains(each, "user", tasks.support, tasks.entity_index_T)
        embedding_TD = engine.embed_tasks(each, "user", tasks.support, tasks.entity_index_T)
        found.append(each(tasks.query, {"user": embedding_TD}).detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    plain = net(tasks.query, {}).detach()
    assert (found[0] - plain).abs().max() > 0.1


@pytest.mark.parametrize("block", ["posterior", "id_mlp", "sequence"])
def test_gains_are_the_mean_square_of_rows_gradients(config, network, batch, block):
    net = network(config({"meta_block": block}, {"inner_step": "newton"}))
    tasks = batch([5, 1, 0], [1, 1, 1])
    measure_gains(net, "user", tasks.support, tasks.entity_index_T)
    state = net.global_block.encode(tasks.support)
    handed = engine.supports(net, "user", tasks.support, tasks.entity_index_T, state)
    squares = dict.fromkeys(net.step("user").names, 0.0)
    for task, num_rows in ((0, 5), (1, 1)):
        support = type(handed)(*(part[task] for part in handed))
        one = type(state)(state.encoded[task], {kind: v[task] for kind, v in state.vectors.items()})
        read = net.block("user").read(support)
        theta = net.block("user").start(read)
        logit_S = engine.support_logits(net, "user", read, one)(theta)
        for row in range(num_rows):
            gradients = torch.autograd.grad(logit_S[row], list(theta.values()), retain_graph=True)
            for name, gradient in zip(theta, gradients, strict=True):
                squares[name] += gradient.square().sum().item()
    for name, total in squares.items():
        assert net.step("user").gain(name).item() == pytest.approx(total / 6 or 1.0, rel=1e-12)


def test_a_step_that_asks_for_no_gains_gets_none(config, network, batch):
    net = network(config(meta={"inner_step": "gradient"}))
    tasks = batch([2], [1])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    measure_gains(net, "user", tasks.support, tasks.entity_index_T)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_outer_gradient_through_newtons_steps_equals_finite_differences(config, network, batch):
    """Of the engine itself, along random directions of each parameter; tests/numerics/test_reference.py does all at once."""
    net = network(config({"meta_block": "posterior", "start": "items"}), seed=2)
    tasks = batch([6, 1, 0], [3, 2, 2], seed=4)
    generator = torch.Generator().manual_seed(1)
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(engine.outer_loss(net, tasks).loss, [p for _, p in trained])
    # Central differences err by O(h^2) and by rounding O(1e-16 / h): h = 1e-5 leaves about 1e-10 of each.
    step = 1e-5
    for (name, parameter), gradient in zip(trained, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
            values.append(engine.outer_loss(net, tasks).loss.item())
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
        slope = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-8), name
