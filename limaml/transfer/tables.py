"""Vectors that something else made, of text, pictures or sound, from a table by item."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from pyarrow import csv

from limaml import schema
from limaml.config import FeatureConfig
from limaml.errors import ConfigError, DataError
from limaml.events.casting import first_misfit, with_types
from limaml.features.columns import vector_values
from limaml.io.storage import Storage
from limaml.transfer.encoders import Origin, Vectors


class VectorTable:
    """A Parquet or CSV file with columns `item_id` and `vector`. What made them is what the feature declares."""

    def __init__(self, path: str, feature: FeatureConfig) -> None:
        self._path, self._width = path, int(feature.width or 0)
        folder, self._name = os.path.split(path)
        self._storage = Storage(folder or ".")
        if not self._storage.exists(self._name):
            raise ConfigError(f"transfer.path must be a Parquet or CSV file, got {path!r}, which is not there; correct it")
        name, _, version = feature.encoder.rpartition(" ")
        told = f"{feature.encoder}\0{feature.licence}"
        digest = hashlib.sha256(told.encode()).hexdigest()  # Not of the file, which grows.
        self.origin = Origin(name, version, digest, self._width, feature.licence)
        if not name:
            raise ConfigError(
                f"features: encoder of {feature.name} must be what made the vectors of {path} and its version, with a space "
                f"between, got {feature.encoder!r}; declare it so"
            )

    def look_up(self, item_ids: Sequence[str]) -> list[Vectors | None]:
        places = [self._place.get(item) for item in item_ids]
        numbers, known = self._vectors
        return [numbers[place] if place is not None and known[place] else None for place in places]

    @cached_property
    def _table(self) -> pa.Table:
        table = self._read()
        wanted = schema.Table(
            "vectors", (schema.Column("item_id", pa.string()), schema.Column("vector", pa.list_(pa.float32(), self._width)))
        )
        missing = sorted(set(wanted.names) - set(table.column_names))
        if missing:
            raise DataError(
                f"{self._path} must have columns item_id and vector, got {', '.join(table.column_names)}; rename them"
            )
        typed = with_types(table.select(wanted.names), wanted)
        for column in wanted.columns:
            if typed[column.name].type != column.type:
                row = first_misfit(table[column.name], column.type) or 0
                raise DataError(
                    f"{self._path}: {column.name} must be {column.type} in every row, got {str(table[column.name][row])[:100]} "
                    f"in row {row} (item_id {table['item_id'][row]}); correct it"
                )
        ids = typed["item_id"]
        if ids.null_count or len(ids.unique()) != len(ids):
            raise DataError(f"{self._path} must have one row an item, got {len(ids) - len(ids.unique())} more; remove them")
        return typed

    def _read(self) -> pa.Table:
        if self._name.endswith((".csv", ".csv.gz")):
            data = pa.BufferReader(self._storage.read_bytes(self._name))
            try:
                return csv.read_csv(pa.CompressedInputStream(data, "gzip") if self._name.endswith(".gz") else data)
            except pa.ArrowInvalid as error:
                raise DataError(f"{self._path} must be a readable CSV file: {error}; write it again") from error
        return self._storage.read_table(self._name)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {item: place for place, item in enumerate(self._table["item_id"].to_pylist())}

    @cached_property
    def _vectors(self) -> tuple[Vectors, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
        return vector_values(self._table["vector"])
