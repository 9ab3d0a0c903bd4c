"""Partitions of meta embeddings on disk: what was planned, the rows, and the gate between the two.

embeddings/kind=K/version=V/dt=D/
    plan.json, planned.parquet      a fill: its as-of day, number of shards, revisions of the days it reads; its entities
    shard-000.parquet               embeddings; one file a shard of a fill, one for a day's changed entities
    shard-000-r0002.parquet         the entities that revision 2 of an already published day changed
    shard-000….json                 written last, once the rows have passed their gate: what they were made from
    shard-000….gate.json, .html     the gate's result, if it failed
embeddings/kind=K/version=V/covered.json   day -> revision that this version's online rows hold

Nothing in them depends on the clock: the same day, data and version give the same bytes.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from limaml import schema
from limaml.config import Config, TaskKindConfig
from limaml.embeddings.adapt_on_ray import adapted
from limaml.embeddings.published import version_folder
from limaml.errors import DataError
from limaml.events.day_store import partition
from limaml.events.recent import Recent, shard_of
from limaml.io.storage import Storage

if TYPE_CHECKING:
    from limaml.models.bundle import Bundle

Inputs = Mapping[str, str | int]


@dataclass(frozen=True)
class Partition:
    """One file of embeddings; `stem` is its name without the ending."""

    kind: TaskKindConfig
    version: str
    day: date
    stem: str

    @property
    def folder(self) -> str:
        return f"{version_folder(self.kind.name, self.version)}/{partition(self.day)}"

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.stem}.parquet"

    @property
    def manifest_path(self) -> str:
        return f"{self.folder}/{self.stem}.json"


@dataclass(frozen=True)
class FillPlan:
    """What a fill works through. Entities are divided among the shards by a hash."""

    kind: TaskKindConfig
    version: str
    day: date
    num_shards: int
    revisions: dict[str, int]
    """Revision of every day the fill reads, as it was when it was planned."""
    entities: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what a shard's rows follow from, beside the model version."""
        content = json.dumps([self.num_shards, self.revisions, self.entities], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def shard_entities(self, number: int) -> list[str]:
        return [entity for entity in self.entities if shard_of(entity, self.num_shards) == number]

    def shard(self, number: int) -> Partition:
        return Partition(self.kind, self.version, self.day, f"shard-{number:03d}")


def write_plan(storage: Storage, plan: FillPlan) -> None:
    """Record a fill before its first shard."""
    folder = plan.shard(0).folder
    storage.write_table(f"{folder}/planned.parquet", pa.table({plan.kind.entity_column: pa.array(plan.entities, pa.string())}))
    storage.write_json(f"{folder}/plan.json", {"num_shards": plan.num_shards, "revisions": plan.revisions})


def read_plan(storage: Storage, kind: TaskKindConfig, version: str, day: date) -> FillPlan:
    """Raises DataError if no fill of this version was planned for this day."""
    folder = Partition(kind, version, day, "").folder
    if not storage.exists(f"{folder}/plan.json"):
        raise DataError(f"{storage.path(folder)} must hold the plan of a fill, but does not; run limaml plan-fill for it")
    value = storage.read_json(f"{folder}/plan.json")
    entities = storage.read_table(f"{folder}/planned.parquet")[kind.entity_column].to_pylist()
    return FillPlan(kind, version, day, value["num_shards"], value["revisions"], tuple(entities))


@dataclass(frozen=True)
class Adaptation:
    """What one or several partitions took to write; the figures of a verb's result."""

    entities: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Adaptation") -> "Adaptation":
        return Adaptation(self.entities + other.entities, self.seconds + other.seconds)

    @property
    def figures(self) -> dict[str, int | float]:
        rate = self.entities / self.seconds if self.entities else 0.0
        return {"entities": self.entities, "entities_per_s": round(rate, 1)}


def write_partition(
    cfg: Config, storage: Storage, bundle: "Bundle", where: Partition, entities: Sequence[str], as_of: datetime, inputs: Inputs
) -> Adaptation:
    """Adapt and write in one stream, then gate. `inputs` says what the rows are made from; only rows that passed can be read.

    Raises GateError, leaving the gate's result beside the rows.
    """
    from limaml.events.gate_report import report_html
    from limaml.events.gates import check_embeddings, require

    started = time.monotonic()
    column, rows = where.kind.entity_column, bundle.config.support_rows_of(where.kind.name)
    Recent(storage, schema.tables(bundle.config.features), column, as_of, rows).move_on(cfg)
    with adapted(cfg, storage, bundle, where.version, where.kind, entities, as_of) as batches:
        done = Adaptation(storage.write_batches(where.path, batches), time.monotonic() - started)
    result = check_embeddings(
        storage.read_row_groups(where.path),
        entity_column=where.kind.entity_column,
        kind=where.kind.name,
        dim=bundle.config.model.embedding_dim,
        planned=pa.array(sorted(entities), pa.string()),
        version=where.version,
        min_norm=cfg.embeddings.min_norm,
        max_norm=cfg.embeddings.max_norm,
    )
    if not result.success:
        note = "Nothing of this partition was published."
        stem = f"{where.folder}/{where.stem}.gate"
        storage.write_json(f"{stem}.json", result.result)
        storage.write_bytes(f"{stem}.html", report_html(f"Refused: {result.what}", note, [result]).encode())
    require(result, f"look at {storage.path(where.path)}; nothing of it was published")
    storage.write_json(where.manifest_path, {"as_of": as_of.isoformat(), **inputs})
    return done


def read_partition(storage: Storage, where: Partition, as_of: datetime, inputs: Inputs) -> pa.Table:
    """Rows that have passed their gate. Raises DataError if there are none made from these inputs."""
    wanted = {"as_of": as_of.isoformat(), **inputs}
    found = storage.read_json(where.manifest_path) if storage.exists(where.manifest_path) else None
    if found != wanted:
        raise DataError(
            f"{storage.path(where.path)} must hold embeddings that passed their gate and were made from {wanted}, "
            f"found {found}; adapt (or fill) it again"
        )
    table = storage.read_table(where.path)
    return table.cast(schema.embeddings(where.kind.entity_column, table.schema.field("embedding").type.list_size).arrow)


def read_covered(storage: Storage, kind: TaskKindConfig, version: str) -> dict[str, int]:
    """Day -> revision that the version's online rows hold; a day without data is not in it."""
    path = f"{version_folder(kind.name, version)}/covered.json"
    covered: dict[str, int] = storage.read_json(path) if storage.exists(path) else {}
    return covered


def write_covered(storage: Storage, kind: TaskKindConfig, version: str, covered: dict[str, int]) -> None:
    storage.write_json(f"{version_folder(kind.name, version)}/covered.json", covered)
