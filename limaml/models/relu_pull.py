"""The gradient of a task's summed cross-entropy by what is added to the first layer of a ReLU network, written out, and its own
derivative.

For the weights that a row sees, those whose ReLUs are on, the network is linear: with J_l the derivative of the row's logit by
hidden layer l,

    residual = sigmoid(logit) - label,        gradient = sum over rows of residual * J_1

and the derivative of that needs J once more, not another pass: with u the adjoint of the gradient and v that of the residual,
z = (J_1 u + v) sigmoid' is the adjoint of the logit, so that of layer l's input is z J_l, and that of its weights is
J_l^T (residual * on(u) + z h_{l-1}), one product instead of two.

    T tasks, R rows, H hidden width, O outputs, I inputs
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from limaml.models.dense import by_weight, is_plain, product, rows

Layer = tuple[Tensor, Tensor]
"""Weight (O, I) and bias (O,)."""


def relu_pull(
    first_TRH: Tensor, shift_TH: Tensor, layers: Sequence[Layer], extra_TR1: Tensor, label_TR: Tensor, mask_TR: Tensor
) -> tuple[Tensor, Tensor]:
    """(T, H) gradient by `shift_TH`, and (T, R, 1) residuals, which are 0 where the mask is.

    The logit is layers(relu(first + shift)) + extra, with ReLUs between the layers. Differentiable once, by everything but
    labels and mask.
    """
    flat = [tensor for layer in layers for tensor in layer]
    if is_plain():
        return _plain_pull(first_TRH, shift_TH, layers, extra_TR1, label_TR, mask_TR)
    found: tuple[Tensor, Tensor] = _Pull.apply(first_TRH, shift_TH, extra_TR1, label_TR, mask_TR, *flat)  # type: ignore[no-untyped-call]
    return found


def _plain_pull(
    first_TRH: Tensor, shift_TH: Tensor, layers: Sequence[Layer], extra_TR1: Tensor, label_TR: Tensor, mask_TR: Tensor
) -> tuple[Tensor, Tensor]:
    hidden = [F.relu(first_TRH + shift_TH.unsqueeze(1))]
    for weight_OI, bias_O in layers[:-1]:
        hidden.append(F.relu(F.linear(hidden[-1], weight_OI, bias_O)))
    logit_TR1 = F.linear(hidden[-1], *layers[-1]) + extra_TR1
    d = residual_TR1 = (torch.sigmoid(logit_TR1) - label_TR.unsqueeze(-1)) * mask_TR.unsqueeze(-1)
    for (weight_OI, _), x in zip(reversed(layers), reversed(hidden), strict=True):
        d = (d @ weight_OI) * (x.detach() > 0)
    return d.sum(dim=1), residual_TR1


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        first_TRH: Tensor,
        shift_TH: Tensor,
        extra_TR1: Tensor,
        label_TR: Tensor,
        mask_TR: Tensor,
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights, biases = flat[::2], flat[1::2]
        hidden = [(first_TRH + shift_TH.unsqueeze(1)).relu_()]
        for weight_OI, bias_O in zip(weights[:-1], biases[:-1], strict=True):
            hidden.append(product(hidden[-1], weight_OI, bias_O, relu=True))
        probability_TR1 = torch.sigmoid(F.linear(hidden[-1], weights[-1], biases[-1]).add_(extra_TR1))
        residual_TR1 = (probability_TR1 - label_TR.unsqueeze(-1)) * mask_TR.unsqueeze(-1)
        # From the last hidden layer to the first.
        slopes = [_where_on(weights[-1].expand_as(hidden[-1]), hidden[-1])]
        for weight_OI, x in zip(reversed(weights[:-1]), reversed(hidden[:-1]), strict=True):
            slopes.append(_where_on_(product(slopes[-1], weight_OI.t()), x))
        slopes.reverse()
        ctx.num_hidden = len(hidden)
        ctx.save_for_backward(probability_TR1, residual_TR1, mask_TR, *hidden, *slopes, *weights)
        return (residual_TR1 * slopes[0]).sum(dim=1), residual_TR1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_gradient_TH: Tensor, by_residual_TR1: Tensor) -> tuple[Tensor | None, ...]:
        probability_TR1, residual_TR1, mask_TR, *rest = ctx.saved_tensors
        hidden, slopes, weights = (rest[n * ctx.num_hidden : (n + 1) * ctx.num_hidden] for n in range(3))
        slope_TRH = slopes[0]
        # Not torch.bmm: with one row or column a task it took up to three times as long.
        by_residual_TR1 = (slope_TRH * by_gradient_TH.unsqueeze(1)).sum(dim=-1, keepdim=True) + by_residual_TR1
        by_logit_TR1 = torch.ops.aten.sigmoid_backward(by_residual_TR1, probability_TR1).mul_(mask_TR.unsqueeze(-1))
        # What the slopes do to the gradient, on its way up the layers.
        rising = _where_on(by_gradient_TH.unsqueeze(1).expand_as(slope_TRH), hidden[0]).mul_(residual_TR1)
        by_weights: list[Tensor] = []
        for x, weight_OI, above, slope in zip(hidden[:-1], weights[:-1], hidden[1:], slopes[1:], strict=True):
            by_weights.append(by_weight(slope, torch.addcmul(rising, by_logit_TR1, x)))
            by_weights.append((rows(slope).t() @ rows(by_logit_TR1)).squeeze(-1))
            rising = _where_on_(product(rising, weight_OI), above)
        by_weights.append(rows(rising).sum(dim=0, keepdim=True) + rows(by_logit_TR1).t() @ rows(hidden[-1]))
        by_weights.append(by_logit_TR1.sum().unsqueeze(0))
        by_first_TRH = by_logit_TR1 * slope_TRH
        return by_first_TRH, by_first_TRH.sum(dim=1), by_logit_TR1, None, None, *by_weights


def _where_on(x: Tensor, hidden: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten.threshold_backward(x, hidden, 0)
    return out


def _where_on_(x: Tensor, hidden: Tensor) -> Tensor:
    torch.ops.aten.threshold_backward.grad_input(x, hidden, 0, grad_input=x)
    return x
