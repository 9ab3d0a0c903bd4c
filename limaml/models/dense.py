"""Dense layers with hand-written gradients: one matrix product each, the rest fused into it or done in place.

In float32 on a CPU the products go through oneDNN, elsewhere through `torch.mm`: the same numbers up to the order of sums.
Derivatives are first order only: the inner loop's own gradients are written out, and differentiated once.
Inside `plain_layers()` the same functions are ordinary differentiable operations, which `torch.func` can batch.

    N rows, I inputs, O outputs
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
_ONEDNN_ROWS = 512
"""MKL, behind torch.mm, reaches 0.5 to 0.9 of oneDNN's speed on AMD processors, but a call of oneDNN costs 12 us more."""
_LONG_SUM, _PARTS = 4096, 8
_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Use ordinary operations, slower and open to `torch.func`."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    return _plain.get()


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b for x of shape (..., I)."""
    if is_plain():
        return F.linear(x, weight_OI, bias_O)
    out: Tensor = _Linear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return out


def linear_relu(x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """relu(x W^T + b) for x of shape (..., I)."""
    if is_plain():
        return F.relu(F.linear(x, weight_OI, bias_O))
    out: Tensor = _LinearRelu.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return out


def gate(d: Tensor, hidden: Tensor) -> Tensor:
    """d where hidden > 0, else 0. Differentiable in d."""
    if is_plain():
        return d * (hidden.detach() > 0)
    out: Tensor = _Gate.apply(d, hidden.detach())  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        return _gradients(ctx.needs_input_grad, x, weight_OI, grad)


class _LinearRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        out = product(x, weight_OI, bias_O, relu=True)
        ctx.save_for_backward(x, weight_OI, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, out = ctx.saved_tensors
        return _gradients(ctx.needs_input_grad, x, weight_OI, torch.ops.aten.threshold_backward(grad, out, 0))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, d: Tensor, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        out: Tensor = torch.ops.aten.threshold_backward(d, hidden, 0)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0), None


def _gradients(needed: tuple[bool, ...], x: Tensor, weight_OI: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    by_x = product(grad, weight_OI.t()) if needed[0] else None
    return by_x, by_weight(grad, x) if needed[1] else None, rows(grad).sum(0) if needed[2] else None


def product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """x W^T + b, and relu of it."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and _ONEDNN and x.numel() >= _ONEDNN_ROWS * x.shape[-1]:
        # A block cut out of a larger matrix would be multiplied by a plain loop, 400 times slower.
        if not (weight_OI.is_contiguous() or weight_OI.t().is_contiguous()):
            weight_OI = weight_OI.contiguous()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "relu" if relu else "none", [], "")
        return out
    out = F.linear(x, weight_OI, bias_O)
    return out.relu_() if relu else out


def by_weight(grad: Tensor, x: Tensor) -> Tensor:
    """(O, I) gradient of a weight: the sum over rows of grad x^T.

    The narrower factor first, and long sums in eight parts: 0.7 to 0.9 of the time of one product in the natural order (MKL).
    """
    grad, x = rows(grad), rows(x)
    narrow, wide = (grad, x) if grad.shape[1] <= x.shape[1] else (x, grad)
    if len(x) >= _LONG_SUM and len(x) % _PARTS == 0:
        narrow_PNO, wide_PNI = (each.reshape(_PARTS, -1, each.shape[1]) for each in (narrow, wide))
        found = torch.bmm(narrow_PNO.transpose(1, 2), wide_PNI).sum(dim=0)
    else:
        found = narrow.t() @ wide
    return found if narrow is grad else found.t()


def rows(x: Tensor) -> Tensor:
    """(..., I) as (N, I)."""
    return x.reshape(-1, x.shape[-1])
