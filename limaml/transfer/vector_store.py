"""What was made, an item once: the writing side of `limaml.events.embedded`."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property

import pyarrow as pa

from limaml.errors import DataError
from limaml.events import embedded
from limaml.features.columns import vector_values
from limaml.io.storage import Storage
from limaml.transfer.encoders import Origin, Vectors


def digest_of(origin: Origin, content: bytes) -> bytes:
    """What a vector was made from: its encoder and its text (or, of a vector that was there, its numbers)."""
    return hashlib.sha256(f"{origin.digest}\0".encode() + content).digest()


class VectorStore:
    """Vectors of one feature. Items that are in it stay as they are."""

    def __init__(self, storage: Storage, feature: str, origin: Origin) -> None:
        """Raises DataError if what is stored comes from something else: both would share no space."""
        self._storage, self._feature, self._origin = storage, feature, origin
        path = embedded.encoder_path(feature)
        if storage.exists(path):
            before = storage.read_json(path)
            if (before["digest"], before["width"]) != (origin.digest, origin.width):
                raise DataError(
                    f"{feature} must be made by what made its first vectors, {before['name']} {before['version']} "
                    f"({before['digest'][:12]}, width {before['width']}), got {origin.label} ({origin.digest[:12]}, width "
                    f"{origin.width}); name that one again, or give the new vectors a storage.root of their own"
                )

    @cached_property
    def known(self) -> dict[str, bytes]:
        """Every item that was looked at, and the digest of what it was made from."""
        table = embedded.read(self._storage, self._feature, "item_id", "digest")
        return dict(zip(table["item_id"].to_pylist(), table["digest"].to_pylist(), strict=True))

    def made_from(self, digests: set[bytes]) -> dict[bytes, Vectors]:
        """(W,) of those digests that some item has a vector of."""
        if digests.isdisjoint(self.known.values()):
            return {}
        table = embedded.read(self._storage, self._feature, "digest", "vector")
        found = table["digest"].to_pylist()
        places = {digest: place for place, digest in enumerate(found) if digest in digests}
        vectors = table["vector"].take(pa.array(places.values(), pa.int64()))
        numbers, known = vector_values(vectors.cast(pa.list_(pa.float32(), self._origin.width)))
        return {digest: numbers[row] for row, digest in enumerate(places) if known[row]}

    def append(self, item_ids: Sequence[str], digests: Sequence[bytes], vectors: Sequence[Vectors | None]) -> None:
        """Keep new items, as one more part. Raises DataError if a vector is not of the encoder's width, or not finite."""
        for item, vector in zip(item_ids, vectors, strict=True):
            if vector is not None and (len(vector) != self._origin.width or not bool((abs(vector) < float("inf")).all())):
                raise DataError(
                    f"{self._feature} must be {self._origin.width} finite numbers of every item, got {len(vector)} numbers, "
                    f"{str(vector.tolist())[:80]} for item_id {item}; correct what makes them"
                )
        columns = [pa.array(item_ids), pa.array(digests, pa.binary(32)), pa.array(vectors, embedded.ITEMS.field("vector").type)]
        path = embedded.encoder_path(self._feature)
        if not self._storage.exists(path):
            self._storage.write_json(path, asdict(self._origin))
        number = len(embedded.parts(self._storage, self._feature))
        table = pa.Table.from_arrays(columns, schema=embedded.ITEMS)
        self._storage.write_table(embedded.part_path(self._feature, number), table)
        self.known.update(zip(item_ids, digests, strict=True))
