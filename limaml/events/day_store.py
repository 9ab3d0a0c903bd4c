"""The event store: one immutable partition a day, its manifest, and the quarantine (contract 1).

events/dt=D/events-r0001.parquet             the current revision of a passed day
events_superseded/dt=D/events-r0001.parquet  revisions that a correction replaced
days/dt=D.json                               the day's manifest; written last, it says that the day is in
format.json                                  the format number of everything below the storage root
quarantine/dt=D/r0001/                       what was refused: events.parquet or raw.bin, result.json, report.html
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from limaml import schema
from limaml.errors import DataError
from limaml.io.storage import Storage, whole_files

FORMAT_VERSION = 1
"""Of what lies below a storage root. Release 0.1 wrote no number; what has none is its format, 1."""
Status = Literal["passed", "no_data", "quarantined"]
_FORMAT = "format.json"
_ENTITIES = ("user_id", "item_id")


@dataclass(frozen=True)
class DayManifest:
    """What is known about one day. `revision` counts accepted contents if passed, refused ones if quarantined."""

    day: date
    status: Status
    revision: int = 0
    rows: int = 0
    sha256: str = ""
    failed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    """Features whose values its rows no longer hold: past their retention (`limaml.governance.retention`)."""

    @property
    def content(self) -> str:
        """What can be read of the day: its digest as accepted, and what was dropped since."""
        return f"{self.sha256} without {', '.join(self.dropped)}" if self.dropped else self.sha256

    def to_json(self) -> dict[str, Any]:
        value = asdict(self) | {"day": self.day.isoformat()}
        return value if self.dropped else {name: part for name, part in value.items() if name != "dropped"}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "DayManifest":
        lists = {name: tuple(value.get(name, ())) for name in ("failed", "warnings", "dropped")}
        return DayManifest(**(value | lists | {"day": date.fromisoformat(value["day"])}))


def partition(day: date) -> str:
    return f"dt={day.isoformat()}"


def partition_day(name: str) -> date:
    """The day of a folder `dt=D` or a file `dt=D.json`."""
    return date.fromisoformat(name.removeprefix("dt=")[:10])


def events_path(day: date, revision: int) -> str:
    return f"events/{partition(day)}/events-r{revision:04d}.parquet"


def conforms(table: pa.Table, events: schema.Table) -> bool:
    """Whether a table has exactly the columns of `events`, with their types and without forbidden nulls."""
    return sorted(table.column_names) == sorted(events.names) and all(
        table.schema.field(column.name).type == column.type and (column.nullable or not table[column.name].null_count)
        for column in events.columns
    )


def canonical(table: pa.Table, events: schema.Table) -> pa.Table:
    """A table that conforms, with its columns and rows in the store's order; rows in any order give the same."""
    return table.select(events.names).cast(events.arrow).sort_by(schema.EVENT_ORDER).combine_chunks()


def content_hash(table: pa.Table) -> str:
    """SHA-256 (hex) of the table's Arrow IPC stream, which unlike Parquet has one form for one content."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()


class EventStore:
    """Day partitions of events under one storage root. A verb has one of its own: manifests are read once."""

    def __init__(self, storage: Storage, events: schema.Table = schema.EVENTS) -> None:
        """`events` says which columns are read of them."""
        self._storage = storage
        self._events = events
        self._known: dict[date, DayManifest] | None = None

    def manifest(self, day: date) -> DayManifest | None:
        path = f"days/{partition(day)}.json"
        return DayManifest.from_json(self._storage.read_json(path)) if self._storage.exists(path) else None

    def manifests(self) -> dict[date, DayManifest]:
        """Every recorded day, in order: as it was when this was first asked, and what this store has recorded since.

        Raises DataError if the store is of a format that this release does not read.
        """
        if self._known is None:
            self._require_format()
            days = [partition_day(name) for name in self._storage.list("days")]
            self._known = {day: DayManifest.from_json(self._storage.read_json(f"days/{partition(day)}.json")) for day in days}
        return dict(sorted(self._known.items()))

    def days(self, status: Status = "passed") -> list[date]:
        """Recorded days of one status, in order."""
        return [day for day, manifest in self.manifests().items() if manifest.status == status]

    def lineage(self, through: date) -> dict[str, int]:
        """Revision of every passed day up to `through`: what a model was trained on."""
        passed = [m for m in self.manifests().values() if m.status == "passed" and m.day <= through]
        return {m.day.isoformat(): m.revision for m in passed}

    def paths(self, *, first: date | None = None, through: date | None = None) -> list[str]:
        """Files of the current revisions of a span of days (both ends included)."""
        return partition_files(self._storage, "events", first=first, through=through)

    def read(self, days: Iterable[date]) -> pa.Table:
        """Events of the given days, in the store's row order; days without a partition contribute nothing."""
        paths = [path for day in days for path in self.paths(first=day, through=day)]
        with whole_files("It must be as ingestion wrote it; ingest its day again."):
            return self._storage.dataset(paths, self._events.arrow).to_table().sort_by(schema.EVENT_ORDER)

    def place(self, day: date, table: pa.Table, revision: int) -> None:
        """Write a day's events as `revision`; an older revision is moved aside first. `commit` makes the day count."""
        target = events_path(day, revision)
        for path in self.paths(first=day, through=day):
            if path != target:
                self._storage.move(path, path.replace("events/", "events_superseded/", 1))
        self._storage.write_table(target, table)

    def commit(self, manifest: DayManifest) -> None:
        """Record a day; the last write of its ingestion."""
        if not self._storage.exists(_FORMAT):
            self._storage.write_json(_FORMAT, {"format_version": FORMAT_VERSION})
        self._storage.write_json(f"days/{partition(manifest.day)}.json", manifest.to_json())
        if self._known is not None:
            self._known[manifest.day] = manifest

    def record_no_data(self, day: date) -> DayManifest:
        """Record that the source has no such day (not the same as an empty file, which fails its gate)."""
        manifest = DayManifest(day, "no_data")
        self.commit(manifest)
        return manifest

    def quarantine(
        self, day: date, content: pa.Table | bytes, failed: tuple[str, ...], result: dict[str, Any], html: str
    ) -> str:
        """Put refused content aside with the reasons; returns the folder. The same content again reuses its folder.

        A day that passed before stays as it was: only a day without an accepted revision becomes 'quarantined'.
        """
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content_hash(content)
        revision, folder = self._quarantine_folder(day, digest)
        if isinstance(content, bytes):
            self._storage.write_bytes(f"{folder}/raw.bin", content)
        else:
            self._storage.write_table(f"{folder}/events.parquet", content)
        self._storage.write_bytes(f"{folder}/report.html", html.encode())
        self._storage.write_json(f"{folder}/result.json", result | {"sha256": digest})
        known = self.manifest(day)
        if known is None or known.status != "passed":
            rows = 0 if isinstance(content, bytes) else content.num_rows
            self.commit(DayManifest(day, "quarantined", revision, rows, digest, failed))
        return self._storage.path(folder)

    def _require_format(self) -> None:
        found = self._storage.read_json(_FORMAT) if self._storage.exists(_FORMAT) else {"format_version": 1}
        version = found.get("format_version") if isinstance(found, dict) else None
        if version == FORMAT_VERSION:
            return
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "update limaml to read it" if newer else "ingest the history into a new storage.root with this limaml"
        raise DataError(f"{self._storage.path(_FORMAT)}: format_version must be {FORMAT_VERSION}, got {version}; {remedy}")

    def _quarantine_folder(self, day: date, digest: str) -> tuple[int, str]:
        base = f"quarantine/{partition(day)}"
        attempts = self._storage.list(base)
        for name in attempts:
            path = f"{base}/{name}/result.json"
            if self._storage.exists(path) and self._storage.read_json(path)["sha256"] == digest:
                return int(name.removeprefix("r")), f"{base}/{name}"
        return len(attempts) + 1, f"{base}/r{len(attempts) + 1:04d}"

    def changed_entities(self, day: date, revision: int, since: int, categories: Sequence[str] = ()) -> dict[str, pa.Array]:
        """Users and items, by column, whose rows of `day` differ between its current revision and `since`, sorted; and the
        `categories`, of items or of the context, that these rows were logged with.

        Revision 0 has no rows: since then all of the day's entities have changed, and until then none.
        """
        if revision in (0, since):
            return {column: pa.array([], pa.string()) for column in (*_ENTITIES, *categories)}
        rows = self.read([day])
        if since > 0:
            path = f"events_superseded/{partition(day)}/events-r{since:04d}.parquet"
            before = self._storage.read_table(path).select(self._events.names)
            old, new = ({tuple(row.values()): row for row in table.to_pylist()} for table in (before, rows))
            differing = [row for key, row in (old | new).items() if (key in old) != (key in new)]
            rows = pa.Table.from_pylist(differing, rows.schema)
        found = {column: rows[column] for column in _ENTITIES}
        if categories:
            found |= self._logged_with(day, revision, since, rows["event_id"], categories)
        return {column: pa.array(sorted(pc.unique(values).to_pylist()), pa.string()) for column, values in found.items()}

    def _logged_with(
        self, day: date, revision: int, since: int, event_ids: pa.ChunkedArray, names: Sequence[str]
    ) -> dict[str, pa.ChunkedArray]:
        files = [f"logged/{partition(day)}/logged-r{revision:04d}.parquet"]
        if since > 0:
            files.append(f"logged_superseded/{partition(day)}/logged-r{since:04d}.parquet")
        columns = pa.schema([("event_id", pa.string()), *((name, pa.string()) for name in names)])
        rows = self._storage.dataset(files, columns).to_table(filter=ds.field("event_id").isin(pc.unique(event_ids)))
        return {name: rows[name].drop_null() for name in names}


def partition_files(storage: Storage, folder: str, *, first: date | None = None, through: date | None = None) -> list[str]:
    """Relative paths of the Parquet files of the days from `first` to `through`, in order of days."""
    if first is not None and first == through:  # without a listing of all days for each of them
        names = [partition(first)]
    else:
        names = [name for name in storage.list(folder) if name.startswith("dt=")]
    wanted = [
        name
        for name in names
        if (first is None or partition_day(name) >= first) and (through is None or partition_day(name) <= through)
    ]
    return [
        f"{folder}/{name}/{file}" for name in wanted for file in storage.list(f"{folder}/{name}") if not file.startswith(".")
    ]
