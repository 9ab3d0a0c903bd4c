"""The whole catalogue in memory, so that a request's items are numbers, and nothing of them is read when it comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from limaml.features.encoder import EncodedRows, Encoder
from serving.api import RequestError
from serving.features import ItemRow


@dataclass(frozen=True)
class Items:
    """Catalogue and features as last read; the same for all model versions."""

    names: tuple[str, ...] = ()
    """Features of an item, in the order of a row's values."""
    catalogue: tuple[str, ...] = ()
    rows: Mapping[str, ItemRow] | None = None
    """None until the store has answered once; an item that it does not know has None throughout."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_number", {item: at for at, item in enumerate(self.catalogue)})

    def values(self, item_ids: Sequence[str]) -> dict[str, list[object]]:
        """Feature -> one value an item."""
        rows = [self._row(item) for item in item_ids]
        return {name: [row.values[at] for row in rows] for at, name in enumerate(self.names)}

    def entities(self, column: str) -> list[str | None] | None:
        """Of each item, in the catalogue's order, what it is or what category it has; None where it has none, and instead of
        all where a column is not one of items.
        """
        if column == "item_id":
            return list(self.catalogue)
        if column not in self.names:
            return None
        at = self.names.index(column)
        return [self._row(item).values[at] for item in self.catalogue]

    def event_timestamps(self, item_ids: Sequence[str]) -> list[datetime | None]:
        """Of each item's row."""
        return [self._row(item).at for item in item_ids]

    def encode(self, encoder: Encoder) -> EncodedRows:
        """What a network reads of every item, in the catalogue's order."""
        columns = {**self.values(self.catalogue), "item_id": list(self.catalogue)}
        return encoder.encode(columns, len(self.catalogue))

    def find(self, item_ids: Sequence[str]) -> list[int]:
        """Each candidate's number, its place in the catalogue. Raises RequestError (400) with the first that is not in it."""
        number: Mapping[str, int] = self._number  # type: ignore[attr-defined]
        try:
            return list(map(number.__getitem__, item_ids))
        except KeyError:
            at = next(at for at, item in enumerate(item_ids) if item not in number)
        raise RequestError(
            400,
            field=f"item_ids.{at}",
            rule="must be in the catalogue",
            value=item_ids[at],
            remedy="leave it out, or wait for the daily run that brings it",
        )

    def _row(self, item: str) -> ItemRow:
        return (self.rows or {}).get(item) or ItemRow((None,) * len(self.names), None)
