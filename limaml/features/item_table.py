"""The item table: what a network reads of an item's vectors, held once an item. Rows of events hold an item's place in it.

I items, R rows, F numbers of a row, V of them vectors
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa

from limaml.config import FeatureConfig
from limaml.features.columns import Floats, Indices, VectorEncoder, index_of, look_up


@dataclass(frozen=True)
class ItemTable:
    """Encoded vectors of known items; row 0 is every other item's, all zeros as a null's."""

    ids: tuple[str, ...]
    """Of rows 1 to I."""
    encoded: Floats
    """(I + 1, V)"""
    place: int
    """Where the vectors stand among an item's numbers: behind what else does not change with time."""
    dropout_V: Floats | None = None
    """Share of training rows that each number is dropped from; None where nothing is."""

    @classmethod
    def build(
        cls, features: Sequence[FeatureConfig], encoders: Mapping[str, VectorEncoder], items: pa.Table, place: int
    ) -> Self:
        """Encode the vectors of `items` (`schema.Tables.item_vectors`)."""
        widths = [encoders[feature.name].width for feature in features]
        encoded, start = np.zeros((items.num_rows + 1, sum(widths)), np.float32), 0
        for feature, width in zip(features, widths, strict=True):
            encoders[feature.name].encode(items[feature.name].combine_chunks(), encoded[1:, start : start + width])
            start += width
        # Whether a vector is known is never dropped.
        parts = [np.append(np.full(width - 1, each.dropout), 0.0) for each, width in zip(features, widths, strict=True)]
        dropout_V = np.concatenate(parts).astype(np.float32)
        return cls(tuple(items["item_id"].to_pylist()), encoded, place, dropout_V if dropout_V.any() else None)

    @cached_property
    def _row(self) -> dict[str, int]:
        return index_of(self.ids)

    def rows(self, item_ids: pa.Array) -> Indices:
        """(R,) row of each item, 0 for one that is not known."""
        return look_up(item_ids, self._row)

    def beside(self, item_dense: Floats, rows: Indices) -> Floats:
        """(..., F) an item's other numbers (..., F - V) and, in their place, the vectors of these rows (...)."""
        first, end = self.place, self.place + self.width
        found = np.empty((*rows.shape, item_dense.shape[-1] + self.width), np.float32)
        found[..., :first] = item_dense[..., :first]
        found[..., first:end] = self.encoded[rows]
        found[..., end:] = item_dense[..., first:]
        return found

    def drop(self, item_dense: Floats, rng: np.random.Generator) -> None:
        """Drop numbers of the vectors of these items (..., F), in place; what is kept is as much larger as others are dropped
        (inverted dropout: Srivastava et al. 2014, section 10)."""
        assert self.dropout_V is not None
        vectors = item_dense[..., self.place : self.place + self.width]
        vectors *= (rng.random(vectors.shape, np.float32) >= self.dropout_V) / (1.0 - self.dropout_V)

    @property
    def width(self) -> int:
        return int(self.encoded.shape[1])
