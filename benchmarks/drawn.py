"""Values of declared features, drawn: what the tables of a benchmark hold."""

import numpy as np
import pyarrow as pa

from limaml import schema
from limaml.config import FeatureConfig

NUM_CATEGORIES = 20
"""Of a category or a set of categories that declares none."""
_IN_A_SET = 3


def values_of(feature: FeatureConfig) -> tuple[str, ...]:
    """Categories of a feature."""
    return feature.values or tuple(f"{feature.name} {number:02d}" for number in range(NUM_CATEGORIES))


def draw(feature: FeatureConfig, rng: np.random.Generator, num_rows: int) -> pa.Array:
    """`num_rows` values: up to three categories of a set, counts below 2,000, rates and other numbers within their bounds."""
    kind = schema.arrow_type(feature)
    if feature.type in ("category", "categories"):
        values = pa.array(values_of(feature))
        if feature.type == "category":
            return values.take(pa.array(rng.integers(0, len(values), num_rows)))
        sizes = rng.integers(1, _IN_A_SET + 1, num_rows)
        # Each starts somewhere and takes the next ones: no category twice.
        start, offsets = np.repeat(rng.integers(0, len(values), num_rows), sizes), np.r_[0, np.cumsum(sizes)]
        place = start + np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.take(pa.array(place % len(values)))).cast(kind)
    if feature.aggregate == "count":
        return pa.array(rng.integers(0, 2000, num_rows), kind)
    low, high = feature.lowest or 0.0, feature.highest or 1.0
    return pa.array(rng.uniform(low, high, num_rows)).cast(kind)
