"""What is past its retention is dropped: `limaml retain --day D`, a task of every day.

Rows keep the values of a feature for its `retention_days` N. At the end of day D they are dropped from the rows of day D - N
and of all before it, in place: they become null, which is a value that every network knows. The day keeps its rows and its
revision; its manifest names what was dropped (contract 1).

    events/, events_superseded/    what events brought, of the context and of the event
    logged/, logged_superseded/    that, and what the events were joined with
    recent/                        made of those, and made again without

What holds requests or rows whole goes with the first of its values that is past, a day at a time: the request log (also after
`governance.request_log_days`), the values in which a comparison of it differed (consistency/), and quarantined deliveries.

Of the snapshots, values that are made of events are dropped likewise; so many days after an entity's last event a row without
them takes their place, in the online store, too (limaml.events.state). Values of a catalogue are kept as long as the source
delivers them; of what another delivery has replaced, the rows that are past are dropped.

    snapshots/, catalogue_history/    of users and of items
    state/                            days that are past; a correction of a day before the oldest that is left reads all events
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema, telemetry
from limaml.config import Config, FeatureConfig
from limaml.errors import NothingToDo
from limaml.events import catalogue, state
from limaml.events.catalogue import Kind
from limaml.events.day_store import EventStore, partition_day, partition_files
from limaml.io.locks import Lock, exclusive
from limaml.io.storage import Storage

_ROWS = ("events", "events_superseded", "logged", "logged_superseded")
_LOCK_WAIT_S = 600.0
"""An ingestion of a day may be under way."""
_log = telemetry.get_logger(__name__)


def retain(cfg: Config, day: date) -> dict[str, Any]:
    """Drop what is past its retention at the end of `day`; returns counts. Raises NothingToDo if that is nothing.

    A run that died is simply done again: a day's manifest names a feature once no row of it holds a value.
    """
    storage = Storage(cfg.storage.root)
    with exclusive(cfg, "ingest", _LOCK_WAIT_S) as lock:
        features = _drop_values(cfg, storage, day, lock)
        files = sum(_drop_known(storage, kind, day, lock) for kind in catalogue.kinds(schema.tables(cfg.features)).values())
        folders = _delete_days(Storage(cfg.serving.log_path), "", last_day(request_log_days(cfg), day), lock)
        folders += _delete_days(storage, "consistency", last_day(request_log_days(cfg), day), lock)
        folders += _delete_days(storage, "quarantine", last_day(quarantine_days(cfg), day), lock)
    if not features and not files and not folders:
        raise NothingToDo(f"nothing is past its retention at the end of {day}")
    _log.info("retention_applied", day=day.isoformat(), values=features, files=files, folders=len(folders))
    # A result holds 4 KiB, and there may be hundreds of features: they are in the log.
    counts = {"features": len(features), "feature_days": sum(features.values()), "files": files, "folders": len(folders)}
    return {"day": day.isoformat(), **counts}


def last_day(days: int | None, day: date) -> date | None:
    """The last day that is past a retention of so many days at the end of `day`; None without one."""
    return day - timedelta(days=days) if days else None


def request_log_days(cfg: Config) -> int | None:
    """How long a logged request is kept: by its own setting, and by the shortest retention of what it holds."""
    days = [feature.retention_days for feature in cfg.features if feature.retention_days and feature.entity != "event"]
    return min([*days, *([cfg.governance.request_log_days] if cfg.governance.request_log_days else [])], default=None)


def quarantine_days(cfg: Config) -> int | None:
    """How long a refused delivery is kept, which holds what events bring."""
    return min((f.retention_days for f in cfg.features if f.retention_days and f.is_delivered), default=None)


def _drop_values(cfg: Config, storage: Storage, day: date, lock: Lock) -> dict[str, int]:
    """Feature -> number of days whose rows no longer hold its values."""
    store, counts = EventStore(storage, schema.tables(cfg.features).events), dict[str, int]()
    limits = {f.name: last for f in cfg.features if (last := last_day(f.retention_days, day)) is not None}
    if not limits:
        return counts
    for at, manifest in store.manifests().items():
        past = sorted(name for name, last in limits.items() if at <= last and name not in manifest.dropped)
        if manifest.status != "passed" or not past:
            continue
        for path in [path for folder in _ROWS for path in partition_files(storage, folder, first=at, through=at)]:
            lock.check()
            _write_without(storage, path, past)
        # Made of these rows; what is not there is read from all logged days.
        lock.check()
        storage.delete_dir("recent")
        store.commit(replace(manifest, dropped=tuple(sorted({*manifest.dropped, *past}))))
        for name in past:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _write_without(storage: Storage, path: str, names: Sequence[str]) -> None:
    table = storage.read_table(path)
    mine = [name for name in names if name in table.column_names and table[name].null_count < table.num_rows]
    for name in mine:
        field = table.schema.field(name)
        table = table.set_column(table.column_names.index(name), field, pa.nulls(table.num_rows, field.type))
    if mine:
        storage.write_table(path, table)


def _drop_known(storage: Storage, kind: Kind, day: date, lock: Lock) -> int:
    """Drop what is past of what was known of users or items at the end of earlier days; returns the number of files changed."""
    limits = {feature: last for feature in kind.features if (last := last_day(feature.retention_days, day)) is not None}
    if not limits:
        return 0
    changed = 0
    for folder in (f"snapshots/{kind.name}", f"catalogue_history/{kind.name}"):
        replaced = set[str]()
        for path in reversed([path for path in storage.walk(folder) if _day_of(path) <= day]):
            past = [feature for feature, last in limits.items() if _day_of(path) <= last]
            known = storage.read_columns(path, [kind.key, *(feature.name for feature in past)])
            if any(known[name].null_count < len(known) for name in known.column_names[1:]):
                table = storage.read_table(path)
                without = _without_known(table, kind.key, past, replaced)
                if not without.equals(table):
                    lock.check()
                    storage.write_table(path, without)
                    changed += 1
            replaced.update(known[kind.key].to_pylist())
    return changed + state.drop(storage, kind.name, max(limits.values()))


def _without_known(table: pa.Table, key: str, past: Sequence[FeatureConfig], replaced: set[str]) -> pa.Table:
    """Rows of known entities without the values in `past`: made of events all, delivered ones of entities in `replaced`."""
    is_replaced = pa.array([entity in replaced for entity in table[key].to_pylist()], pa.bool_())
    for feature in past:
        if feature.name in table.column_names:
            # A count could not be null before its retention was declared.
            field, values = table.schema.field(feature.name).with_nullable(True), table[feature.name]
            goes = pa.scalar(True) if feature.aggregate else is_replaced
            kept = pc.if_else(goes, pa.scalar(None, field.type), values)
            table = table.set_column(table.column_names.index(feature.name), field, kept)
    return table


def _day_of(path: str) -> date:
    return partition_day(next(part for part in path.split("/") if part.startswith("dt=")))


def _delete_days(storage: Storage, folder: str, last: date | None, lock: Lock) -> list[str]:
    """Delete the day folders below one up to a day; returns their paths."""
    deleted = []
    for name in storage.list(folder):
        if name.startswith("dt=") and last is not None and partition_day(name) <= last:
            lock.check()
            path = f"{folder}/{name}" if folder else name
            storage.delete_dir(path)
            deleted.append(storage.path(path))
    return deleted
