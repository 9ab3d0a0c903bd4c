"""Vectors of items from a knowledge graph: singular vectors of the normalised adjacency of items and neighbours.

I linked items, N neighbours of a relation, W numbers of a vector
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from pyarrow import csv
from scipy import sparse
from scipy.sparse.linalg import svds

from limaml.config import FeatureConfig
from limaml.errors import ConfigError, DataError
from limaml.transfer.encoders import Origin, Vectors, digest_of

_NAME, _VERSION = "graph-svd", "1"
_PAIRS = """
WITH beside AS (
    SELECT head_id AS entity_id, relation_id || ' > ' || tail_id AS neighbour FROM triples
    UNION ALL SELECT tail_id, head_id || ' > ' || relation_id FROM triples
), pairs AS (SELECT DISTINCT item_id, neighbour FROM links JOIN beside USING (entity_id))
SELECT item_id, neighbour FROM pairs
QUALIFY count(*) OVER (PARTITION BY neighbour) > 1 ORDER BY item_id, neighbour
"""
_TRIPLES, _LINKS = ("head_id", "relation_id", "tail_id"), ("item_id", "entity_id")


class GraphVectors:
    """A graph as RecBole keeps it: `NAME.kg` with triples and `NAME.link` with an entity an item, tab separated.

    v = U sqrt(S), U S V' the largest part of D^-1/2 A C^-1/2: A_in = 1 where item i has a relation with neighbour n, a pair of
    entity and relation that two items or more have; D and C hold the sums of its rows and columns. So items that share people,
    places or kinds lie together, the more so the fewer share them. Another graph is another origin: all depends on all of it.
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
        places, vectors_IW = self._vectors
        found = (places.get(item) for item in item_ids)
        return [None if place is None else vectors_IW[place] for place in found]

    @cached_property
    def _vectors(self) -> tuple[dict[str, int], Vectors]:
        """Place of each item that shares a neighbour with another, and (I, W) its vector."""
        items, neighbours = self._shared
        rows, columns = sorted(set(items)), sorted(set(neighbours))
        if self._width >= min(len(rows), len(columns)):
            raise ConfigError(
                f"features: width of a vector from {self._path} must be less than the number of items that share a neighbour "
                f"({len(rows)}) and of these ({len(columns)}), got {self._width}; declare a smaller one"
            )
        row_of, column_of = ({name: place for place, name in enumerate(names)} for names in (rows, columns))
        at = ([row_of[item] for item in items], [column_of[neighbour] for neighbour in neighbours])
        adjacency_IN = sparse.csr_array((np.ones(len(items)), at), shape=(len(rows), len(columns)))
        scales = (sparse.diags_array(1.0 / np.sqrt(adjacency_IN.sum(axis))) for axis in (1, 0))
        draw = np.random.default_rng(0)
        start = draw.normal(size=min(adjacency_IN.shape))
        left_IW, strengths_W, _ = svds(next(scales) @ adjacency_IN @ next(scales), self._width, v0=start, rng=draw)
        vectors_IW = (left_IW * np.sqrt(strengths_W))[:, np.argsort(-strengths_W, kind="stable")]
        signs_W = np.sign(vectors_IW[np.abs(vectors_IW).argmax(0), np.arange(self._width)])
        return row_of, (vectors_IW * signs_W).astype(np.float32)

    @property
    def _shared(self) -> tuple[list[str], list[str]]:
        """Pairs of an item and a neighbour that another item has as well, each once."""
        links, triples = _read(self._links_path, _LINKS), _read(self._path, _TRIPLES)
        with duckdb.connect() as connection:
            connection.register("links", links)
            connection.register("triples", triples)
            pairs = connection.sql(_PAIRS).fetchall()
        return [item for item, _ in pairs], [neighbour for _, neighbour in pairs]


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
