"""The inner and outer loop as a compiled kernel (fused.c): one network, on a CPU, all of a task's numbers kept in cache.

For a row MLP of one hidden layer whose rates and damping are not learned, beside a concatenating global block of two hidden
layers. It is optional: `reason` says why a call is left to the portable form, which gives the same numbers.

    T tasks, S support rows, Q query rows, F features, D embedding width
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limaml.models.meta_blocks import RowMlp
from limaml.models.network import LiMAML
from limaml.tasks.rows import Rows
from limaml.telemetry import get_logger

_IS_DOUBLE = {torch.float32: 0, torch.float64: 1}
_NUMBERS = ("width", "features", "hidden", "dim", "wide", "narrow", "steps", "second", "train", "support_rows", "query_rows")
_POINTERS = ("support_len", "query_len", "support_x", "support_y", "query_x", "query_y", "sw1", "sb1", "sw2", "sb2", "weights")


class _Call(ctypes.Structure):
    """`Call` of fused.c."""

    _fields_ = [
        *((name, ctypes.c_long) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, "embedding_TD", "loss_T")),
    ]


@dataclass(frozen=True)
class Kernel:
    """The compiled library; `level` picks its instruction set: 2 AVX-512, 1 AVX2, 0 what every processor has."""

    run: Callable[..., int]
    level: int


def load(path: Path) -> Kernel:
    """The kernel in a shared library, with this processor's best instruction set. Raises OSError if it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    library.limaml_fused_run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_long,
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
    ]
    if library.limaml_fused_call_bytes() != ctypes.sizeof(_Call):
        raise OSError(f"{path} was built from another version of fused.c; build it again: python setup.py build_ext --inplace")
    return Kernel(library.limaml_fused_run, int(library.limaml_fused_level()))


_log = get_logger("meta.fused")
_instead: ContextVar[Kernel | None] = ContextVar("instead", default=None)


@cache
def installed() -> Kernel | None:
    """The kernel as built when the package was installed; None where that was not possible, or it cannot be loaded."""
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_fused{suffix}")).exists()]
    try:
        return load(paths[0]) if paths else None
    except OSError as error:
        _log.warning("kernel_not_loaded", error=str(error))
        return None


@contextmanager
def use(kernel: Kernel) -> Iterator[None]:
    """Take this kernel instead of the installed one: another build, or another instruction set."""
    token = _instead.set(kernel)
    try:
        yield
    finally:
        _instead.reset(token)


def available() -> bool:
    return _kernel() is not None


def _kernel() -> Kernel | None:
    return _instead.get() or installed()


def reason(network: LiMAML, sides: tuple[Rows, ...], *, dropout: bool) -> str | None:
    """Why the kernel cannot do this call; None if it can. `sides`: support, and query if there is one."""
    block, top = network.meta, network.global_block
    dtype, meta = sides[0].mask_TR.dtype, network.meta_config
    rules: dict[str, Callable[[], bool]] = {
        "the kernel is not built or not loaded": available,
        "the meta block is not a row MLP of one hidden layer": lambda: isinstance(block, RowMlp) and len(block.mlp) == 4,
        "the global block is not a concatenation with two hidden layers": lambda: (
            top.has_concat and not top.has_product and len(top.layers) == 3 and len(top.kinds) == 1
        ),
        "rates or damping are learned": lambda: not (meta.learn_inner_lr or meta.learn_damping),
        "dropout is on": lambda: not dropout,
        "not float32 or float64 on a CPU": lambda: (
            dtype in _IS_DOUBLE
            and all(p.device.type == "cpu" and p.dtype == dtype for p in (*top.parameters(), *network.log_rates.parameters()))
            and all(rows.mask_TR.device.type == "cpu" and rows.dense.dtype == dtype for rows in sides)
        ),
        "padding stands before a row": lambda: all(_is_prefix(rows.mask_TR) for rows in sides),
        "a layer's weights have different rates": lambda: all(_is_one(logs) for logs in _logs(network)),
    }
    return next((name for name, holds in rules.items() if not holds()), None)


def embed(network: LiMAML, support: Rows, num_steps: int) -> Tensor:
    """(T, D) embeddings after `num_steps` inner steps; each depends on its own rows alone, bit for bit."""
    return _run(network, support, None, num_steps, second_order=False, train=False)[0]


def loss_sum(
    network: LiMAML, support: Rows, query: Rows, num_steps: int, *, second_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over tasks of their mean query loss, which carries the graph; (T,) the means and (T, D) embeddings, which do not."""
    weights = _weights(network)
    if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        embedding_TD, loss_T, _ = _run(network, support, query, num_steps, second_order=second_order, train=False)
        return loss_T.sum(), loss_T, embedding_TD
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _LossSum.apply
    return apply(network, support, query, num_steps, second_order, *weights)


class _LossSum(torch.autograd.Function):
    """Gradients are made with the loss, while each task's numbers are in cache; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, network: LiMAML, support: Rows, query: Rows, num_steps: int, second_order: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        embedding_TD, loss_T, flat = _run(network, support, query, num_steps, second_order=second_order, train=True)
        ctx.save_for_backward(flat)
        ctx.shapes = [weight.shape for weight in weights]
        ctx.mark_non_differentiable(loss_T, embedding_TD)
        return loss_T.sum(), loss_T, embedding_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        parts = (flat * by_sum).split([shape.numel() for shape in ctx.shapes])
        return None, None, None, None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def _run(
    network: LiMAML, support: Rows, query: Rows | None, num_steps: int, *, second_order: bool, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, losses, and the gradients of the losses' sum side by side."""
    kernel, block = _kernel(), network.meta
    assert kernel is not None
    assert isinstance(block, RowMlp)
    assert support.label_TR is not None
    weights = [weight.detach().contiguous() for weight in _weights(network)]
    m1, _, m2, _, _, _, _, w2, *_ = weights
    with torch.no_grad():
        count_T = support.mask_TR.sum(dim=1)
        sizes = [size.contiguous() for size in network.step_sizes(count_T).values()]
    tensors = {
        "support_len": count_T.long(),
        "support_x": block.features(support).contiguous(),
        "support_y": support.label_TR.to(m1.dtype).contiguous(),
        **dict(zip(("sw1", "sb1", "sw2", "sb2"), sizes, strict=True)),
        "embedding_TD": m1.new_empty(support.num_tasks, m2.shape[1]),
        "loss_T": m1.new_zeros(support.num_tasks),
    }
    if query is not None:
        assert query.label_TR is not None
        tensors |= {"query_len": query.mask_TR.sum(dim=1).long(), "query_x": query.dense.contiguous()}
        tensors |= {"query_y": query.label_TR.to(m1.dtype).contiguous()}
    shapes = (m1.shape[0], network.global_block.num_features, *m2.shape, w2.shape[1], w2.shape[0])
    rows = support.mask_TR.shape[1], 0 if query is None else query.mask_TR.shape[1]
    numbers = (*shapes, num_steps, int(second_order), int(train), *rows)
    call = _Call(**dict(zip(_NUMBERS, map(int, numbers), strict=True)), **{name: t.data_ptr() for name, t in tensors.items()})
    pointers = _pointers(weights)
    call.weights = ctypes.addressof(pointers)
    parts = _parts(count_T + (0 if query is None else query.mask_TR.sum(dim=1)))
    # One vector a part, too short for torch to wake its own threads, which would go on spinning beside the kernel's.
    flats = [m1.new_zeros(sum(weight.numel() for weight in weights) if train else 0) for _ in parts]
    into = [_pointers(torch.split(flat, [weight.numel() for weight in weights])) if train else None for flat in flats]
    failed = [1] * len(parts)

    def work(part: int) -> None:
        failed[part] = kernel.run(ctypes.byref(call), *parts[part], into[part], _IS_DOUBLE[m1.dtype], kernel.level)

    # Started anew each time, 0.05 ms each: a pool's threads would be missing after a fork.
    threads = [threading.Thread(target=work, args=(part,)) for part in range(1, len(parts))]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    if any(failed):
        raise MemoryError(f"no memory for the rows of {support.num_tasks} tasks; make the batch or its longest task smaller")
    return tensors["embedding_TD"], tensors["loss_T"], sum(flats[1:], flats[0])


def _weights(network: LiMAML) -> list[Tensor]:
    """In the kernel's order."""
    block = network.meta
    assert isinstance(block, RowMlp)
    top = [parameter for layer in network.global_block.layers for parameter in (layer.weight, layer.bias)]
    return [*(block.mlp[name] for name in ("weight0", "bias0", "weight1", "bias1")), block.empty, *top]


def _parts(rows_T: Tensor) -> list[tuple[int, int]]:
    """A run of tasks for each thread, of about as many rows."""
    num_parts = max(1, min(torch.get_num_threads(), len(rows_T)))
    work_T = (rows_T + 1).cumsum(dim=0)
    inner = (work_T / (work_T[-1:] / num_parts)).ceil() if len(rows_T) else work_T
    bounds = [0, *(int((inner <= part).sum()) for part in range(1, num_parts)), len(rows_T)]
    return [(first, last) for first, last in pairwise(bounds) if last > first] or [(0, 0)]


def _pointers(tensors: Any) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _is_prefix(mask_TR: Tensor) -> bool:
    return bool((mask_TR[:, 1:] <= mask_TR[:, :-1]).all())


def _logs(network: LiMAML) -> list[Tensor]:
    return [*network.log_rates.values(), *network.log_damping.values()]


def _is_one(values: Tensor) -> bool:
    return bool((values == values.flatten()[:1]).all())
