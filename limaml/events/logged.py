"""Events with the features they were logged with: `logged/dt=D/logged-r0001.parquet`, written once with the events.

Training and daily adaptation read these; nothing joins them again: rows that a correction of their day leaves as they were keep
the features they were served with. `logged_superseded/` keeps what a correction replaced.
"""

from collections.abc import Sequence
from datetime import date

import pyarrow as pa
import pyarrow.dataset as ds

from limaml import schema
from limaml.events.day_store import partition, partition_files
from limaml.io.storage import Storage

_ROW = ("event_id", "user_id", "item_id", "timestamp")


def read_logged(
    storage: Storage,
    tables: schema.Tables,
    *,
    first: date | None = None,
    through: date,
    columns: Sequence[str] | None = None,
    entities: tuple[str, Sequence[str]] | None = None,
) -> pa.Table:
    """Logged events of the days from `first` to `through`, sorted by (user_id, timestamp, event_id).

    `entities` keeps the rows whose column (`user_id` or `item_id`) is among the given ids.
    """
    paths = partition_files(storage, "logged", first=first, through=through)
    rows = ds.field(entities[0]).isin(pa.array(entities[1], pa.string())) if entities else None
    names = list(columns or tables.logged_events.names)
    read = list(dict.fromkeys([*names, *(name for name, _ in schema.EVENT_ORDER)]))
    table = storage.dataset(paths, tables.logged_events.arrow).to_table(columns=read, filter=rows)
    return table.sort_by(schema.EVENT_ORDER).select(names).combine_chunks()


def write_logged(storage: Storage, day: date, table: pa.Table, revision: int) -> None:
    """Write a day's logged events; an older revision is moved aside first."""
    target = logged_path(day, revision)
    for path in partition_files(storage, "logged", first=day, through=day):
        if path != target:
            storage.move(path, path.replace("logged/", "logged_superseded/", 1))
    storage.write_table(target, table)


def keep_logged_features(storage: Storage, tables: schema.Tables, day: date, joined: pa.Table, revision: int) -> pa.Table:
    """`joined`, the day's rows of a new revision, with the features that the revision before it logged, where it has the row.

    A row is known by its event, user, item and timestamp: the label has no part in its features. Joined anew they could differ,
    where an older day was corrected meanwhile, and the embeddings of users whose rows did not change would not follow.
    """
    before, logged = _revision_before(storage, tables, day, revision), tables.logged_events
    if before is None:
        return joined
    row_of = {key: at for at, key in enumerate(_keys(before))}
    take = pa.array([row_of.get(key, before.num_rows + at) for at, key in enumerate(_keys(joined))], pa.int64())
    own = joined.select(tables.events.names)
    names = [column.name for column in tables.joined]
    features = pa.concat_tables([before.select(names), joined.select(names)]).take(take)
    for name in names:
        own = own.append_column(features.schema.field(name), features[name])
    return own.select(logged.names).cast(logged.arrow).combine_chunks()


def _revision_before(storage: Storage, tables: schema.Tables, day: date, revision: int) -> pa.Table | None:
    """It is still in place, or was moved aside by an ingestion that died."""
    path = logged_path(day, revision - 1)
    places = (path, path.replace("logged/", "logged_superseded/", 1))
    found = next((place for place in places if storage.exists(place)), None)
    return None if found is None else storage.read_table(found).cast(tables.logged_events.arrow)


def _keys(table: pa.Table) -> list[tuple[object, ...]]:
    columns = [table[name].cast(pa.int64()) if name == "timestamp" else table[name] for name in _ROW]
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def logged_path(day: date, revision: int) -> str:
    return f"logged/{partition(day)}/logged-r{revision:04d}.parquet"
