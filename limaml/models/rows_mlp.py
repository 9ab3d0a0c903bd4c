"""The global block's MLP over rows, forward and back in one function each, without a graph of its layers.

Where the loss follows from the rows at once, as a query's does, its gradients are computed with it: nothing is kept for later.

    T tasks, R rows, F features, H hidden width, K factors, D = K + 1 embedding width, I inputs, O outputs
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from limaml.models.dense import by_weight, product, rows

Layer = tuple[Tensor, Tensor]
"""Weight (O, I) and bias (O,)."""


def mlp_logits(x_TRF: Tensor, layers: Sequence[Layer], keep: Sequence[Tensor] = ()) -> Tensor:
    """(T, R, 1) logits of a SiLU network. Differentiable once, by its weights.

    `keep` is dropout's of the last rows, for every hidden layer (T, Q, H): all rows, or those of a query behind a support's.
    """
    flat = [tensor for layer in layers for tensor in layer]
    out: Tensor = _Logits.apply(tuple(keep), x_TRF, *flat)  # type: ignore[no-untyped-call]
    return out


def mlp_loss(
    x_TRF: Tensor,
    layers: Sequence[Layer],
    embedding_TD: Tensor,
    shift_TH: Tensor,
    item_TRK: Tensor | None,
    label_TR: Tensor,
    mask_TR: Tensor,
    keep: Sequence[Tensor],
    num_tasks: int,
) -> tuple[Tensor, Tensor]:
    """Sum over tasks of the mean of their rows' cross-entropies, divided by `num_tasks`, and (T,) those means, detached.

    The logit is layers(x) of a ReLU network with `shift_TH` added to the first layer, plus <embedding, [item, 1]> where there
    are items. Differentiable once by all but x, labels, mask and keep.
    """
    flat = [tensor for layer in layers for tensor in layer]
    constants = tuple(keep), num_tasks, torch.is_grad_enabled()
    found: tuple[Tensor, Tensor] = _Loss.apply(  # type: ignore[no-untyped-call]
        constants, x_TRF, embedding_TD, shift_TH, item_TRK, label_TR, mask_TR, *flat
    )
    return found


def _forward(
    flat: Sequence[Tensor], x: Tensor, shift_TH: Tensor | None, keep: Sequence[Tensor], *, relu: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits (T, R, 1), every layer's inputs, and what entered each activation (of a ReLU, what came out)."""
    inputs, inner = [x], []
    for number, (weight_OI, bias_O) in enumerate(zip(flat[:-2:2], flat[1:-2:2], strict=True)):
        shifted = shift_TH is not None and number == 0
        y = product(inputs[-1], weight_OI, bias_O, relu=relu and not shifted)
        if shift_TH is not None and shifted:
            y = y.add_(shift_TH.unsqueeze(1)).relu_()
        h = y if relu else F.silu(y)
        inner.append(y)
        inputs.append(_dropped(h.clone() if relu else h, keep[number]) if keep else h)
    return F.linear(inputs[-1], flat[-2], flat[-1]), inputs, inner


def _backward(
    flat: Sequence[Tensor],
    by_logit_TR1: Tensor,
    inputs: Sequence[Tensor],
    inner: Sequence[Tensor],
    keep: Sequence[Tensor],
    *,
    relu: bool,
) -> tuple[list[Tensor], Tensor]:
    """Gradients in the order of `flat`, and that of the first layer's output before its activation."""
    found = [by_logit_TR1.sum().unsqueeze(0), by_weight(by_logit_TR1, inputs[-1])]
    g = by_logit_TR1 * flat[-2]
    for number in range(len(inner) - 1, -1, -1):
        g = _dropped(g, keep[number]) if keep else g
        if relu:
            torch.ops.aten.threshold_backward.grad_input(g, inner[number], 0, grad_input=g)
        else:
            torch.ops.aten.silu_backward.grad_input(g, inner[number], grad_input=g)
        found += [rows(g).sum(dim=0), by_weight(g, inputs[number])]
        if number:
            g = product(g, flat[2 * number].t())
    return found[::-1], g


def _dropped(x_TRH: Tensor, keep_TQH: Tensor) -> Tensor:
    """The last Q rows multiplied in place."""
    x_TRH[:, x_TRH.shape[1] - keep_TQH.shape[1] :].mul_(keep_TQH)
    return x_TRH


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: tuple[Tensor, ...], x_TRF: Tensor, *flat: Tensor) -> Tensor:
        logit_TR1, inputs, inner = _forward(flat, x_TRF, None, keep, relu=False)
        ctx.num_layers, ctx.keep = len(inputs), keep
        ctx.save_for_backward(*inputs, *inner, *flat)
        return logit_TR1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logit_TR1: Tensor) -> tuple[Tensor | None, ...]:
        n, saved = ctx.num_layers, ctx.saved_tensors
        found, _ = _backward(saved[2 * n - 1 :], by_logit_TR1, saved[:n], saved[n : 2 * n - 1], ctx.keep, relu=False)
        return None, None, *found


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        constants: tuple[tuple[Tensor, ...], int, bool],
        x_TRF: Tensor,
        embedding_TD: Tensor,
        shift_TH: Tensor,
        item_TRK: Tensor | None,
        label_TR: Tensor,
        mask_TR: Tensor,
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor]:
        keep, num_tasks, needs_gradient = constants
        share_TR = mask_TR / mask_TR.sum(dim=1, keepdim=True).clamp(min=1.0)
        logit_TR1, inputs, inner = _forward(flat, x_TRF, shift_TH, keep, relu=True)
        if item_TRK is not None:
            logit_TR1 = logit_TR1.add_(along_items(item_TRK, embedding_TD))
        logit_TR = logit_TR1.squeeze(-1)
        per_task_T = (F.binary_cross_entropy_with_logits(logit_TR, label_TR, reduction="none") * share_TR).sum(dim=1)
        if needs_gradient:
            by_logit_TR1 = ((logit_TR.sigmoid() - label_TR) * (share_TR / num_tasks)).unsqueeze(-1)
            by_layers, by_first_TRH = _backward(flat, by_logit_TR1, inputs, inner, keep, relu=True)
            by_shift_TH = by_first_TRH.sum(dim=1)
            by_embedding_TD = None if item_TRK is None else over_items(by_logit_TR1, item_TRK)
            by_item_TRK = by_logit_TR1 * embedding_TD[:, None, :-1] if ctx.needs_input_grad[4] else None
            ctx.gradients = [by_embedding_TD, by_shift_TH, by_item_TRK, *by_layers]
        ctx.mark_non_differentiable(per_task_T)
        return per_task_T.sum() / num_tasks, per_task_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_embedding_TD, by_shift_TH, by_item_TRK, *by_layers = (g if g is None else g * by_loss for g in ctx.gradients)
        return None, None, by_embedding_TD, by_shift_TH, by_item_TRK, None, None, *by_layers


def product_loss(
    logit_TR1: Tensor, item_TRK: Tensor, embedding_TD: Tensor, label_TR: Tensor, mask_TR: Tensor, num_tasks: int
) -> tuple[Tensor, Tensor]:
    """As `mlp_loss`, of rows whose logit is logit + <embedding, [item, 1]>. Differentiable by logit, item and embedding."""
    found: tuple[Tensor, Tensor] = _ProductLoss.apply(  # type: ignore[no-untyped-call]
        logit_TR1, item_TRK, embedding_TD, label_TR, mask_TR, num_tasks
    )
    return found


class _ProductLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logit_TR1: Tensor, item_TRK: Tensor, embedding_TD: Tensor, label_TR: Tensor, mask_TR: Tensor, num_tasks: int
    ) -> tuple[Tensor, Tensor]:
        share_TR = mask_TR / mask_TR.sum(dim=1, keepdim=True).clamp_(min=1.0)
        logit_TR = along_items(item_TRK, embedding_TD).add_(logit_TR1).squeeze(-1)
        per_task_T = (F.binary_cross_entropy_with_logits(logit_TR, label_TR, reduction="none") * share_TR).sum(dim=1)
        by_logit_TR1 = logit_TR.sigmoid_().sub_(label_TR).mul_(share_TR).unsqueeze(-1)
        ctx.save_for_backward(by_logit_TR1, item_TRK, embedding_TD)
        ctx.num_tasks = num_tasks
        ctx.mark_non_differentiable(per_task_T)
        return per_task_T.sum() / num_tasks, per_task_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_logit_TR1, item_TRK, embedding_TD = ctx.saved_tensors
        by_logit_TR1 = by_logit_TR1 * (by_loss / ctx.num_tasks)
        by_item_TRK = by_logit_TR1 * embedding_TD[:, None, :-1] if ctx.needs_input_grad[1] else None
        return by_logit_TR1, by_item_TRK, over_items(by_logit_TR1, item_TRK), None, None, None


def product_pull(logit_TR1: Tensor, item_TRK: Tensor, embedding_TD: Tensor, label_TR: Tensor, mask_TR: Tensor) -> Tensor:
    """(T, D) gradient of each task's summed cross-entropy by its embedding, the logit being logit + <embedding, [item, 1]>.

    Differentiable once by logit, items and embedding.
    """
    out: Tensor = _ProductPull.apply(logit_TR1, item_TRK, embedding_TD, label_TR, mask_TR)  # type: ignore[no-untyped-call]
    return out


class _ProductPull(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logit_TR1: Tensor, item_TRK: Tensor, embedding_TD: Tensor, label_TR: Tensor, mask_TR: Tensor
    ) -> Tensor:
        probability_TR1 = torch.sigmoid_(along_items(item_TRK, embedding_TD).add_(logit_TR1))
        residual_TR1 = (probability_TR1 - label_TR.unsqueeze(-1)).mul_(mask_TR.unsqueeze(-1))
        ctx.save_for_backward(item_TRK, embedding_TD, mask_TR, probability_TR1, residual_TR1)
        return over_items(residual_TR1, item_TRK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        item_TRK, embedding_TD, mask_TR, probability_TR1, residual_TR1 = ctx.saved_tensors
        by_residual_TR1 = along_items(item_TRK, by_gradient_TD).mul_(mask_TR.unsqueeze(-1))
        by_logit_TR1 = torch.ops.aten.sigmoid_backward(by_residual_TR1, probability_TR1)
        by_item_TRK = None
        if ctx.needs_input_grad[1]:
            by_item_TRK = residual_TR1 * by_gradient_TD[:, None, :-1] + by_logit_TR1 * embedding_TD[:, None, :-1]
        return by_logit_TR1, by_item_TRK, over_items(by_logit_TR1, item_TRK), None, None


def along_items(item_TRK: Tensor, vector_TD: Tensor) -> Tensor:
    """(T, R, 1) <vector, [item, 1]>.

    Multiplied and summed, here and below: torch.bmm took as long for one column a task and four times as long for one row, and
    its sums depend on a task's place in the batch (MKL, matrices of odd width).
    """
    return (item_TRK * vector_TD[:, None, :-1]).sum(dim=-1, keepdim=True) + vector_TD[:, None, -1:]


def over_items(weight_TR1: Tensor, item_TRK: Tensor) -> Tensor:
    """(T, D) sum over rows of weight * [item, 1]."""
    return torch.cat([(weight_TR1 * item_TRK).sum(dim=1), weight_TR1.sum(dim=1)], dim=-1)
