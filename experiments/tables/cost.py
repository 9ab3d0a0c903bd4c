"""Table 7, what a meta embedding costs, against serving every entity's adapted weights; by inner steps and by width.

    training     an outer step of 64 tasks of 32 support and 32 query rows: loss, gradient, optimizer
    adapting     one entity of a batch of 2,048, from 32 support rows; no graph
    storing      what one entity takes in the store, as an embedding or as all its adapted weights
    scoring      a request of 100 candidates, with the entity's row at hand: stored embedding, or adapted weights

Rows are random numbers of MovieLens' widths: time depends on shapes alone. One job, so one process with one thread measures
everything; repetitions go round all cells, so that a busy moment falls on all alike, and the shortest counts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from experiments.cached_jobs import Job, JobOutput
from experiments.methods.rowwise import adapt_rowwise, full_loss, logits, row_embeddings
from experiments.origin_data import CONFIG
from limaml.config import Config, load
from limaml.features.encoder import EncoderDims
from limaml.meta.engine import embed_tasks, outer_loss
from limaml.models.blocks import SupportMlp
from limaml.models.network import build_network
from limaml.tasks.rows import Rows, TaskBatch
from limaml.training.optimizer import make_optimizer

TABLE = "cost"
DIMS = EncoderDims(num_items=1421, num_entities=434, item_dense=24, user_dense=33, context=3, item_static=20, item_sets=19)
"""MovieLens-100K's at the first origin."""
TASKS, SUPPORT, QUERY, ENTITIES, CANDIDATES = 64, 32, 32, 2048, 100
INNER_STEPS = (0, 1, 3, 5, 10)
EMBEDDING_DIMS, HIDDEN = (9, 17, 33, 65), (16, 32, 64, 128)
BASE_STEPS, BASE_DIM, BASE_HIDDEN = 3, 17, 32
BESIDE_BYTES = 6 * 8
"""Beside the vector (contract 3): key, kind, version, support size, as-of, last event; strings counted as 8 bytes."""
RATES = {"task_vector": 1.5, "id_mlp": 1.0, "row_mlp": 0.3}
_REQUESTS = 20


@dataclass(frozen=True)
class Cell:
    """`hidden` is None where the block has no hidden layer."""

    block: str
    inner_steps: int
    embedding_dim: int
    hidden: int | None


def cells(quick: bool) -> list[Cell]:
    """Every block at every number of steps, and at every width at 3 steps."""
    found: dict[Cell, None] = {}
    for block in RATES:
        base = None if block == "task_vector" else BASE_HIDDEN
        for steps in (0, BASE_STEPS) if quick else INNER_STEPS:
            found[Cell(block, steps, BASE_DIM, base)] = None
        for dim in () if quick else EMBEDDING_DIMS:
            found[Cell(block, BASE_STEPS, dim, base)] = None
        for hidden in () if quick or base is None else HIDDEN:
            found[Cell(block, BASE_STEPS, BASE_DIM, hidden)] = None
    return list(found)


def jobs(quick: bool) -> list[Job]:
    return [Job(TABLE, "all", {"quick": quick, "repetitions": 2 if quick else 8})]


def run(job: Job) -> JobOutput:
    measured = [Measured(cell) for cell in cells(job.params["quick"])]
    for _ in range(job.params["repetitions"]):
        for one in measured:
            one.repeat()
    return JobOutput(
        {"cells": [one.values() for one in measured], "beside_bytes": BESIDE_BYTES, "threads": torch.get_num_threads()}
    )


def assemble(outputs: dict[str, JobOutput]) -> dict[str, Any]:
    """{"cost": {block: [cell, ...]}}."""
    found: dict[str, list[dict[str, Any]]] = {block: [] for block in RATES}
    for output in outputs.values():
        for cell in output.values["cells"]:
            found[cell["block"]].append({name: value for name, value in cell.items() if name != "block"})
    return {TABLE: found}


class Measured:
    """One cell's network and rows, and the shortest times so far."""

    def __init__(self, cell: Cell) -> None:
        self._cell, cfg = cell, _configured(cell)
        self.network = build_network(cfg, DIMS)
        self._block = self.network.block(self.network.kind)
        self._optimizer = make_optimizer(self.network, cfg.training)
        self._batch = TaskBatch(make_rows(TASKS, SUPPORT), make_rows(TASKS, QUERY), torch.zeros(TASKS).long(), ("",) * TASKS)
        self._entities = make_rows(ENTITIES, SUPPORT)
        self._request = make_rows(1, CANDIDATES)
        one, self._one_row = make_rows(1, SUPPORT), make_rows(1, 1)
        self._embedding_1D = embed_tasks(self.network, self.network.kind, one, torch.zeros(1).long())
        with torch.no_grad():
            adapted = adapt_rowwise(self.network, one, torch.zeros(1).long())
            # Without a step they are the network's own, which training changes in place.
            self._adapted = {name: p.clone() for name, p in adapted.items()}
        self._seconds: dict[str, float] = {}

    def repeat(self) -> None:
        """Time everything once more."""
        self._time("train", lambda: self._train(full=False))
        if isinstance(self._block, SupportMlp):
            self._time("train_full", lambda: self._train(full=True))
        self._time("adapt", lambda: embed_tasks(self.network, self.network.kind, self._entities, torch.zeros(ENTITIES).long()))
        self._time("stored", self.score_stored, _REQUESTS)
        self._time("full", self.score_full, _REQUESTS)

    def values(self) -> dict[str, Any]:
        cell, seconds = self._cell, self._seconds
        adapted = sum(p.numel() for p in self._adapted.values())
        return {
            "block": cell.block,
            "inner_steps": cell.inner_steps,
            "embedding_dim": cell.embedding_dim,
            "hidden": cell.hidden,
            "train_step_ms": seconds["train"] * 1e3,
            "train_step_full_ms": seconds.get("train_full", seconds["train"]) * 1e3,
            "adapt_us": seconds["adapt"] * 1e6 / ENTITIES,
            "stored_bytes": 4 * cell.embedding_dim + BESIDE_BYTES,
            "adapted_bytes": 4 * adapted + BESIDE_BYTES,
            "score_stored_us": seconds["stored"] * 1e6,
            "score_full_us": seconds["full"] * 1e6,
        }

    @torch.no_grad()
    def score_stored(self) -> torch.Tensor:
        """(1, 100) logits."""
        logit_1R: torch.Tensor = self.network(self._request, {self.network.kind: self._embedding_1D})
        return logit_1R

    @torch.no_grad()
    def score_full(self) -> torch.Tensor:
        """(1, 100) logits with weights adapted beforehand; a task-level block is run once, a row-level one on every row."""
        if isinstance(self._block, SupportMlp):
            return logits(self.network, self._adapted, self._request)
        embedding_1D = row_embeddings(self.network, self._adapted, self._one_row)[:, 0]
        logit_1R: torch.Tensor = self.network(self._request, {self.network.kind: embedding_1D})
        return logit_1R

    def _train(self, *, full: bool) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(0)
        if full:
            loss = full_loss(self.network, self._batch, generator=generator).loss
        else:
            loss = outer_loss(self.network, self._batch, generator=generator).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self._optimizer.step()

    def _time(self, name: str, call: Callable[[], object], calls: int = 1) -> None:
        # The first call after another cell's pays for memory that went back to the system.
        call()
        for _ in range(calls):
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
            self._seconds[name] = min(seconds, self._seconds.get(name, seconds))


def make_rows(num_tasks: int, num_rows: int) -> Rows:
    """Random rows of MovieLens' widths."""
    generator = torch.Generator().manual_seed(num_tasks + num_rows)
    shape = (num_tasks, num_rows)

    def uniform(*widths: int) -> torch.Tensor:
        return torch.rand(*shape, *widths, generator=generator)

    return Rows(
        item_index_TR=torch.randint(1, DIMS.num_items + 1, shape, generator=generator),
        item_dense_TRF=uniform(DIMS.item_dense),
        user_dense_TRF=uniform(DIMS.user_dense),
        context_TRF=uniform(DIMS.context),
        mask_TR=torch.ones(shape),
        gap_s_TR=torch.zeros(shape),
        label_TR=(uniform() < 0.5).float(),
    )


def _configured(cell: Cell) -> Config:
    hidden = [] if cell.hidden is None else [cell.hidden]
    return load(
        CONFIG,
        [
            f"model.meta_block={cell.block}",
            "model.row_age=false",
            f"model.embedding_dim={cell.embedding_dim}",
            f"model.meta_hidden={hidden}",
            f"meta.inner_steps={cell.inner_steps}",
            f"meta.inner_lr={RATES[cell.block]}",
        ],
    )
