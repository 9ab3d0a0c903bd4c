"""Floating point operations of one outer loss with its backward pass: the matrix products that ran, counted as they ran."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.options import Options
from benchmarks.results import Results
from benchmarks.work import MODELS, Model, limaml_batch, limaml_network, make_work
from limaml.meta.engine import outer_loss, portable


def flops(model: Model, tasks: int, steps: int) -> int:
    """A multiplication and an addition are two. Elementwise work, about a twentieth, is not counted."""
    work = make_work(model, tasks)
    network, batch = limaml_network(work), limaml_batch(work)
    # Of the portable form: the compiled one does the same products, out of the counter's sight.
    with portable(), FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _linear}) as counter:
        outer_loss(network, batch, num_steps=steps).loss.backward()
    return int(counter.get_total_flops())


def _linear(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


def measure(options: Options, measured: Results) -> Results:
    """Share of the same run's oneDNN GEMM peak for every cell; `fraction_of_peak` is the reference's at 256 tasks, 1 step."""
    peak = measured.get("gemm_peak_gflops", {}).get("onednn")
    speeds = measured.get("tasks_per_s", {})
    if options.device != "cpu" or not peak:
        return {}
    shares: Results = {}
    for model in MODELS:
        for tasks, by_steps in speeds.get(model, {}).get("limaml", {}).items():
            for steps, tasks_per_s in by_steps.items():
                share = flops(model, int(tasks), int(steps)) / int(tasks) * tasks_per_s / (peak * 1e9)
                shares.setdefault(model, {}).setdefault(tasks, {})[steps] = share
    headline = shares.get("reference", {}).get("256", {}).get("1")
    return {"fraction_of_peak_by": shares} | ({"fraction_of_peak": headline} if headline else {})
