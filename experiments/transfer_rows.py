"""Rows of a draw of new items, and the catalogues that a shop would have ranked for its judged users' days.

E events, L lists (a user's day), P positives of the lists, C candidates of the lists
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from experiments.evidence.catalogue import _as_logged, _put
from experiments.evidence.fit_data import FitData
from experiments.evidence.measure import TOP, Mask
from limaml.config import Config
from limaml.metrics import Floats, Ints
from limaml.models.network import Network
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows, TaskSpec
from limaml.training.scoring import embed_specs, score_with_embeddings

GROUPS = {"unseen": (0, 0), "few": (1, 5), "rare": (6, 50), "warm": (51, np.inf), "all": (0, np.inf)}
"""Rows of the item before the day."""
LISTS = 100
"""Of each draw and group, user's days whose catalogue is ranked."""
_DAYS = 100_000


def inside(seen: Ints, group: str) -> Mask:
    low, high = GROUPS[group]
    return (seen >= low) & (seen <= high)


class Draw:
    """What a world delivers when some of its items are new, one value an event; users and items by place in the catalogue."""

    def __init__(self, events: pa.Table, users: pa.Array, items: pa.Table, first_judged: int) -> None:
        """`first_judged` is a day, since 1970."""
        self.events, self.users, self.items, self.first_judged = events, users, items, first_judged
        self.item_ids = items["item_id"].combine_chunks()
        self.user_E, self.item_E = (
            pc.index_in(events[name].combine_chunks(), value_set=ids).to_numpy().astype(np.int64)
            for name, ids in (("user_id", users), ("item_id", self.item_ids))
        )
        self.day_E: Ints = events["timestamp"].cast(pa.int64()).to_numpy() // MICROSECONDS_PER_DAY
        self.label_E: Floats = events["label"].to_numpy().astype(np.float64)

    @classmethod
    def read(cls, cfg: Config) -> "Draw":
        """As `experiments.transfer_jobs.deliver` wrote it, events by their ids."""
        folder, first_judged = Path(cfg.source.path), cfg.evaluation.test_from
        assert first_judged is not None
        events = pq.read_table(folder / "events").sort_by("event_id").combine_chunks()
        users, items = (pq.read_table(folder / f"{name}s.parquet").sort_by(f"{name}_id") for name in ("user", "item"))
        return cls(events, users["user_id"].combine_chunks(), items, (first_judged - date(1970, 1, 1)).days)

    def seen(self, item: Ints, day: Ints) -> Ints:
        """Rows of each item before the day."""
        return _before(self.item_E, self.day_E, item, day)

    def user_seen(self, user: Ints, day: Ints) -> Ints:
        """Rows of each user before the day."""
        return _before(self.user_E, self.day_E, user, day)

    @cached_property
    def lists(self) -> "Lists":
        """Of each group of items, judged users' days with a positive of it, at most `LISTS`."""
        at_P = np.flatnonzero((self.day_E >= self.first_judged) & (self.label_E > 0))
        found = np.unique(np.stack([self.user_E[at_P], self.day_E[at_P], self.item_E[at_P]]), axis=1)
        days_L, list_P = np.unique(found[:2], axis=1, return_inverse=True)
        seen_P, rng = self.seen(found[2], found[1]), np.random.default_rng(0)
        sampled = {}
        for group in GROUPS:
            mine = np.unique(list_P[inside(seen_P, group)])
            sampled[group] = np.isin(np.arange(days_L.shape[1]), rng.permutation(mine)[:LISTS])
        kept_L = np.any(list(sampled.values()), axis=0)
        kept_P = kept_L[list_P]
        (user_L, day_L), list_P = np.unique(found[:2, kept_P], axis=1, return_inverse=True)
        groups = {group: mask_L[kept_L] for group, mask_L in sampled.items()}
        return Lists(user_L, day_L, list_P, found[2, kept_P], seen_P[kept_P], groups)


@dataclass(frozen=True)
class Lists:
    user_L: Ints
    day_L: Ints
    list_P: Ints
    item_P: Ints
    seen_P: Ints
    sampled: dict[str, Mask]
    """Group -> (L,) whether the list is of its sample."""


def _before(code_E: Ints, day_E: Ints, code: Ints, day: Ints) -> Ints:
    keys = np.sort(code_E * _DAYS + day_E)
    found: Ints = np.searchsorted(keys, code * _DAYS + day) - np.searchsorted(keys, code * _DAYS)
    return found


def candidates(draw: Draw, *, offered: bool) -> tuple[Ints, Ints, Ints]:
    """(C,) list, item, and the event whose context is the candidate's.

    `offered`: those that anybody has a row with on that day, the user's own row before others'. Otherwise the whole catalogue,
    but for what the user had before where nobody has an item twice.
    """
    pairs = np.unique(np.stack([draw.user_E, draw.item_E]), axis=1)
    once, parts = pairs.shape[1] == len(draw.user_E), []
    for number, (user, day) in enumerate(zip(draw.lists.user_L, draw.lists.day_L, strict=True)):
        today = np.flatnonzero(draw.day_E == day)
        own = draw.user_E[today] == user
        if offered:
            today = today[np.argsort(~own, kind="stable")]
            items, first = np.unique(draw.item_E[today], return_index=True)
            context = today[first]
        else:
            had = draw.item_E[(draw.user_E == user) & (draw.day_E < day)] if once else []
            items = np.setdiff1d(np.arange(draw.items.num_rows), had)
            context = np.full(len(items), today[own][0])
        parts.append((np.full(len(items), number), items, context))
    lists, items, context = (np.concatenate(each) for each in zip(*parts, strict=True))
    return lists, items, context


def as_logged(draw: Draw, cfg: Config, list_C: Ints, item_C: Ints, context_C: Ints) -> pa.Table:
    """Candidates as events with the features that they would have been logged with (`cfg`'s root holds the draw ingested)."""
    columns = {
        "event_id": pa.array(np.arange(len(list_C)).astype(str)),
        "user_id": draw.users.take(pa.array(draw.lists.user_L[list_C])),
        "item_id": draw.item_ids.take(pa.array(item_C)),
    }
    return _as_logged(cfg, _put(draw.events.take(pa.array(context_C)), columns))


def rank(draw: Draw, data: FitData, network: Network, specs: Sequence[TaskSpec], *, offered: bool) -> dict[str, Ints]:
    """Score every candidate with its user's embedding of that day; `specs` are users' days among `data.test`.

    Returns `above` of each positive, in the order of `Draw.lists`: the candidates with a higher score that are no positives of
    the day; and `top` (L, TOP), the items of the first places, -1 where there are fewer.
    """
    list_C, item_C, context_C = candidates(draw, offered=offered)
    logged, rows = as_logged(draw, data.cfg, list_C, item_C, context_C), data.test.rows
    ranked = TaskRows.from_logged(logged, data.encoder, data.cfg.task_kind)
    query = np.argsort(ranked.source_row)
    spec_of = {(rows.entities[spec.entity], spec.as_of_us // MICROSECONDS_PER_DAY): spec for spec in specs}
    users = draw.users.take(pa.array(draw.lists.user_L)).to_pylist()
    served = [spec_of[user, day] for user, day in zip(users, draw.lists.day_L.tolist(), strict=True)]
    ends = list(pairwise(np.searchsorted(list_C, np.arange(len(served) + 1))))
    asked = [
        TaskSpec(spec.entity, spec.as_of_us, 0, 0, query[start:end]) for spec, (start, end) in zip(served, ends, strict=True)
    ]
    score_C = score_with_embeddings(network, ranked, asked, embed_specs(network, rows, served))
    top = np.full((len(served), TOP), -1)
    above = np.empty(len(draw.lists.item_P), np.int64)
    for number, (start, end) in enumerate(ends):
        items, found = item_C[start:end], score_C[start:end]
        best = np.argsort(-found, kind="stable")[:TOP]
        top[number, : len(best)] = items[best]
        mine = np.flatnonzero(draw.lists.list_P == number)
        positive = np.isin(items, draw.lists.item_P[mine])
        own_scores, others = found[np.searchsorted(items, draw.lists.item_P[mine])], np.sort(found[~positive])
        above[mine] = len(others) - np.searchsorted(others, own_scores, side="right")
    return {"above": above, "top": top}
