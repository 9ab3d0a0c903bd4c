"""Rows that did not happen: for every positive one, items that its user did not take that day (`source.negatives`).

What is drawn is a function of the event's id, the seed and the items known that day: no order of rows, no earlier draw enters.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from limaml.config import NegativesConfig

WEIGHT = "sampling_weight"
_GOLDEN = 0x9E3779B97F4A7C15
_SPARE_DRAWS = 16
"""Draws an event beyond three a row wanted; whoever is still short gets theirs from a look at all items."""

Indices = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


def with_negatives(positives: pa.Table, known: pa.Table, cfg: NegativesConfig) -> pa.Table:
    """A day's positive events and `per_positive` sampled rows for each: another item, label 0, all else the same.

    `known` holds every item known that day, its `item_id` ascending and `num_rows`, its popularity. The column
    `sampling_weight` says for how many rows that did not happen a sampled one stands; it is 1 for a positive. An event whose
    user took nearly all items gets the rest only.
    """
    event, item, weight = _draw(positives, known, cfg)
    drawn = positives.take(pa.array(event))
    items = known["item_id"].take(pa.array(item))
    # What else the row has is the moment's, which is the same for all items; a null would tell the label.
    columns = {name: drawn[name] for name in drawn.column_names} | {
        "event_id": pa.array([_digest(*pair) for pair in zip(drawn["event_id"].to_pylist(), items.to_pylist(), strict=True)]),
        "item_id": items,
        "label": pa.array(np.zeros(len(event), np.int8)),
        WEIGHT: pa.array(weight),
    }
    happened = positives.append_column(WEIGHT, pa.array(np.ones(positives.num_rows)))
    return pa.concat_tables([happened, pa.table(columns).select(happened.column_names).cast(happened.schema)])


def _draw(positives: pa.Table, known: pa.Table, cfg: NegativesConfig) -> tuple[Indices, Indices, Numbers]:
    """Row of the positive event, index of the item, and weight, of every sampled row."""
    num_items = known.num_rows
    if not num_items:  # The table of items holds none of those that events name, which their gate then says.
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    chance = known["num_rows"].to_numpy().astype(np.float64) if cfg.by == "popularity" else np.ones(num_items)
    user = positives["user_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    mine = pc.index_in(positives["item_id"], value_set=known["item_id"].combine_chunks())
    at = pc.fill_null(mine, -1).to_numpy().astype(np.int64)
    taken = np.unique((user * num_items + at)[at >= 0])
    events = np.array([_number(cfg.seed, event_id) for event_id in positives["event_id"].to_pylist()], np.uint64)
    chosen = _reject(events, user, taken, chance, cfg.per_positive)
    _complete(chosen, events, user, taken, chance)
    event, column = np.nonzero(chosen >= 0)
    item = chosen[event, column]
    left = chance.sum() - np.bincount(taken // num_items, chance[taken % num_items], minlength=user.max(initial=0) + 1)
    drawn = (chosen >= 0).sum(axis=1)
    return event, item, left[user[event]] / (chance[item] * drawn[event])


def _reject(events: npt.NDArray[np.uint64], user: Indices, taken: Indices, chance: Numbers, wanted: int) -> Indices:
    """Distinct items drawn for every event, -1 where the draws did not suffice; an item that the user took is drawn in vain."""
    chosen = np.full((len(events), wanted), -1, np.int64)
    count = np.zeros(len(events), np.int64)
    edges = np.cumsum(chance)
    for draw in range(3 * wanted + _SPARE_DRAWS):
        short = np.nonzero(count < wanted)[0]
        if not len(short):
            break
        # (0, 1): the end itself would be no item's.
        point = _uniform(events[short] + np.uint64((draw + 1) * _GOLDEN % 2**64)) * edges[-1]
        item = np.minimum(np.searchsorted(edges, point, side="right"), len(edges) - 1)
        free = ~_is_in(user[short] * len(edges) + item, taken) & ~(chosen[short] == item[:, None]).any(axis=1)
        rows = short[free]
        chosen[rows, count[rows]] = item[free]
        count[rows] += 1
    return chosen


def _complete(chosen: Indices, events: npt.NDArray[np.uint64], user: Indices, taken: Indices, chance: Numbers) -> None:
    """Fill what is missing from all items left, by least -log(u) / chance (Efraimidis and Spirakis 2006)."""
    every = np.arange(len(chance))
    for row in np.nonzero((chosen < 0).any(axis=1))[0]:
        free = ~_is_in(user[row] * len(chance) + every, taken) & ~np.isin(every, chosen[row]) & (chance > 0)
        left = every[free]
        key = -np.log(_uniform(events[row] ^ _mix((left + 1).astype(np.uint64)))) / chance[left]
        missing = np.nonzero(chosen[row] < 0)[0]
        found = left[np.lexsort((left, key))][: len(missing)]
        chosen[row, missing[: len(found)]] = found


def _is_in(values: Indices, ascending: Indices) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(values.shape, np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[at] == values)


def _uniform(numbers: npt.NDArray[np.uint64]) -> Numbers:
    """Numbers in (0, 1) of mixed bits."""
    return ((_mix(numbers) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _number(seed: int, event_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {event_id}".encode(), digest_size=8).digest(), "little")


def _digest(event_id: str, item_id: str) -> str:
    return hashlib.blake2b(f"{event_id}\x1f{item_id}".encode(), digest_size=16).hexdigest()
