"""Adapting on a Ray cluster: a shard's entities in parts, each the task of a worker, which reads the rows of its own entities.

A part is `adapt`, called on a worker instead of here, for a run of the sorted entities that is whole batches long. So every
entity stands in the batch that it would stand in without a cluster, and the batches are written here, in their order: the bytes
of a partition are the same. A part that is lost with its worker is done again by another one (Ray, three times).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from math import ceil
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from limaml import schema, telemetry
from limaml.config import Config, TaskKindConfig
from limaml.embeddings.adapt import adapt
from limaml.io import cluster
from limaml.io.storage import Storage, absolute
from limaml.progress import progress

if TYPE_CHECKING:
    from limaml.models.bundle import Bundle

_log = telemetry.get_logger(__name__)


@contextmanager
def adapted(
    cfg: Config,
    storage: Storage,
    bundle: "Bundle",
    version: str,
    kind: TaskKindConfig,
    entities: Sequence[str],
    as_of: datetime,
) -> Iterator[pa.RecordBatchReader]:
    """`adapt`, here or on the cluster that is configured; to be read within the block."""
    batch_entities = cfg.embeddings.batch_entities
    if not cluster.address(cfg) or not entities:
        yield adapt(storage, bundle, version, kind, entities, as_of, batch_entities)
        return
    columns = schema.embeddings(kind.entity_column, bundle.config.model.embedding_dim).arrow
    parts = divide(sorted(entities), batch_entities, cfg.ray.part_entities, cfg.ray.adapt_tasks)
    with cluster.connected(cfg):
        _log.info("adapting_on_cluster", parts=len(parts), entities=len(entities))
        yield pa.RecordBatchReader.from_batches(columns, _batches(cfg, storage, bundle, version, kind, parts, as_of))


def divide(entities: Sequence[str], batch_entities: int, most: int, num_tasks: int) -> list[Sequence[str]]:
    """Runs of `entities`, whole batches long: a like one for each task, but none longer than `most` (or one batch)."""
    num_batches = ceil(len(entities) / batch_entities)
    length = batch_entities * max(1, min(ceil(num_batches / num_tasks), most // batch_entities))
    return [entities[start : start + length] for start in range(0, len(entities), length)]


def _batches(
    cfg: Config,
    storage: Storage,
    bundle: "Bundle",
    version: str,
    kind: TaskKindConfig,
    parts: Sequence[Sequence[str]],
    as_of: datetime,
) -> Iterator[pa.RecordBatch]:
    """Of all parts, in order. As many are worked on as may be; what is done waits in the cluster until its turn."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(adapt_part)
    shared = (absolute(storage.root), ray.put(bundle), version, kind, as_of, cfg.embeddings.batch_entities)
    waiting: deque[Any] = deque()
    left = iter(parts)
    with progress("adapting", "entities", sum(len(part) for part in parts)) as advance:
        while True:
            while len(waiting) < cfg.ray.adapt_tasks and (part := next(left, None)) is not None:
                waiting.append(task.remote(*shared, part))
            if not waiting:
                return
            for batch in ray.get(waiting.popleft()):
                advance(batch.num_rows)
                yield batch


def adapt_part(
    root: str,
    bundle: "Bundle",
    version: str,
    kind: TaskKindConfig,
    as_of: datetime,
    batch_entities: int,
    entities: Sequence[str],
) -> list[pa.RecordBatch]:
    """What a worker does: `adapt` for its part."""
    telemetry.configure()
    reader = adapt(Storage(root), bundle, version, kind, entities, as_of, batch_entities, is_part=True)
    return list(reader)
