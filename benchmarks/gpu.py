"""`make bench-gpu`: the engine on one card, in one script of less than six minutes; writes benchmarks/results/engine-gpu.json.

    .venv/bin/python -m benchmarks.gpu [--data FOLDER]          refuses where torch sees no GPU
    .venv/bin/python -m benchmarks.gpu --device cpu --quick     every part in seconds, for a test; writes nothing

Equality with the CPU first; then tasks a second of every row that ships, as it is called, as a CUDA graph and by torch.compile,
beside torch.func and JAX on the same card; the share of the memory's bandwidth that the operations' traffic is; the training of
configs/movielens.toml where `--data` names an installation's `storage.root`; a fill.

    T tasks, R rows
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import adapt, results
from benchmarks.card_rows import CardRows
from benchmarks.options import ROOT, BenchmarkError
from benchmarks.system_section import ENTITIES
from benchmarks.work import DIMS, ROWS, TASK_ROWS, Work, generator_of, make_work, on
from limaml import config, schema
from limaml.config import Config
from limaml.embeddings.stream import Adapter
from limaml.features.encoder import EncodedRows
from limaml.io.storage import Storage
from limaml.meta.engine import adapt as adapt_tasks
from limaml.meta.engine import outer_loss, query_loss
from limaml.tasks.rows import TaskBatch
from limaml.tasks.splits import split_events
from limaml.training.prepare import fit_encoders, load_training_data, read_history
from limaml.training.step import Workers
from limaml.training.twin_and_refit import TrainingData, train_twin_and_refit
from limaml.training.validation import OBJECTIVE

# A part that has not begun after so long is left out, and named.
BUDGET_S = 300.0
MAX_ERROR = {"float32": 1e-4, "tf32": 1e-3}
"""||g - g_cpu|| / ||g_cpu|| over all parameters: with a thousand tasks the few ReLUs that rounding decides weigh less."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    tasks: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536)
    steps: tuple[int, ...] = (1, 3)
    compared_tasks: int = 1024
    compiled_tasks: int = 1024
    cell_s: float = 0.5
    pool_rows: int = 1_000_000
    fill_entities: int = 200_000
    training_steps: int = 400


QUICK = Plan((4,), (1,), 8, 4, 0.0, 500, 200, 2)


def bench(
    device: Annotated[str, typer.Option(help="cuda, or cpu with --quick.")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Seconds; nothing is written.")] = False,
    data: Annotated[str, typer.Option(help="An ingested MovieLens installation's storage.root.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "benchmarks" / "results",
) -> None:
    """Speed of the engine on a GPU, beside its peers on the same card."""
    if device == "cuda" and not torch.cuda.is_available():
        typer.echo(
            f"make bench-gpu needs a GPU that torch sees, got none with torch {torch.__version__}; nothing was measured. "
            "Install torch's CUDA build on a machine that has one"
        )
        raise typer.Exit(2)
    if device != "cuda" and not quick:
        typer.echo(f"--device {device} is for --quick alone, which writes nothing, got no --quick; add it")
        raise typer.Exit(2)
    found = measure(device, QUICK if quick else Plan(), data)
    if not quick:
        results.write(found, out / "engine-gpu.json")
    typer.echo(json.dumps(found, indent=1, sort_keys=True))


def measure(device: str, plan: Plan, data: str) -> results.Results:
    """All parts. Raises BenchmarkError where the card does not compute what the CPU does."""
    started = time.monotonic()
    found: results.Results = {"device": _name(device), "machine": results.machine(), "versions": results.versions()}
    found |= {"max_gradient_error": _equality(device, plan), "bandwidth_gb_per_s": _bandwidth(device, plan), "skipped": []}
    for name, value in _speeds(device, plan):
        if time.monotonic() - started > BUDGET_S:
            found["skipped"].append(".".join(name))
        else:
            _put(found, name, value())
    for row, by_tasks in found["tasks_per_s"].items():
        for tasks, by_steps in by_tasks.items():
            for steps, speed in by_steps.items():
                moved = found["traffic_bytes_per_task"][row][steps] * speed / 1e9
                _put(found, ("share_of_bandwidth", row, tasks, steps), moved / found["bandwidth_gb_per_s"])
    found["fill_entities_per_s"] = _fill(device, plan)
    if data:
        cfg = config.load(ROOT / "configs" / "movielens.toml", [f'storage.root="{data}"'])
        found["training"] = training(cfg, _history(cfg), device, plan.training_steps)
    return found | {"seconds": time.monotonic() - started}


def _equality(device: str, plan: Plan) -> dict[str, float]:
    """Gradients on the device against the CPU's in float32, without and with TF32."""
    worst = {}
    for mode in MAX_ERROR:
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        for row in ROWS:
            work = make_work(row, plan.compared_tasks)
            expected, got = (_flat(_gradients(each)) for each in (work, on(work, device)))
            error = float((got.cpu() - expected).norm() / expected.norm())
            # Written so that NaN is an error too.
            if not error <= MAX_ERROR[mode]:
                raise BenchmarkError(
                    f"{row}: {mode} on {device} must equal the CPU to {MAX_ERROR[mode]:g}, got {error:g}; one of them is wrong"
                )
            worst[mode] = max(worst.get(mode, 0.0), error)
    torch.backends.cuda.matmul.allow_tf32 = False
    return worst


def _gradients(work: Work) -> list[Tensor]:
    work.network.zero_grad(set_to_none=True)
    _loss(work, work.cfg.meta.inner_steps, work.keep).backward()
    return [p.grad for p in work.network.parameters() if p.grad is not None]


def _loss(work: Work, steps: int, keep: tuple[Tensor, ...]) -> Tensor:
    """The outer loss with dropout's masks given: what torch.compile compiles."""
    network, batch = work.network, work.batch
    embedding_TD = adapt_tasks(network, network.kind, batch.support, batch.entity_index_T, num_steps=steps)
    return query_loss(network, batch.query, {network.kind: embedding_TD}, keep).sum() / batch.num_tasks


def _bandwidth(device: str, plan: Plan) -> float:
    """GB/s of a copy: what is read and what is written."""
    source = torch.empty(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), device, plan.cell_s) / 1e9


def _speeds(device: str, plan: Plan) -> Iterator[tuple[tuple[str, ...], Callable[[], Any]]]:
    """(place in the results, what measures it), the most wanted first."""
    for tasks in plan.tasks:
        for row in ROWS:
            work = _gathered(row, tasks, device, plan)
            for steps in plan.steps:
                at = (row, str(tasks), str(steps))
                gathered = _Step(work, steps)
                if tasks == plan.tasks[0]:
                    yield ("traffic_bytes_per_task", row, str(steps)), lambda s=gathered: _traffic(s) / s.work.batch.num_tasks
                yield ("tasks_per_s_eager", *at), lambda s=gathered, n=tasks: _speed(s, n, device, plan)
                yield ("tasks_per_s", *at), lambda s=gathered, n=tasks: _speed(_graphed(s, device), n, device, plan)
                # A compilation takes seconds to a minute: of the steps that ship alone, and in a quick run of what there is.
                if len(plan.steps) > 1 and steps != work.cfg.meta.inner_steps:
                    continue
                if tasks == plan.compiled_tasks and row == "task_vector":
                    compiled = _compiled(gathered, device)
                    yield ("tasks_per_s_compiled", *at), lambda c=compiled, n=tasks: _speed(c, n, device, plan)
                for peer in ("torch_func", "jax"):
                    yield ("tasks_per_s_of", peer, *at), lambda w=work, s=steps, p=peer: _peer(p, w, s, device, plan)


class _Step:
    """An outer step's gradients, its batch gathered by index from the rows on the device."""

    def __init__(self, work: "_Gathered", steps: int) -> None:
        self.work, self.steps = work, steps
        self.generator = generator_of(work.batch.support.mask_TR.device)

    def __call__(self) -> None:
        self.work.network.zero_grad(set_to_none=True)
        batch = self.work.gather()
        loss = outer_loss(
            self.work.network, batch, generator=self.generator, num_steps=self.steps, num_tasks=batch.num_tasks
        ).loss
        loss.backward()


@dataclass(frozen=True)
class _Gathered(Work):
    """A work whose rows lie on the device, with the index of each task's."""

    rows: CardRows
    support_TR: Tensor
    query_TR: Tensor
    as_of_us_T: Tensor

    def gather(self) -> TaskBatch:
        mask_TR = self.batch.support.mask_TR
        support, query = (self.rows.gather(at_TR, mask_TR, self.as_of_us_T) for at_TR in (self.support_TR, self.query_TR))
        return replace(self.batch, support=support, query=query)


def _gathered(row: str, tasks: int, device: str, plan: Plan) -> _Gathered:
    rng, rows, small = np.random.default_rng(0), plan.pool_rows, on(make_work(row, 1), device)
    encoded = EncodedRows(
        rng.integers(0, DIMS.num_items + 1, rows),
        *(rng.standard_normal((rows, width), np.float32) for width in (DIMS.item_dense, DIMS.user_dense, DIMS.context)),
    )
    pool = CardRows.of(_Pool(encoded, rng.integers(0, 2, rows).astype(np.float32), np.arange(rows) * 1_000_000), device)
    first_T1 = torch.from_numpy(rng.integers(0, rows - 2 * TASK_ROWS, (tasks, 1))).to(device)
    at_TR = first_T1 + torch.arange(TASK_ROWS, device=device)
    as_of_us_T = pool.time_us_N[at_TR[:, -1]]
    mask_TR = torch.ones(at_TR.shape, device=device)
    sides = (pool.gather(at, mask_TR, as_of_us_T) for at in (at_TR, at_TR + TASK_ROWS))
    batch = TaskBatch(*sides, torch.zeros(tasks, dtype=torch.int64, device=device), ("",) * tasks)
    keep = small.network.global_block.draw_dropout(batch.query, generator_of(mask_TR.device))
    return _Gathered(row, small.cfg, small.network, batch, keep, pool, at_TR, at_TR + TASK_ROWS, as_of_us_T)


@dataclass(frozen=True)
class _Pool:
    encoded: EncodedRows
    label: Any
    timestamp_us: Any


def _graphed(step: _Step, device: str) -> Callable[[], Any]:
    """The step as one CUDA graph, which is replayed; on a CPU the step itself."""
    if device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    step.work.network.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _compiled(step: _Step, device: str) -> Callable[[], Any]:
    """The loss by torch.compile, which fuses; on a CPU only its tracing, which takes seconds and not a minute."""
    compiled = torch.compile(_loss, dynamic=False, backend="inductor" if device == "cuda" else "eager")

    def run() -> None:
        work = step.work
        work.network.zero_grad(set_to_none=True)
        batch = work.gather()
        keep = work.network.global_block.draw_dropout(batch.query, step.generator)
        compiled(Work(work.row, work.cfg, work.network, batch, keep), step.steps, keep).backward()

    return run


def _peer(peer: str, work: Work, steps: int, device: str, plan: Plan) -> float | str:
    """Tasks a second, or why the peer did not run."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        prepare = importlib.import_module(f"benchmarks.peers.{'jax_vmap' if peer == 'jax' else peer}").prepare
        if peer == "jax" and device == "cuda":
            sys.modules["jax"].devices("gpu")
        return _speed(prepare(work, steps)[1], work.batch.num_tasks, device, plan)
    except (ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _speed(call: Callable[[], Any], tasks: int, device: str, plan: Plan) -> float:
    return tasks / _seconds(call, device, plan.cell_s)


def _seconds(call: Callable[[], Any], device: str, at_least_s: float) -> float:
    """Mean seconds of a call, over as many as take `at_least_s`; the first, which compiles, does not count."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    calls, start = 0, time.perf_counter()
    synchronize()
    while not calls or time.perf_counter() - start < at_least_s:
        call()
        calls += 1
        # A card is some calls behind; waiting for each would show in the small ones.
        if calls % 8 == 0:
            synchronize()
    synchronize()
    return (time.perf_counter() - start) / calls


class _Traffic(TorchDispatchMode):
    """Bytes of all tensors that operations read and write, views apart: what unfused operations move."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found


def _traffic(step: _Step) -> float:
    with _Traffic() as traffic:
        step()
    return float(traffic.num_bytes)


def _fill(device: str, plan: Plan) -> dict[str, float]:
    """Entities a second from a sorted Parquet file to a Parquet file, the network on the device."""
    rates = {}
    with TemporaryDirectory(prefix="limaml-gpu-") as folder:
        storage = Storage(folder)
        adapt.write_partition(storage, plan.fill_entities)
        for row in ENTITIES:
            bundle = adapt.untrained_bundle(row)
            kind, tables = bundle.config.task_kind, schema.tables(bundle.config.features)
            adapter = Adapter.of(bundle, "1", kind, schema.day_end(adapt.DAY))
            adapter.network.to(device)
            rows = storage.read_batches(adapt.SOURCE, tables.support_columns(kind.entity_column), 65_536)
            start = time.perf_counter()
            batches = adapter.embed_all(rows, bundle.config.embeddings.batch_entities, None)
            done = storage.write_batches(adapt.TARGET, pa.RecordBatchReader.from_batches(adapter.columns, batches))
            rates[row] = done / (time.perf_counter() - start)
    return rates


def _history(cfg: Config) -> TrainingData:
    """All rows that the installation has logged, as training reads them."""
    logged = read_history(cfg, date.max)
    return load_training_data(cfg, date.max, *fit_encoders(cfg, logged, split_events(logged, cfg.evaluation)))


def training(cfg: Config, data: TrainingData, device: str, steps: int) -> dict[str, float]:
    """Seconds of both fits on the device, and what the twin reached on the rows that validate."""
    cfg = cfg.model_copy(update={"training": cfg.training.model_copy(update={"max_steps": steps})})
    start = time.perf_counter()
    done = train_twin_and_refit(cfg, data, Workers(), torch.device(device), resume=None, save=lambda _: None)
    assert done.twin_progress is not None
    reached = float(done.twin_progress.best_value or 0.0)
    return {"seconds": time.perf_counter() - start, "steps": float(done.twin_progress.step), OBJECTIVE: reached}


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _put(part: results.Results, path: tuple[str, ...], value: Any) -> None:
    *levels, last = path
    for level in levels:
        part = part.setdefault(level, {})
    part[last] = value


if __name__ == "__main__":
    typer.run(bench)
