"""Which keys a user's map drops, and when: it keeps those with the newest events, so many (an affinity's `max_keys`)."""

from collections import defaultdict
from typing import Any

import pyarrow as pa

from limaml.events.state import Subject


def dropped_keys(connection: Any, subject: Subject, first: int) -> pa.Table:
    """(keys, day) of every key that is dropped at the end of a day from `first` on; of entities none.

    The connection sees `base`, the state before, and `steps`, the days of each key with an event.
    """
    columns = {key: pa.string() for key in subject.keys} | {"day": pa.int64()}
    if subject.affinity is None:
        return pa.schema(columns).empty_table()
    most, key = subject.affinity.max_keys, subject.keys[1]
    # Only of users who have had more keys: most of a service's users never do.
    rows = connection.sql(
        f"WITH seen AS (SELECT user_id, {key}, last_day AS day FROM base"
        f" UNION ALL SELECT user_id, {key}, day FROM steps WHERE day >= $first),"
        f" many AS (SELECT user_id FROM seen GROUP BY user_id HAVING count(DISTINCT {key}) > $most)"
        f" FROM seen SEMI JOIN many USING (user_id) ORDER BY user_id, day, {key}",
        params={"first": first, "most": most},
    ).to_arrow_table()
    found = _least_recent(list(zip(*(rows[name].to_pylist() for name in ("user_id", key, "day")), strict=True)), first, most)
    values = zip(*found, strict=True) if found else ((), (), ())
    return pa.table([pa.array(each, kind) for each, kind in zip(values, columns.values(), strict=True)], list(columns))


def _least_recent(rows: list[tuple[str, str, int]], first: int, most: int) -> list[tuple[str, str, int]]:
    """Users' keys in the order of time; what is over `most` at the end of a day goes, the one with the oldest event first."""
    found: list[tuple[str, str, int]] = []
    held: dict[str, dict[str, None]] = defaultdict(dict)
    for at, (user, key, day) in enumerate(rows):
        mine = held[user]
        mine.pop(key, None)
        mine[key] = None  # to the end: a dictionary keeps the order of insertion
        is_over = at + 1 == len(rows) or rows[at + 1][0] != user or rows[at + 1][2] != day
        if is_over and day >= first:
            while len(mine) > most:
                oldest = next(iter(mine))
                del mine[oldest]
                found.append((user, oldest, day))
    return found
