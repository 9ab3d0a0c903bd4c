"""Rows into the online store: one rule decides, for every store alike, which row replaces which (contract 5).

Stores disagree on their own (Feast 0.67): SQLite lets an older row overwrite a newer one, Redis drops a row of an equal
timestamp, and a missing key reads back as absent from one and as nulls at the epoch from the other. So the publisher, who
holds the lease, reads what is there, decides by `replaces`, and writes what is left in short batches. Rows are read, compared
and written as the bytes that Feast stores, through the bulk path of `limaml.features.online`.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from limaml import schema
from limaml.embeddings.context import AFFINITIES, EmbeddingContext
from limaml.errors import StoreError
from limaml.features.online.rows import BulkStore, OnlineRow, RowCodec
from limaml.io.lease import Held
from limaml.progress import progress

if TYPE_CHECKING:
    from feast import FeatureStore

_FEATURE_VIEWS = {"user": schema.USER_VIEW, "item": schema.ITEM_VIEW, AFFINITIES: schema.AFFINITY_VIEW}


def replaces(new: OnlineRow, stored: OnlineRow | None) -> bool:
    """The rule: another model version, or a newer instant, or the same instant with other bytes."""
    if stored is None or new.version != stored.version:
        return True
    if new.timestamp_us != stored.timestamp_us:
        return new.timestamp_us > stored.timestamp_us
    return new.values != stored.values


class OnlineView:
    """One Feast view in the online store. Tables carry its entity key, its features and its timestamp column."""

    def __init__(self, store: "FeatureStore", name: str) -> None:
        from feast.errors import FeatureViewNotFoundException

        self.name = name
        self._config = store.config
        try:
            self._view: Any = store.get_feature_view(name)
        except FeatureViewNotFoundException:
            raise StoreError(f"view {name} must be in the feature registry, but is not; run limaml apply") from None
        self._online: Any = store.provider.online_store
        self._bulk: BulkStore = self._online
        self.codec = RowCodec(self._view, store.config.entity_key_serialization_version)

    def keys(self, table: pa.Table) -> list[bytes]:
        """Feast's serialised entity keys of the table's rows."""
        return self.codec.keys(table)

    def rows(self, table: pa.Table) -> list[OnlineRow]:
        """The table's rows as they would be stored."""
        return self.codec.rows(table)

    def read(self, keys: Sequence[bytes]) -> list[OnlineRow | None]:
        """What is stored for each key, None if nothing is."""
        found = self._bulk.read_rows(self._config, self._view, self.codec.names, keys) if keys else []
        return [None if stored is None else self.codec.row(*stored) for stored in found]

    def write(self, keys: Sequence[bytes], rows: Sequence[OnlineRow]) -> None:
        """Write rows as they are; whoever calls has decided that they replace what is there, and holds the lease."""
        self._bulk.write_rows(self._config, self._view, self.codec.names, keys, rows)

    def clear(self) -> None:
        """Remove every row of the view."""
        change = {"entities_to_delete": [], "entities_to_keep": [], "partial": True}
        # Two calls: SQLite's one call would create the table first and drop it last.
        self._online.update(self._config, tables_to_delete=[self._view], tables_to_keep=[], **change)
        self._online.update(self._config, tables_to_delete=[], tables_to_keep=[self._view], **change)


@contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """Full garbage collections, which the rows set off, pass over what was there before them.

    Feast's imports leave half a million objects; to look through them again and again took 5 to 10 us a row, of 26 to 35.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_older_objects_left_alone()
def publish(view: OnlineView, table: pa.Table, held: Held, batch_rows: int) -> pa.Table:
    """Write the table's rows that replace what is stored, and return them. The lease is checked before each write."""
    written = [table.slice(0, 0)]
    for part in _batches(table, batch_rows, f"publishing {view.name}"):
        keys, rows = view.keys(part), view.rows(part)
        pairs = zip(rows, view.read(keys), strict=True)
        chosen = [at for at, (row, stored) in enumerate(pairs) if replaces(row, stored)]
        if chosen:
            held.check()
            view.write([keys[at] for at in chosen], [rows[at] for at in chosen])
            written.append(part if len(chosen) == part.num_rows else part.take(chosen))
    return pa.concat_tables(written)


@_older_objects_left_alone()
def require_published(view: OnlineView, table: pa.Table, batch_rows: int) -> None:
    """Read the table's rows back and compare them bit for bit: every feature and the timestamp.

    Raises StoreError that names the first row that differs, and how many do.
    """
    num_wrong, first = 0, ""
    for part in _batches(table, batch_rows, f"reading back {view.name}"):
        rows, found = view.rows(part), view.read(view.keys(part))
        wrong = [at for at, (row, stored) in enumerate(zip(rows, found, strict=True)) if row != stored]
        if wrong and not first:
            entity = part[view.codec.key_names[0]][wrong[0]].as_py()
            first = f"{entity} {_difference(view, rows[wrong[0]], found[wrong[0]])}"
        num_wrong += len(wrong)
    if num_wrong:
        raise StoreError(
            f"view {view.name} must hold the published rows, but {num_wrong} of {table.num_rows} read back otherwise, "
            f"e.g. entity {first}; publish again, and look for a second writer"
        )


def publish_features(context: EmbeddingContext, store: "FeatureStore", tables: dict[str, pa.Table], held: Held) -> int:
    """Publish snapshot rows of users and items, read what was written back; returns the number of rows written."""
    settings, total = context.cfg.embeddings, 0
    for name, table in tables.items():
        view = OnlineView(store, _FEATURE_VIEWS[name])
        written = publish(view, table, held, settings.write_batch_rows)
        require_published(view, written, settings.write_batch_rows)
        total += written.num_rows
    return total


def sample(table: pa.Table, num_rows: int) -> pa.Table:
    """At most `num_rows` rows, evenly spread over the table, first and last among them; the same ones each time."""
    if table.num_rows <= num_rows:
        return table
    if num_rows == 1:
        return table.slice(0, 1)
    return table.take([at * (table.num_rows - 1) // (num_rows - 1) for at in range(num_rows)])


def _batches(table: pa.Table, batch_rows: int, what: str) -> Iterator[pa.Table]:
    with progress(what, "rows", table.num_rows) as advance:
        for start in range(0, table.num_rows, batch_rows):
            part = table.slice(start, batch_rows)
            yield part
            advance(part.num_rows)


def _difference(view: OnlineView, row: OnlineRow, stored: OnlineRow | None) -> str:
    if stored is None:
        return "is missing"
    if row.timestamp_us != stored.timestamp_us:
        return f"is stamped {_instant(stored)} instead of {_instant(row)}"
    triples = zip(view.codec.names, row.values, stored.values, strict=True)
    return f"differs in {', '.join(name for name, new, old in triples if new != old)}"


def _instant(row: OnlineRow) -> str:
    return datetime.fromtimestamp(row.timestamp_us / 1e6, UTC).isoformat()
