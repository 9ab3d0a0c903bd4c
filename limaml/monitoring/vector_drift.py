"""Do the vectors of two sets of rows come from one distribution? A statistic of two samples, for vectors of any width.

N, M vectors of the two samples, V numbers of one
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from limaml.features.columns import Floats, vector_values

MAX_VECTORS = 1000
"""Of a sample: chance then gives a coefficient of about 0.002."""


def sampled(column: pa.ChunkedArray | pa.Array) -> list[str]:
    """Up to `MAX_VECTORS` of a column's values, evenly spaced in sorted order: an item as often as it is shown."""
    values = np.sort(np.array(column.drop_null().to_pylist(), dtype=object))
    at = np.linspace(0, len(values) - 1, min(len(values), MAX_VECTORS)).round().astype(np.int64)
    return list(values[at])


def vector_drift(name: str, items: pa.Table, before: list[str], now: list[str]) -> float:
    """Energy coefficient of a vector between two samples of items; NaN where one of them has no vector.

    `items`: the known items' vectors (`schema.Tables.item_vectors`).
    """
    vector_IV, known = vector_values(items[name])
    row = {item: at for at, item in enumerate(items["item_id"].to_pylist()) if known[at]}
    x, y = ([row[item] for item in sample if item in row] for sample in (before, now))
    return energy_coefficient(vector_IV[x], vector_IV[y])


def energy_coefficient(x_NV: Floats, y_MV: Floats) -> float:
    """E-coefficient of inhomogeneity: 1 - (E|X - X'| + E|Y - Y'|) / 2 E|X - Y|, from 0 (one distribution) to 1.

    Szekely and Rizzo 2013, "Energy statistics", section 3; NaN for an empty sample, 0 where all vectors are one.
    """
    if not len(x_NV) or not len(y_MV):
        return float("nan")
    between = float(_distances(x_NV, y_MV).mean())
    within = (float(_distances(x_NV, x_NV).mean()) + float(_distances(y_MV, y_MV).mean())) / 2.0
    return 1.0 - within / between if between > 0 else 0.0


def _distances(x_NV: Floats, y_MV: Floats) -> npt.NDArray[np.float64]:
    """(N, M)"""
    x, y = x_NV.astype(np.float64), y_MV.astype(np.float64)
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2.0 * x @ y.T
    found: npt.NDArray[np.float64] = np.sqrt(squares.clip(min=0.0))
    return found
