"""Adapting as a pipeline: sorted rows are cut into whole entities, encoded and adapted in threads, and come out in order.

A batch of entities is one thread's work from encoding to its record batch, and torch takes one thread for it. So the bytes do
not depend on how many batches are worked on at once.

    E entities, T tasks (one an entity), D embedding width
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from limaml import schema
from limaml.config import TaskKindConfig
from limaml.features.encoder import Encoder
from limaml.meta.engine import embed_tasks
from limaml.models.bundle import Bundle
from limaml.models.inner_step import NewtonStep
from limaml.models.network import Network
from limaml.progress import progress
from limaml.tasks.sampling import microseconds
from limaml.tasks.supports import Supports, cut_by_entity

_NUM_THREADS = 2
"""Batches worked on at once: reading and writing leave little of a third."""
_ALIGNED_WIDTH = 16
"""float32 numbers in a cache line."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Adapter:
    """A network ready to adapt, and what every row it makes has in common."""

    network: Network
    encoder: Encoder
    prior_D: npt.NDArray[np.float32]
    dtype: torch.dtype
    kind: TaskKindConfig
    version: str
    as_of: datetime
    support_rows: int
    columns: pa.Schema

    @classmethod
    def of(cls, bundle: Bundle, version: str, kind: TaskKindConfig, as_of: datetime) -> Self:
        dtype = precision(bundle.network, kind.name)
        return cls(
            network=copy.deepcopy(bundle.network).to(dtype),
            encoder=bundle.encoder,
            prior_D=bundle.prior[kind.name].numpy(),
            dtype=dtype,
            kind=kind,
            version=version,
            as_of=as_of,
            support_rows=bundle.config.support_rows_of(kind.name),
            columns=schema.embeddings(kind.entity_column, bundle.config.model.embedding_dim).arrow,
        )

    def embed(self, logged: pa.Table) -> pa.RecordBatch:
        """One row of schema.embeddings for each entity of `logged` (whole entities, sorted)."""
        column, as_of_us = self.kind.entity_column, microseconds(self.as_of)
        supports = Supports.from_sorted(logged, self.encoder, column, as_of_us, self.support_rows)
        num_entities = len(supports.entities)
        vectors_ED = np.tile(self.prior_D, (num_entities, 1))
        for tasks, rows, entity_index_T in supports.calls():
            device = self.network.device
            embedding_TD = embed_tasks(self.network, self.kind.name, rows.to(device, self.dtype), entity_index_T.to(device))
            vectors_ED[tasks] = embedding_TD[: len(tasks)].numpy(force=True)
        return pa.record_batch(
            [
                supports.entities,
                pa.repeat(self.kind.name, num_entities),
                pa.FixedSizeListArray.from_arrays(pa.array(vectors_ED.ravel()), vectors_ED.shape[1]),
                pa.repeat(self.version, num_entities),
                pa.array(supports.size),
                pa.repeat(pa.scalar(self.as_of, schema.TIMESTAMP), num_entities),
                supports.last_event_us.cast(schema.TIMESTAMP),
            ],
            schema=self.columns,
        )

    def embed_all(self, rows: Iterable[pa.RecordBatch], batch_entities: int, total: int | None) -> Iterator[pa.RecordBatch]:
        """`embed` for a stream sorted by (entity, timestamp, event id), `batch_entities` entities at a time, with progress."""
        tables = cut_by_entity(rows, self.kind.entity_column, batch_entities)
        with _one_torch_thread(), progress("adapting", "entities", total) as advance:
            for batch in _ordered_map(self.embed, tables):
                advance(batch.num_rows)
                yield batch


def precision(network: Network, kind: str) -> torch.dtype:
    """float32 where an embedding then comes out the same, bit for bit, whoever shares its batch; otherwise float64.

    With the shapes of `Supports.calls` only a task's place in its call varies, so the address of its own matrices. MKL's
    product with one of them sums in another order if its rows are not whole cache lines (measured: embeddings of size 4 moved
    by 1e-6 with widths of 17 or 31, 5 steps; by 0 with 16, 32 and 64). In float64 they move by 1e-15. A task's own are the
    matrices that are adapted, the vectors of a product, and whatever is as wide as its rows or its adapted numbers are many:
    Newton's systems, and a block's product of rows with rows. Those widths are any (2e-7 with 64 rows and 17 numbers).
    """
    block, step = network.block(kind), network.step(kind)
    if block.multiplies_rows or (block.has_steps and isinstance(step, NewtonStep)):
        return torch.float64
    widths = [shape[-1] for shape in step.shapes.values() if block.has_steps and len(shape) > 1]
    widths += [] if network.global_block.product is None else [network.embedding_dim - 1]
    return torch.float64 if any(width % _ALIGNED_WIDTH for width in widths) else torch.float32


def _ordered_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in order. One is read ahead of those that are worked on, so memory does not grow.

    An error of the items or of `function` is raised here, once what is being worked on has ended.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="adapt") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _NUM_THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
