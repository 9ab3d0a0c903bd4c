"""Events with the features they were logged with: `logged/dt=D/logged-r0001.parquet`, written once with the events.

Training and daily adaptation read these; nothing joins them again. `logged_superseded/` keeps what a correction replaced.
"""

from collections.abc import Sequence
from datetime import date

import pyarrow as pa
import pyarrow.dataset as ds

from limaml import schema
from limaml.data.events import ORDER, partition, partition_files
from limaml.data.storage import Storage


def read_logged(
    storage: Storage,
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
    names = list(columns or schema.LOGGED_EVENTS.names)
    read = list(dict.fromkeys([*names, *(name for name, _ in ORDER)]))
    table = storage.dataset(paths, schema.LOGGED_EVENTS.arrow).to_table(columns=read, filter=rows)
    return table.sort_by(ORDER).select(names).combine_chunks()


def write_logged(storage: Storage, day: date, table: pa.Table, revision: int) -> None:
    """Write a day's logged events; an older revision is moved aside first."""
    target = logged_path(day, revision)
    for path in partition_files(storage, "logged", first=day, through=day):
        if path != target:
            storage.move(path, path.replace("logged/", "logged_superseded/", 1))
    storage.write_table(target, table)


def logged_path(day: date, revision: int) -> str:
    return f"logged/{partition(day)}/logged-r{revision:04d}.parquet"
