"""The whole catalogue in memory, encoded for one model version, so that a request gathers rows by number.

I items, F features
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import torch
from torch import Tensor

from limaml import schema
from limaml.data.encoding import Encoder
from serving.api import RequestError
from serving.features import ItemRow

_UNKNOWN = ItemRow((None,) * len(schema.ITEM_FEATURE_NAMES), None)


@dataclass(frozen=True)
class Items:
    """Catalogue and features as last read, before any encoding; the same for all model versions."""

    catalogue: tuple[str, ...] = ()
    rows: Mapping[str, ItemRow] | None = None
    """None until the store has answered once; an item that it does not know has None throughout."""

    def values(self, item_ids: Sequence[str]) -> dict[str, list[object]]:
        """Feature -> one value an item."""
        rows = [self._row(item) for item in item_ids]
        return {name: [row.values[at] for row in rows] for at, name in enumerate(schema.ITEM_FEATURE_NAMES)}

    def event_timestamps(self, item_ids: Sequence[str]) -> list[datetime | None]:
        """Of each item's row."""
        return [self._row(item).at for item in item_ids]

    def _row(self, item: str) -> ItemRow:
        return (self.rows or {}).get(item, _UNKNOWN)


@dataclass(frozen=True)
class ItemTable:
    """What the network reads of every item of the catalogue."""

    items: Items
    number: Mapping[str, int]
    """Item -> its row."""
    index_I: Tensor
    dense_IF: Tensor

    @classmethod
    def encode(cls, items: Items, encoder: Encoder) -> "ItemTable":
        columns = {**items.values(items.catalogue), "item_id": list(items.catalogue)}
        encoded = encoder.encode(columns, len(items.catalogue))
        number = {item: at for at, item in enumerate(items.catalogue)}
        return cls(items, number, torch.from_numpy(encoded.item_index), torch.from_numpy(encoded.item_dense))

    def find(self, item_ids: Sequence[str]) -> list[int]:
        """Rows of the candidates. Raises RequestError (400) with the first one that is not in the catalogue."""
        try:
            return [self.number[item] for item in item_ids]
        except KeyError:
            at = next(at for at, item in enumerate(item_ids) if item not in self.number)
        raise RequestError(
            400,
            field=f"item_ids.{at}",
            rule="must be in the catalogue",
            value=item_ids[at],
            remedy="leave it out, or wait for the daily run that brings it",
        )
