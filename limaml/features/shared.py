"""Encoded rows whose first numbers repeat: what does not change with time is held once, and rows hold its place.

R rows, F numbers of a row, S of them shared, D distinct ones
"""

from dataclasses import dataclass

import numpy as np

from limaml.features.columns import Floats, Indices


@dataclass(frozen=True)
class SharedRows:
    """A (R, F) matrix; indexing it gathers the rows' numbers, as of an array."""

    distinct: Floats
    """(D, S)"""
    row: Indices
    """(R,) row of `distinct`."""
    own: Floats
    """(R, F - S)"""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row), self.distinct.shape[1] + self.own.shape[1]

    def __getitem__(self, at: Indices | slice) -> Floats:
        found: Floats = np.concatenate([self.distinct[self.row[at]], self.own[at]], axis=-1)
        return found

    def take(self, at: Indices) -> "SharedRows":
        """Rows `at`, in that order."""
        return SharedRows(self.distinct, self.row[at], self.own[at])


class Sharing:
    """Makes `SharedRows` of a matrix that comes in parts, by a key of which rows mostly have the same first numbers."""

    def __init__(self, width: int, num_keys: int) -> None:
        """`width`: S; keys are 0 to `num_keys` - 1."""
        self._distinct = np.empty((0, width), np.float32)
        self._row_of_key = np.full(num_keys, -1, np.int64)
        self._rows: list[Indices] = []
        self._own: list[Floats] = []

    def add(self, dense: Floats, key: Indices) -> None:
        """The next rows, (R, F), and their keys (R,)."""
        shared = dense[:, : self._distinct.shape[1]]
        keys, first = np.unique(key, return_index=True)
        fresh = self._row_of_key[keys] < 0
        self._row_of_key[keys[fresh]] = self._append(shared[first[fresh]])
        row = self._row_of_key[key]
        other = (self._distinct[row] != shared).any(axis=1)
        if other.any():  # what was known of the key changed meanwhile
            distinct, at = np.unique(shared[other], axis=0, return_inverse=True)
            row[other] = self._append(distinct)[at.ravel()]
        self._rows.append(row)
        self._own.append(dense[:, shared.shape[1] :].copy())

    def rows(self) -> SharedRows:
        """All that was added."""
        return SharedRows(self._distinct, np.concatenate(self._rows), np.concatenate(self._own))

    def _append(self, distinct: Floats) -> Indices:
        """The numbers that they get."""
        start = len(self._distinct)
        self._distinct = np.concatenate([self._distinct, distinct])
        return np.arange(start, len(self._distinct))
