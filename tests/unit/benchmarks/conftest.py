"""The benchmark models written plainly: a loop over tasks, double backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.work import Gradients, Side, Work


def plain_gradients(work: Work, steps: int) -> Gradients:
    weights = {name: weight.clone().requires_grad_() for name, weight in work.weights.items()}
    losses = []
    for task in range(work.num_tasks):
        phi = {name: weight for name, weight in weights.items() if name.startswith("meta.")}
        for _ in range(steps):
            loss = _loss(work, work.support, task, weights, _embed(work, phi, task))
            gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {name: p - work.inner_lr * g for (name, p), g in zip(phi.items(), gradients, strict=True)}
        losses.append(_loss(work, work.query, task, weights, _embed(work, phi, task)))
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()))
    return dict(zip(weights, gradients, strict=True))


def _embed(work: Work, phi: dict[str, torch.Tensor], task: int) -> torch.Tensor:
    if work.model == "task_vector":
        return phi["meta.vector"]
    hidden = F.relu(work.support.x_TRF[task] @ phi["meta.weight0"] + phi["meta.bias0"])
    return (hidden @ phi["meta.weight1"] + phi["meta.bias1"]).mean(dim=0)


def _loss(work: Work, side: Side, task: int, weights: dict[str, torch.Tensor], e: torch.Tensor) -> torch.Tensor:
    x, activation = side.x_TRF[task], F.silu
    if work.model == "reference":
        x, activation = torch.cat([x, e.repeat(len(x), 1)], dim=1), F.relu
    for layer in range(2):
        x = activation(x @ weights[f"global.weight{layer}"] + weights[f"global.bias{layer}"])
    logits = (x @ weights["global.weight2"] + weights["global.bias2"])[:, 0]
    if work.model == "task_vector":
        logits = logits + work.items_IK[side.item_TR[task]] @ e[:16] + e[16]
    return F.binary_cross_entropy_with_logits(logits, side.label_TR[task])


@pytest.fixture
def plain() -> Callable[[Work, int], Gradients]:
    return plain_gradients
