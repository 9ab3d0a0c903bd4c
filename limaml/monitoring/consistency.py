"""What requests were scored from against the offline join, a day at a time: contract 7, measured in production.

For each logged row the join is taken at one instant, so that the comparison is exact although days are published while
requests come in:

    the later of   the row's own event timestamp, as fetched,
    and            what was due: the `complete_through` that the server knew

so a row that a publication has just brought counts as right, and one that a publication failed to bring as wrong. Servers hold
item features in memory and read them anew every so often: due of them is what was complete a day earlier. Where the row's
timestamp is not known, the join is taken at `complete_through` alone; where neither is, at the request's own time.

Rows that were not read, because the store did not answer, are left out. Compare a day soon after it: a correction of an older
day rewrites the snapshots that requests before it rightly saw.

    consistency/dt=D/summary.json, views.parquet    counts, ratios and largest difference a view
    consistency/dt=D/differences.parquet            differing values, at most 1,000 a view
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from limaml import schema, telemetry
from limaml.config import Config, TaskKindConfig
from limaml.embeddings.published import published_files
from limaml.errors import GateError, NothingToDo
from limaml.events.day_store import partition
from limaml.features.feature_store import historical, open_store
from limaml.io.storage import Storage
from limaml.monitoring.comparison import EXAMPLES, PRESENT, VIEWS, Tally, compare_features, compare_vector
from limaml.monitoring.export import Gauges
from limaml.monitoring.request_files import request_files

if TYPE_CHECKING:
    from feast import FeatureStore

_log = telemetry.get_logger(__name__)

_REQUESTS_PER_PART = 4096
"""Requests held at a time; with 100 candidates each a few hundred MB before equal rows are put together."""
_ITEMS_MAY_LAG = timedelta(days=1)
_LIST_SEPARATOR = "\x1f"
"""Arrow groups by strings, not by lists."""

Vector = npt.NDArray[np.float32]


def compare_day(cfg: Config, day: date, gauges: Gauges) -> dict[str, Any]:
    """Compare the requests logged on `day`; returns totals and the table's path.

    Raises NothingToDo if none were logged, GateError above `monitoring.max_mismatch_ratio` in any view; what was found is then
    written and exported all the same.
    """
    requests, storage = Storage(cfg.serving.log_path), Storage(cfg.storage.root)
    files = request_files(requests, day)
    if not files:
        # The ratios of the last compared day stay exported; this says that they are not of this one.
        gauges.set(telemetry.CONSISTENCY_REQUESTS, 0)
        raise NothingToDo(f"no request was logged on {day}; serving.log_share = {cfg.serving.log_share:g} says how many are")
    offline, tallies, num_requests = _Offline(open_store(cfg), schema.tables(cfg.features)), defaultdict[str, Tally](Tally), 0
    for part in _parts(requests, files, offline.tables.request_log):
        num_requests += part.num_rows
        _compare_users(offline, tallies[schema.USER_VIEW], part)
        _compare_items(offline, tallies[schema.ITEM_VIEW], part)
        for affinity in offline.tables.affinities:
            _compare_entries(offline, tallies[affinity.name], part, affinity)
        _compare_embeddings(storage, tallies, part, cfg.task_kinds)
    views = [tallies[view].row(view) for view in sorted(tallies)]
    folder = f"consistency/{partition(day)}"
    examples = [example for view in sorted(tallies) for example in tallies[view].examples]
    storage.write_table(f"{folder}/differences.parquet", pa.Table.from_pylist(examples, EXAMPLES))
    storage.write_table(f"{folder}/views.parquet", pa.Table.from_pylist(views, VIEWS))
    storage.write_json(f"{folder}/summary.json", {"day": day.isoformat(), "requests": num_requests, "views": views})
    _set_gauges(gauges, tallies, num_requests)
    _log.info("consistency_compared", day=day.isoformat(), requests=num_requests, views=views)
    _refuse_above(cfg.monitoring.max_mismatch_ratio, tallies, storage.path(folder))
    return {"day": day.isoformat(), "requests": num_requests, "views": views, "path": storage.path(folder)}


def _set_gauges(gauges: Gauges, tallies: dict[str, Tally], num_requests: int) -> None:
    gauges.set(telemetry.CONSISTENCY_REQUESTS, num_requests)
    for view, tally in tallies.items():
        gauges.set(telemetry.MISMATCH_RATIO, tally.mismatch_ratio, view=view)
        gauges.set(telemetry.MISSING_RATIO, tally.missing_ratio, view=view)
        gauges.set(telemetry.MAX_DIFFERENCE, tally.max_difference, view=view)


def _refuse_above(limit: float, tallies: dict[str, Tally], path: str) -> None:
    """A missing row counts like a differing one: what was served has no counterpart."""
    ratios = {
        f"{view}.{name}": getattr(tally, name)
        for view, tally in sorted(tallies.items())
        for name in ("mismatch_ratio", "missing_ratio")
    }
    failed = [name for name, ratio in ratios.items() if ratio > limit]
    if failed:
        found = ", ".join(f"{name} = {ratios[name]:.4g}" for name in failed)
        raise GateError(
            f"what was served must equal the offline join, at most {limit:g} of it may differ (monitoring.max_mismatch_ratio), "
            f"got {found}; {path}/differences.parquet shows the values",
            failed,
        )


def _parts(requests: Storage, files: list[str], log: schema.Table) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for path in files:
        waiting.append(requests.dataset([path], log.arrow).to_table())
        if sum(table.num_rows for table in waiting) >= _REQUESTS_PER_PART:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


@dataclass(frozen=True)
class _Offline:
    """The join that training rows come from, by entity."""

    store: "FeatureStore"
    tables: schema.Tables

    def rows(self, logged: pa.Table, view: str, columns: Sequence[schema.Column], *keys: str) -> pa.Table:
        """`columns` of a view for the keys of each row at its instant, and whether there is a row."""
        number = pa.array([f"{at:09d}" for at in range(logged.num_rows)], pa.string())
        wanted = pa.table({"row": number, "timestamp": logged["compared_at"], **{key: logged[key] for key in keys}})
        joined = historical(self.store, wanted, [f"{view}:{column.name}" for column in columns]).sort_by("row")
        names = [column.name for column in columns]
        joined = joined.select(names).cast(pa.schema([(column.name, column.type) for column in columns]))
        return pa.table({name: _comparable(joined[name]) for name in names} | {PRESENT: _present(joined, names)})


def _present(table: pa.Table, names: Sequence[str]) -> pa.ChunkedArray:
    """Whether any feature is known: a row that is not there has none. Lists count only where there is nothing else."""
    plain = [name for name in names if not pa.types.is_list(table.schema.field(name).type)]
    known = [table[name].is_valid() for name in plain or names]
    return functools.reduce(pc.or_, known, pa.chunked_array([pa.array([False] * table.num_rows)]))


def _compare_users(offline: _Offline, tally: Tally, part: pa.Table) -> None:
    part = part.filter(part["user"].is_valid())
    fetched = _fields(part["user"])
    due = _instant(part, fetched["event_timestamp"], part["complete_through"])
    columns = offline.tables.features_of("user")
    logged = _distinct({"user_id": part["user_id"]}, due, fetched, columns)
    _compare(tally, schema.USER_VIEW, logged, offline.rows(logged, schema.USER_VIEW, columns, "user_id"), "user_id")


def _compare_items(offline: _Offline, tally: Tally, part: pa.Table) -> None:
    request = pc.list_parent_indices(part["items"])
    fetched = _fields(pc.list_flatten(part["items"]))
    through = part["complete_through"].take(request)
    columns = offline.tables.features_of("item")
    stamp_unknown = pc.and_(fetched["event_timestamp"].is_null(), _present(fetched, [column.name for column in columns]))
    earlier = pc.subtract(through, pa.scalar(_ITEMS_MAY_LAG, pa.duration("us")))
    due = _instant(part.take(request), fetched["event_timestamp"], pc.if_else(stamp_unknown, through, earlier))
    logged = _distinct({"item_id": pc.list_flatten(part["item_ids"])}, due, fetched, columns)
    _compare(tally, schema.ITEM_VIEW, logged, offline.rows(logged, schema.ITEM_VIEW, columns, "item_id"), "item_id")


def _compare_entries(offline: _Offline, tally: Tally, part: pa.Table, affinity: schema.Affinity) -> None:
    """What was read of users by an attribute of items; a candidate without a key has no entry."""
    part = part.filter(part["user"].is_valid())
    request = pc.list_parent_indices(part["candidates"])
    fetched = _fields(pc.list_flatten(part["candidates"]))
    items = _fields(pc.list_flatten(part["items"])).append_column("item_id", pc.list_flatten(part["item_ids"]))
    due = _instant(part.take(request), part["affinities_at"].take(request), part["complete_through"].take(request))
    keys = {"user_id": part["user_id"].take(request), affinity.by: items[affinity.by]}
    logged = _distinct(keys, due, fetched, affinity.joined)
    logged = logged.filter(logged[affinity.by].is_valid())
    _compare(tally, affinity.name, logged, offline.rows(logged, affinity.name, affinity.joined, *keys), *keys)


def _compare(tally: Tally, view: str, logged: pa.Table, offline: pa.Table, *keys: str) -> None:
    """`compare_features`, with the keys as the entity that examples name."""
    entity = pc.binary_join_element_wise(*(logged[key] for key in keys), " ")
    names = [name for name in offline.column_names if name != PRESENT]
    compare_features(tally, view, logged.append_column("entity", entity), offline, names)


def _fields(column: pa.ChunkedArray) -> pa.Table:
    """A column of structs as a table."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pa.Table.from_arrays(array.flatten(), names=[field.name for field in array.type])


def _instant(part: pa.Table, stamp: pa.ChunkedArray, due: pa.ChunkedArray) -> pa.ChunkedArray:
    """At which the offline join is taken; see the module."""
    # Arrow has the largest of numbers, not of timestamps.
    latest = pc.max_element_wise(stamp.cast(pa.int64()), due.cast(pa.int64()), skip_nulls=True)
    return pc.coalesce(latest.cast(schema.TIMESTAMP), part["logged_at"])


def _distinct(
    keys: Mapping[str, pa.ChunkedArray], at: pa.ChunkedArray, fetched: pa.Table, columns: Sequence[schema.Column]
) -> pa.Table:
    """Logged rows with their keys, `compared_at` and the features, equal ones once with their number in `rows`."""
    names = [column.name for column in columns]
    values = {name: _comparable(fetched[name]) for name in names if name not in keys} | {PRESENT: _present(fetched, names)}
    table = pa.table({**keys, "compared_at": at, **values})
    counted = table.group_by(table.column_names, use_threads=False).aggregate([([], "count_all")])
    return counted.rename_columns([*table.column_names, "rows"])


def _comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists as one string each; the store does not tell an empty list from none."""
    return pc.binary_join(column, _LIST_SEPARATOR).fill_null("") if pa.types.is_list(column.type) else column


def _compare_embeddings(storage: Storage, tallies: dict[str, Tally], part: pa.Table, kinds: Sequence[TaskKindConfig]) -> None:
    """Of the kinds that are configured."""
    columns, of = {kind.name: kind.entity_column for kind in kinds}, ("logged_at", "model_version", "complete_through")
    by_partition: dict[tuple[str, str], list[_LoggedEmbedding]] = defaultdict(list)
    held_in = {kind: _held_in(part.schema, column) for kind, column in columns.items()}
    for request in part.select([*of, *set(held_in.values()), "embeddings"]).to_pylist():
        seen: dict[str, int] = defaultdict(int)
        for one in request["embeddings"]:
            kind = one["kind"]
            if kind not in columns:
                continue
            entity = _entity(request[held_in[kind]], seen[kind], columns[kind])
            seen[kind] += 1
            if entity is None or (one["status"] == "store_error" and one["embedding"] is None):
                continue
            due = request["complete_through"]
            # What is held in memory may be as late as items' features are.
            due = due - _ITEMS_MAY_LAG if due and columns[kind] != "user_id" else due
            instants = [at for at in (one["as_of"], due) if at] or [request["logged_at"]]
            # A row of another version counts as missing (contract 3).
            mine = one["embedding"] if one["model_version"] == request["model_version"] else None
            vector = None if mine is None else np.array(mine, np.float32)
            by_partition[kind, request["model_version"]].append(_LoggedEmbedding(entity, max(instants), vector))
    for (kind, version), logged in sorted(by_partition.items()):
        view = f"meta_embedding_{kind}"
        known = _published_vectors(storage, kind, version, columns[kind], sorted({one.entity for one in logged}))
        for one in logged:
            where = {"view": view, "entity": one.entity, "compared_at": one.at}
            compare_vector(tallies[view], where, one.vector, _newest(known[one.entity], one.at))


def _held_in(log: pa.Schema, column: str) -> str:
    """Column of the request log that holds what a kind hangs on."""
    if column in ("user_id", "item_id"):
        return "user_id" if column == "user_id" else "item_ids"
    types = {name: log.field(name).type for name in ("context", "items", "candidates") if name in log.names}
    structs = {name: kind.value_type if pa.types.is_list(kind) else kind for name, kind in types.items()}
    return next(name for name, kind in structs.items() if kind.get_field_index(column) >= 0)


def _entity(held: Any, at: int, column: str) -> str | None:
    """What a request, or its candidate at a place, was served with in that column."""
    one = held[at] if isinstance(held, list) else held
    found: str | None = one[column] if isinstance(one, dict) else one
    return found


class _LoggedEmbedding(NamedTuple):
    entity: str
    at: datetime
    """Whose newest published row it must be as of."""
    vector: Vector | None


def _published_vectors(
    storage: Storage, kind: str, version: str, column: str, entities: list[str]
) -> dict[str, list[tuple[datetime, Vector]]]:
    """Entity -> (as_of, vector) of every row of the version's partitions."""
    columns = pa.schema([(column, pa.string()), ("as_of", schema.TIMESTAMP), ("embedding", pa.list_(pa.float32()))])
    dataset = storage.dataset(published_files(storage, kind, version), columns)
    found: dict[str, list[tuple[datetime, Vector]]] = defaultdict(list)
    for batch in dataset.to_batches(filter=ds.field(column).isin(pa.array(entities, pa.string()))):
        for row in batch.to_pylist():
            found[row[column]].append((row["as_of"], np.array(row["embedding"], np.float32)))
    return found


def _newest(rows: list[tuple[datetime, Vector]], at: datetime) -> list[Vector]:
    """Vectors of the newest as_of not later than `at`: two where a correction re-adapted as of the same instant."""
    newest = max((as_of for as_of, _ in rows if as_of <= at), default=None)
    return [vector for as_of, vector in rows if as_of == newest]
