"""All inner steps of a task vector whose embedding is multiplied with items, as steps of the rows' logits.

With V = [item, 1] of a task's rows, e_{k+1} = e_k - size * V^T r_k moves the logits by z_{k+1} = z_k - G r_k, where
G = V diag(size) V^T is made once: a step is a product of R x R with a vector, whatever D, and the vector itself follows from
the sum of the residuals r_k = sigmoid(z_k) - label. Forward and back are one function: of short supports the calls cost more
than the arithmetic.

    T tasks, R rows, K factors, D = K + 1, N steps
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limaml.models.rows_mlp import along_items, over_items

MOST_ROWS = 32
"""G costs R * R * D, a step of the vector 2 R * D: with more rows and the usual 3 steps G costs more than it saves."""


def vector_steps(
    vector_TD: Tensor,
    size_TD: Tensor,
    logit_TR1: Tensor,
    item_TRK: Tensor,
    label_TR: Tensor,
    mask_TR: Tensor,
    num_steps: int,
) -> Tensor:
    """(T, D) the vector after `num_steps` steps. Differentiable once by vector, size, logit and item."""
    out: Tensor = _Steps.apply(  # type: ignore[no-untyped-call]
        vector_TD, size_TD.expand_as(vector_TD), logit_TR1, item_TRK, label_TR, mask_TR, num_steps
    )
    return out


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        vector_TD: Tensor,
        size_TD: Tensor,
        logit_TR1: Tensor,
        item_TRK: Tensor,
        label_TR: Tensor,
        mask_TR: Tensor,
        num_steps: int,
    ) -> Tensor:
        label_TR1, mask_TR1, gram_TRR = label_TR.unsqueeze(-1), mask_TR.unsqueeze(-1), None
        if num_steps > 1:
            gram_TRR = torch.baddbmm(size_TD[:, None, -1:], item_TRK * size_TD[:, None, :-1], item_TRK.transpose(1, 2))
            # Padding neither moves a logit nor is moved, so that the residuals need no mask at every step.
            gram_TRR.mul_(mask_TR1).mul_(mask_TR.unsqueeze(1))
        z_TR1 = along_items(item_TRK, vector_TD).add_(logit_TR1)
        probabilities: list[Tensor] = []
        residuals: list[Tensor] = []
        for _ in range(num_steps):
            if gram_TRR is not None and residuals:
                z_TR1 = torch.baddbmm(z_TR1, gram_TRR, residuals[-1], alpha=-1)
            probabilities.append(torch.sigmoid(z_TR1))
            residuals.append(probabilities[-1] - label_TR1)
        summed_TD = over_items(sum(residuals[1:], residuals[0]) * mask_TR1, item_TRK)
        ctx.num_steps = num_steps
        ctx.save_for_backward(vector_TD, size_TD, item_TRK, mask_TR1, gram_TRR, summed_TD, *probabilities, *residuals)
        return torch.addcmul(vector_TD, size_TD, summed_TD, value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_vector_TD: Tensor) -> tuple[Tensor | None, ...]:
        vector_TD, size_TD, item_TRK, mask_TR1, gram_TRR, summed_TD, *rest = ctx.saved_tensors
        probabilities, residuals = rest[: ctx.num_steps], rest[ctx.num_steps :]
        by_sum_TD = -size_TD * by_vector_TD
        # What each residual does through the vector itself; through the later logits it does more.
        direct_TR1 = along_items(item_TRK, by_sum_TD).mul_(mask_TR1)
        by_logits: list[Tensor] = []
        """Adjoints of the logits of steps N, N - 1, ... 1, each with all that follows from it."""
        for p_TR1 in reversed(probabilities):
            by_residual_TR1 = direct_TR1
            if by_logits:
                by_residual_TR1 = torch.baddbmm(direct_TR1, gram_TRR, by_logits[-1], alpha=-1)
            by_logit_TR1 = torch.ops.aten.sigmoid_backward(by_residual_TR1, p_TR1)
            by_logits.append(by_logit_TR1.add_(by_logits[-1]) if by_logits else by_logit_TR1)
        first_TR1 = by_logits[-1]
        by_start_TD = by_vector_TD + over_items(first_TR1, item_TRK)
        by_size_TD, by_item_TRK = None, None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            residuals = [residual_TR1 * mask_TR1 for residual_TR1 in residuals]
            by_size_TD, by_item_TRK = _by_gram(size_TD, item_TRK, by_logits[:-1][::-1], residuals[:-1])
            by_size_TD = by_size_TD - by_vector_TD * summed_TD
            total_TR1 = sum(residuals[1:], residuals[0])
            by_item_TRK = by_item_TRK + total_TR1 * by_sum_TD[:, None, :-1] + first_TR1 * vector_TD[:, None, :-1]
        return by_start_TD, by_size_TD, first_TR1, by_item_TRK, None, None, None


def _by_gram(size_TD: Tensor, item_TRK: Tensor, by_logits: list[Tensor], residuals: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of sizes and items through G: of sum over steps of -<by_logit, G residual>, with V^T of both made once."""
    if not residuals:
        return torch.zeros_like(size_TD), torch.zeros_like(item_TRK)
    ones_TR1 = torch.ones_like(item_TRK[..., :1])
    v_TDR = torch.cat([item_TRK, ones_TR1], dim=-1).transpose(1, 2)
    z_TRN, r_TRN = torch.cat(by_logits, dim=-1), torch.cat(residuals, dim=-1)
    vz_TDN, vr_TDN = torch.bmm(v_TDR, z_TRN), torch.bmm(v_TDR, r_TRN)
    by_size_TD = -(vz_TDN * vr_TDN).sum(dim=-1)
    sized_vz_TND, sized_vr_TND = ((found * size_TD.unsqueeze(-1)).transpose(1, 2) for found in (vz_TDN, vr_TDN))
    by_item_TRD = torch.bmm(z_TRN, sized_vr_TND) + torch.bmm(r_TRN, sized_vz_TND)
    return by_size_TD, -by_item_TRD[..., :-1]
