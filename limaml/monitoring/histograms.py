"""Columns as counts in bins that are fixed once, on the training window, so that a later day is counted in the same ones."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from limaml.metrics import bin_counts, quantile_edges, stability_of_counts

MAX_CATEGORIES = 50
"""The most frequent ones have a bin of their own, all others share one: rare categories would drown the index in chance."""


@dataclass(frozen=True)
class Histogram:
    """Numbers: bins between `edges`, two for what lies outside the window's range, one for nulls.

    Strings, and strings in lists: a bin a category of `categories`, one for all others, one for nulls.
    """

    counts: tuple[float, ...]
    edges: tuple[float, ...] = ()
    categories: tuple[str, ...] | None = None

    @classmethod
    def fit(cls, column: pa.ChunkedArray) -> "Histogram":
        """Choose the bins from a column's values and count them."""
        if _is_number(column):
            known = column.drop_null().cast(pa.float64()).to_numpy()
            empty = cls((), edges=_edges(known))
        else:
            frequent = Counter(value for value in _strings(column) if value is not None).most_common(MAX_CATEGORIES)
            empty = cls((), categories=tuple(sorted(value for value, _ in frequent)))
        return empty.recount(column)

    def recount(self, column: pa.ChunkedArray) -> "Histogram":
        """The same bins with another column's counts."""
        if self.categories is None:
            known = column.drop_null().cast(pa.float64()).to_numpy()
            counts = [*bin_counts(np.array(self.edges), known).tolist(), float(column.null_count)]
        else:
            found = Counter(_strings(column))
            own = [float(found.pop(value, 0)) for value in self.categories]
            nulls = float(found.pop(None, 0))
            counts = [*own, float(found.total()), nulls]
        return Histogram(tuple(counts), self.edges, self.categories)

    def drift(self, column: pa.ChunkedArray) -> float:
        """Population stability index of a column against this histogram; bins that are empty on both sides do not count."""
        expected, actual = np.array(self.counts), np.array(self.recount(column).counts)
        used = (expected > 0) | (actual > 0)
        return stability_of_counts(expected[used], actual[used])

    def to_dict(self) -> dict[str, Any]:
        categories = None if self.categories is None else list(self.categories)
        return {"counts": list(self.counts), "edges": list(self.edges), "categories": categories}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Histogram":
        categories = None if value["categories"] is None else tuple(value["categories"])
        return cls(tuple(value["counts"]), tuple(value["edges"]), categories)


def _edges(known: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Deciles and the ends of the range: without these a constant could become any larger one unseen."""
    if not len(known):
        return ()
    ends = [known.min(), np.nextafter(known.max(), np.inf)]
    return tuple(np.unique([*ends, *quantile_edges(known)]).tolist())


def _is_number(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_integer(column.type) or pa.types.is_floating(column.type))


def _strings(column: pa.ChunkedArray) -> list[str | None]:
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    strings: list[str | None] = values.to_pylist()
    return strings
