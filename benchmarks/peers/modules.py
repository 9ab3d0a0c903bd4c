"""The benchmark models as torch modules, for the libraries that loop over tasks and adapt a module.

What does not depend on the adapted block is computed once for the whole batch, as somebody who wants speed would: the task
vector's MLP logits and gathered item vectors, and the query rows' pass, after all tasks' embeddings are known.

    T tasks, S support rows, Q query rows, F features, D embedding width, K factors
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.work import Gradients, Work

Embed = Callable[[Tensor], Tensor]
"""(S, F) support rows of one task -> its embedding (D,)."""


class Problem(Protocol):
    """A model with its batch."""

    meta: nn.Module
    """What a library adapts: `Embed` as a module."""
    support: list[Tensor]
    """(S, F) support rows of each task."""

    def begin(self) -> None:
        """Compute what all tasks share, once a call, with its graph."""

    def support_loss(self, task: int, embedding_D: Tensor) -> Tensor:
        """Mean loss of one task's support rows."""

    def outer_loss(self, embeddings: list[Tensor]) -> Tensor:
        """Mean over tasks of the mean over their query rows."""

    def zero(self) -> None:
        """Forget the last call's gradients."""

    def gradients(self) -> Gradients:
        """Of the last backward pass."""


def make_problem(work: Work) -> "Reference | TaskVector":
    """The work's model as modules, weights copied."""
    return Reference(work) if work.model == "reference" else TaskVector(work)


class _Base:
    meta: nn.Module
    global_block: nn.Module

    def __init__(self, work: Work) -> None:
        self.support = list(work.support.x_TRF.unbind())
        self._label_S = list(work.support.label_TR.unbind())
        self._label_TQ = work.query.label_TR

    def zero(self) -> None:
        for parameter in (*self.meta.parameters(), *self.global_block.parameters()):
            parameter.grad = None

    def gradients(self) -> Gradients:
        found = {f"meta.{name}": gradient for name, gradient in _gradients(self.meta).items()}
        return found | {f"global.{name}": gradient for name, gradient in _gradients(self.global_block).items()}


class _RowMlp(nn.Module):
    """Mean over the rows of an MLP's output."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x_SF: Tensor) -> Tensor:
        embedding_D: Tensor = self.layers(x_SF).mean(dim=0)
        return embedding_D


class Reference(_Base):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.meta = _RowMlp(_mlp(work.block("meta"), nn.ReLU))
        self.global_block = _mlp(work.block("global"), nn.ReLU)
        self._query_TQF = work.query.x_TRF

    def begin(self) -> None:
        """Nothing is shared: every layer of the global block sees the embedding."""

    def support_loss(self, task: int, embedding_D: Tensor) -> Tensor:
        x_SF = self.support[task]
        logits_S1 = self.global_block(torch.cat([x_SF, embedding_D.expand(len(x_SF), -1)], dim=1))
        return F.binary_cross_entropy_with_logits(logits_S1[:, 0], self._label_S[task])

    def outer_loss(self, embeddings: list[Tensor]) -> Tensor:
        embedding_TQD = torch.stack(embeddings).unsqueeze(1).expand(-1, self._query_TQF.shape[1], -1)
        logits_TQ1 = self.global_block(torch.cat([self._query_TQF, embedding_TQD], dim=2))
        return F.binary_cross_entropy_with_logits(logits_TQ1[..., 0], self._label_TQ)


class _Vector(nn.Module):
    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(vector.clone())

    def forward(self, _x_SF: Tensor) -> Tensor:
        return self.vector


class TaskVector(_Base):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.meta = _Vector(work.weights["meta.vector"])
        self.global_block = _mlp(work.block("global"), nn.SiLU)
        self._work = work
        self._both_TRF = torch.cat([work.support.x_TRF, work.query.x_TRF], dim=1)

    def begin(self) -> None:
        base_TR = self.global_block(self._both_TRF)[..., 0]
        base_TS, self._base_TQ = base_TR.split(
            [self._both_TRF.shape[1] - self._label_TQ.shape[1], self._label_TQ.shape[1]], dim=1
        )
        self._base_S = base_TS.unbind()
        self._item_SK = F.embedding(self._work.support.item_TR, self._work.items_IK).unbind()

    def support_loss(self, task: int, embedding_D: Tensor) -> Tensor:
        logits_S = self._base_S[task] + self._item_SK[task] @ embedding_D[:-1] + embedding_D[-1]
        return F.binary_cross_entropy_with_logits(logits_S, self._label_S[task])

    def outer_loss(self, embeddings: list[Tensor]) -> Tensor:
        embedding_TD = torch.stack(embeddings)
        item_TQK = F.embedding(self._work.query.item_TR, self._work.items_IK)
        product_TQ = (item_TQK @ embedding_TD[:, :-1, None])[..., 0]
        return F.binary_cross_entropy_with_logits(self._base_TQ + product_TQ + embedding_TD[:, -1:], self._label_TQ)


def _mlp(weights: dict[str, Tensor], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(len(weights) // 2):
        weight = weights[f"weight{index}"]
        linear = nn.Linear(*weight.shape, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight.T)
            linear.bias.copy_(weights[f"bias{index}"])
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def _gradients(block: nn.Module) -> Gradients:
    if isinstance(block, _Vector):
        return {"vector": block.vector.grad}
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    found: Gradients = {}
    for index, linear in enumerate(linears):
        assert linear.weight.grad is not None
        found[f"weight{index}"] = linear.weight.grad.T
        found[f"bias{index}"] = linear.bias.grad
    return found
