"""Vectors of items from a knowledge graph: singular vectors of its normalised adjacency.

E entities, W numbers of a vector
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv
from scipy import sparse
from scipy.sparse.linalg import svds

from limaml.config import FeatureConfig
from limaml.errors import ConfigError, DataError
from limaml.transfer.encoders import Origin, Vectors, digest_of

_NAME, _VERSION = "graph-svd", "1"
_TRIPLES, _LINKS = ("head_id", "relation_id", "tail_id"), ("item_id", "entity_id")


class GraphVectors:
    """A graph as RecBole keeps it: `NAME.kg` with triples and `NAME.link` with an entity an item, tab separated.

    v = U sqrt(S) of D^-1/2 (A + A') D^-1/2, A counting relations between two entities: items that share people, places or kinds
    lie together. All of it depends on the whole graph, so another graph is another origin.
    """

    def __init__(self, path: Path, feature: FeatureConfig) -> None:
        links = path.with_suffix(".link")
        if path.suffix != ".kg" or not links.is_file():
            raise ConfigError(
                f"transfer.path must be a file of triples, NAME.kg, beside NAME.link, got {path}; name the file of triples"
            )
        self._path, self._links_path, self._width = path, links, int(feature.width or 0)
        self.origin = Origin(_NAME, _VERSION, digest_of((path, links)), self._width, feature.licence)

    def look_up(self, item_ids: Sequence[str]) -> list[Vectors | None]:
        links = _read(self._links_path, _LINKS)
        entity = dict(zip(*(links[name].to_pylist() for name in _LINKS), strict=True))
        places, vectors_EW = self._vectors
        found = (places.get(entity.get(item, "")) for item in item_ids)
        return [None if place is None else vectors_EW[place] for place in found]

    @cached_property
    def _vectors(self) -> tuple[dict[str, int], Vectors]:
        """Place of each entity, and (E, W) its vector."""
        triples = _read(self._path, _TRIPLES)
        heads, tails = triples["head_id"].to_pylist(), triples["tail_id"].to_pylist()
        places = {name: place for place, name in enumerate(sorted({*heads, *tails}))}
        if self._width >= len(places):
            raise ConfigError(
                f"features: width of a vector from {self._path} must be less than its number of entities ({len(places)}), got "
                f"{self._width}; declare a smaller one"
            )
        rows, columns = (np.array([places[name] for name in side]) for side in (heads, tails))
        directed = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(places), len(places)))
        both = directed + directed.T
        scale = sparse.diags_array(1.0 / np.sqrt(both.sum(1)))
        start = np.full(len(places), 1.0 / np.sqrt(len(places)))
        left_EW, strengths_W, _ = svds(scale @ both @ scale, self._width, v0=start)
        order = np.argsort(-strengths_W, kind="stable")
        vectors_EW = left_EW[:, order] * np.sqrt(strengths_W[order])
        signs_W = np.sign(vectors_EW[np.abs(vectors_EW).argmax(0), np.arange(self._width)])
        return places, (vectors_EW * signs_W).astype(np.float32)


def _read(path: Path, names: Sequence[str]) -> pa.Table:
    """A tab-separated file with typed headers, `name:type`, every column as text."""
    with path.open(encoding="utf-8") as file:
        header = [column.partition(":")[0] for column in file.readline().rstrip("\n").split("\t")]
    missing = [name for name in names if name not in header]
    if missing:
        raise DataError(f"{path} must have columns {', '.join(names)}, got {', '.join(header)}; name them so")
    return csv.read_csv(
        path,
        read_options=csv.ReadOptions(column_names=header, skip_rows=1),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )
