"""The global block's MLP over a row's features, cut where what belongs to the task comes in.

F features, E numbers of the task, H hidden width
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowMlp(nn.Module):
    """features (…, F), and beside them a task's numbers (…, E) if there are any -> logit (…).

    `encode` is what the features alone give, so that it is computed once however many times the task's numbers change:
    the logit, or the first layer before its activation.
    """

    def __init__(self, num_features: int, hidden: Sequence[int], num_beside: int = 0) -> None:
        """ReLU where numbers of a task enter: with second derivatives of zero, inner steps cost less. SiLU otherwise."""
        super().__init__()
        self.num_features, self.num_beside = num_features, num_beside
        self.activation: Callable[[Tensor], Tensor] = F.relu if num_beside else F.silu
        widths = (num_features + num_beside, *hidden, 1)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))

    @property
    def linears(self) -> Sequence[nn.Linear]:
        return cast(Sequence[nn.Linear], self.layers)

    def encode(self, x: Tensor, keep: Sequence[Tensor] = ()) -> Tensor:
        """(…) logits, or (…, H) if numbers of the task are to be added."""
        first, *rest = self.linears
        encoded = _linear(x, first.weight[:, : self.num_features], first.bias)
        return encoded if self.num_beside else self._finish(encoded, rest, keep)

    def score(self, encoded: Tensor, beside: Tensor | None = None, keep: Sequence[Tensor] = ()) -> Tensor:
        """(…) logits of what `encode` gave."""
        if beside is None:
            return encoded
        first, *rest = self.linears
        return self._finish(encoded + F.linear(beside, first.weight[:, self.num_features :]), rest, keep)

    def _finish(self, x: Tensor, rest: Sequence[nn.Linear], keep: Sequence[Tensor]) -> Tensor:
        for number, layer in enumerate(rest):
            x = self.activation(x)
            x = _linear(x * keep[number] if keep else x, layer.weight, layer.bias)
        return x.squeeze(-1)


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """x W^T + b. The copy of W turns its gradient into x^T g, which is a third faster than g^T x where x is narrow."""
    out = torch.addmm(bias_O, x.reshape(-1, x.shape[-1]), weight_OI.t().contiguous())
    return out.view(*x.shape[:-1], len(bias_O))
