"""Whole lists as a shop would rank them: all that was on offer on a returning user's day, not what they were shown alone.

A sampled visit becomes an entity of its own: the user's rows before the day, and a row for each candidate. Candidates are the
items that anybody has a row with on that day, without what the user had before where nobody has an item twice. A list is one
request: its time and context are those of the user's first row of that day. A candidate's own context (`per_candidate`) is of
the user's row of it, otherwise of somebody else's. Features are joined as they would have been logged.

N logged rows, C candidates, V visits
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import Config
from limaml.evaluation.scoring_method import MethodInput
from limaml.events.day_store import partition_files
from limaml.events.point_in_time import join
from limaml.events.snapshots import subjects
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.metrics import Ints
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskSpec
from limaml.tasks.splits import Split

VISITS = 150
"""At most, at an origin: days of returning users with a positive."""
_AT = "@"


@dataclass(frozen=True)
class Lists:
    """Candidates of sampled visits."""

    logged: pa.Table
    """The visits' earlier rows, then the candidates; a `user_id` is user@day."""
    num_candidates: int

    @property
    def candidates(self) -> pa.Table:
        """(C rows) with their users' own ids."""
        rows = self.logged.slice(self.logged.num_rows - self.num_candidates)
        return with_columns(
            rows, {"user_id": pa.array([name.rpartition(_AT)[0] for name in rows["user_id"].to_pylist()], pa.string())}
        )

    def tasks(self, encoder: Encoder, cfg: Config) -> tuple[MethodInput, list[TaskSpec]]:
        """Rows and a task a visit, for any method; a visit has its user's place in the vocabulary."""
        inputs = MethodInput.from_logged(self.logged, encoder, cfg)
        index = encoder.entity_index([name.rpartition(_AT)[0] for name in inputs.rows.entities], "user_id")
        rows, specs = replace(inputs.rows, entity_index=index), []
        is_candidate = rows.source_row >= self.logged.num_rows - self.num_candidates
        for visit, (start, stop) in enumerate(zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True)):
            first = stop - int(is_candidate[start:stop].sum())
            day_us = int(rows.entities[visit].rpartition(_AT)[2]) * MICROSECONDS_PER_DAY
            since = max(start, first - cfg.support_rows_of(cfg.task_kind.name))
            specs.append(TaskSpec(visit, day_us, since, first, np.arange(first, stop)))
        return replace(inputs, rows=rows), specs


def place(found: Lists, inputs: MethodInput, specs: list[TaskSpec]) -> Ints:
    """(C,) which candidate each of the tasks' query rows is."""
    asked = np.concatenate([spec.query for spec in specs])
    at: Ints = inputs.rows.source_row[asked] - (found.logged.num_rows - found.num_candidates)
    return at


def sampled(cfg: Config, logged: pa.Table, split: Split) -> Lists | None:
    """Lists of known users' visits from T2 on; None where nobody came back and took something."""
    time_N, label_N = logged["timestamp"].cast(pa.int64()).to_numpy(), logged["label"].to_numpy()
    day_N = time_N // MICROSECONDS_PER_DAY
    names = {name: logged[name].combine_chunks().dictionary_encode() for name in ("user_id", "item_id")}
    user_N, item_N = (coded.indices.to_numpy().astype(np.int64) for coded in names.values())
    once = np.unique(np.stack([user_N, item_N]), axis=1).shape[1] == len(user_N)
    first_U = np.full(int(user_N.max()) + 1, day_N.max())
    np.minimum.at(first_U, user_N, day_N)
    known_N = pc.is_in(logged["user_id"], value_set=pa.array(split.train_users, pa.string())).to_numpy()
    later_N = day_N > np.maximum(first_U[user_N], split.validation_end_us // MICROSECONDS_PER_DAY - 1)
    visit_2V = np.unique(np.stack([user_N, day_N])[:, known_N & later_N & (label_N == 1)], axis=1)
    earlier, offered, asking, label = [], [], [], []
    for mine, day in visit_2V[:, np.sort(np.random.default_rng(0).permutation(visit_2V.shape[1])[:VISITS])].T:
        today = np.flatnonzero(day_N == day)
        others = user_N[today] != mine
        # Of an item's rows one is taken: the user's own before others', a positive one before the rest.
        order = np.lexsort((-label_N[today], others))
        items, at = np.unique(item_N[today][order], return_index=True)
        before = np.flatnonzero((user_N == mine) & (day_N < day))
        at = order[at[~np.isin(items, item_N[before])] if once else at]
        earlier.append(before)
        offered.append(today[at])
        own = today[~others]
        asking.append(np.full(len(at), own[np.argmin(time_N[own])]))
        label.append(np.where(others[at], 0, label_N[today[at]]))
    if not offered:
        return None
    asked, requests = (logged.take(pa.array(np.concatenate(rows))) for rows in (offered, asking))
    once_each = schema.tables(cfg.features).context(per_candidate=False).names
    put = {
        "event_id": pa.array([f"candidate-{number}" for number in range(asked.num_rows)]),
        "label": pa.array(np.concatenate(label), logged.schema.field("label").type),
        **{name: requests[name] for name in ("user_id", "timestamp", *once_each) if name in logged.column_names},
    }
    candidates = joined(cfg, with_columns(asked, put))
    past = logged.take(pa.array(np.concatenate(earlier)))
    day_of = [np.full(len(each), day_N[new[0]]) for each, new in zip(earlier, offered, strict=True)]
    return Lists(
        pa.concat_tables([_by_visit(past, np.concatenate(day_of)), _by_visit(candidates, day_N[np.concatenate(offered)])]),
        candidates.num_rows,
    )


def joined(cfg: Config, events: pa.Table) -> pa.Table:
    """Events with the features that they would have been logged with."""
    tables, storage = schema.tables(cfg.features), Storage(cfg.storage.root)
    known = {
        name: storage.dataset(partition_files(storage, f"snapshots/{name}"), subject.snapshots.arrow).to_table()
        for name, subject in subjects(tables).items()
    }
    return join(events.select(tables.events.names), tables, known)


def _by_visit(rows: pa.Table, day: Ints) -> pa.Table:
    names = [f"{user}{_AT}{at}" for user, at in zip(rows["user_id"].to_pylist(), day.tolist(), strict=True)]
    return with_columns(rows, {"user_id": pa.array(names, pa.string())})


def with_columns(rows: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    """The rows with other values in these columns."""
    for name, column in columns.items():
        field = rows.schema.field(name)
        rows = rows.set_column(rows.column_names.index(name), field, column.cast(field.type))
    return rows
