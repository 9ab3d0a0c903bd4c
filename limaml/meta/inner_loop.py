"""The inner loop of one task: from theta to phi, on the logits of its support rows. `torch.func.vmap` batches it.

S support rows, P numbers of all adapted parameters
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from limaml.models.blocks import Params
from limaml.models.inner_step import GradientStep, NewtonStep

_LEAST_CURVATURE = 1e-30
"""Of a row, so that its root has a derivative; padding's gradients are 0 and count for nothing whatever it is. With 1e-12
saturated rows of long vectors moved an embedding by 1e-8."""

MOST_LOGITS = 1.75
"""That a Newton step moves any row's logit by, to first order. Where logits are linear in phi no step then raises what it
minimises: it falls if e^u - u - 1 < u r, r of the whole step and u <= r of the taken one, which holds up to u = 1.79 (Bach
2010, proposition 1). Unbounded, a task of 384 rows whose prior was 30 logits off ended with four times the loss it began
with."""

Logits = Callable[[Params], Tensor]
"""Parameters -> (S,) logits of the support rows."""


@dataclass(frozen=True)
class ThroughEmbedding:
    """Logits that depend on the parameters through embeddings alone: their gradients then cost a pass a number of those."""

    embed: Callable[[Params], Tensor]
    """Parameters -> (1, D), or (S, D) where every row has one of its own."""
    score: Callable[[Tensor], Tensor]
    """Those -> (S,) logits, row i from embedding i alone."""
    pull_rows: Callable[[Params, Tensor], Params]
    """`MetaBlock.pull_rows` of the task."""

    def __call__(self, phi: Params) -> Tensor:
        return self.score(self.embed(phi))


class Labels(NamedTuple):
    """What the logits of a support are held against."""

    label_S: Tensor
    mask_S: Tensor


def adapt(
    theta: Params, logits: Logits, labels: Labels, step: GradientStep | NewtonStep, *, num_steps: int, second_order: bool
) -> Params:
    """Phi after `num_steps` steps. First order treats what is stepped along as a constant (Finn et al. 2017, section 5.2)."""
    graph = nullcontext if second_order else torch.no_grad
    if isinstance(step, NewtonStep):
        return _newton(theta, logits, labels, step, num_steps, graph)
    phi, sizes = theta, step.sizes(labels.mask_S.sum())
    for _ in range(num_steps):
        with graph():
            logit_S, pull = torch.func.vjp(logits, phi)[:2]
            # The derivative of the rows' summed cross-entropy by their logits.
            (gradients,) = pull((torch.sigmoid(logit_S) - labels.label_S) * labels.mask_S)
        phi = {name: torch.addcmul(p, sizes[name], gradients[name], value=-1.0) for name, p in phi.items()}
    return phi


def _newton(
    theta: Params,
    logits: Logits,
    labels: Labels,
    step: NewtonStep,
    num_steps: int,
    graph: Callable[[], AbstractContextManager[object]],
) -> Params:
    """Newton (Gauss-Newton where logits are not linear in phi) on -log likelihood + |psi|^2 / 2, psi = (phi - theta) / s.

    With J the logits' gradient by psi and h = p (1 - p): (J^T h J + I) d = J^T (label - p) - psi. All its eigenvalues are at
    least 1. It is solved in the smaller of two spaces, of parameters or of rows, and d shortened to move no logit by more than
    `MOST_LOGITS`.
    """
    phi, scales, rates = theta, step.scales(), step.rates()
    for _ in range(num_steps):
        with graph():
            j_SP = jacobian(phi, logits, labels, scales)
            psi_P = torch.cat([((phi[name] - theta[name]) / scales[name]).flatten() for name in phi])
            h_S, residual_S = _curvature(logits(phi), labels)
            d_P = _bounded(_solve(j_SP, h_S, residual_S, psi_P), j_SP)
        parts = torch.split(d_P, [p.numel() for p in phi.values()])
        steps = dict(zip(phi, parts, strict=True))
        phi = {name: p + rates[name] * scales[name] * steps[name].view(p.shape) for name, p in phi.items()}
    return phi


def jacobian(phi: Params, logits: Logits, labels: Labels, scales: Params) -> Tensor:
    """(S, P) gradient of each row's logit by all parameters in units of their scales, 0 for padding."""
    found = _by_parameters(phi, logits, len(labels.mask_S))
    by_name = [found[name].flatten(1) * scales[name] for name in phi]
    return torch.cat(by_name, dim=1) * labels.mask_S.unsqueeze(1)


def _by_parameters(phi: Params, logits: Logits, num_rows: int) -> Params:
    """(S, ...) gradient of each row's logit by each tensor."""
    if not isinstance(logits, ThroughEmbedding):
        found: Params = torch.func.jacrev(logits)(phi)
        return found
    own = logits.embed(phi)
    # A row's logit depends on its own embedding only, so one pass gives all rows' gradients by theirs.
    by_own_SD = torch.func.grad(lambda e_SD: logits.score(e_SD).sum())(own.expand(num_rows, -1))
    if len(own) > 1:
        return logits.pull_rows(phi, by_own_SD)
    shared: Params = torch.func.jacrev(lambda at: logits.embed(at)[0])(phi)
    return {name: by_own_SD @ by_parameter.flatten(1) for name, by_parameter in shared.items()}


def _curvature(logit_S: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """(S,) second derivative of each row's loss by its logit, and minus the first; 0 for padding."""
    p_S = torch.sigmoid(logit_S)
    return p_S * (1.0 - p_S) * labels.mask_S, (labels.label_S - p_S) * labels.mask_S


def _solve(j_SP: Tensor, h_S: Tensor, residual_S: Tensor, psi_P: Tensor) -> Tensor:
    """(P,) d of `_newton`."""
    num_rows, num_parameters = j_SP.shape
    if num_parameters <= num_rows:
        a_PP = j_SP.T @ (h_S.unsqueeze(1) * j_SP) + torch.eye(num_parameters, dtype=j_SP.dtype, device=j_SP.device)
        return _solve_positive(a_PP, residual_S @ j_SP - psi_P)
    # psi + d = J^T a: the same system seen from the rows (Rasmussen and Williams 2006, algorithm 3.1).
    b_S = h_S * (j_SP @ psi_P) + residual_S
    root_S = h_S.clamp(min=_LEAST_CURVATURE).sqrt()
    weighted_SP = root_S.unsqueeze(1) * j_SP
    b_SS = weighted_SP @ weighted_SP.T + torch.eye(num_rows, dtype=j_SP.dtype, device=j_SP.device)
    a_S = b_S - root_S * _solve_positive(b_SS, root_S * (j_SP @ (b_S @ j_SP)))
    return a_S @ j_SP - psi_P


def _bounded(d_P: Tensor, j_SP: Tensor) -> Tensor:
    moved_S = (j_SP @ d_P).abs()
    return d_P * MOST_LOGITS / torch.cat([moved_S, moved_S.new_full((1,), MOST_LOGITS)]).amax()


def _solve_positive(a_NN: Tensor, b_N: Tensor) -> Tensor:
    """(N,) a^-1 b of a positive definite a."""
    found: Tensor = torch.cholesky_solve(b_N.unsqueeze(1), torch.linalg.cholesky(a_NN)).squeeze(1)
    return found


def laplace(phi: Params, logits: Logits, labels: Labels, step: NewtonStep) -> Tensor:
    """(P, P) covariance of the posterior's Gaussian approximation at phi, parameters in their order."""
    scales = step.scales()
    j_SP = jacobian(phi, logits, labels, scales)
    h_S, _ = _curvature(logits(phi), labels)
    precision_PP = j_SP.T @ (h_S.unsqueeze(1) * j_SP) + torch.eye(j_SP.shape[1], dtype=j_SP.dtype, device=j_SP.device)
    scale_P = torch.cat([scales[name].expand(p.numel()) for name, p in phi.items()])
    covariance_PP: Tensor = scale_P.unsqueeze(1) * torch.linalg.inv(precision_PP) * scale_P
    return covariance_PP
