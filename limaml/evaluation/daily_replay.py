"""Scores as a service refreshed once a day would have given them, computed offline.

Features come from the logged point-in-time join, embeddings from supports before the day; nothing asks the service. Contract 7
compares the two.
"""

from datetime import date

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from limaml import schema
from limaml.config import Config
from limaml.errors import DataError
from limaml.features.encoder import Encoder
from limaml.models.network import Network
from limaml.tasks.protocols import as_served
from limaml.tasks.sampling import TaskRows, microseconds
from limaml.training.scoring import score_specs

Floats = npt.NDArray[np.float64]


def score_as_served(
    network: Network, encoder: Encoder, day_rows: pa.Table, history: pa.Table, *, day: date, cfg: Config
) -> Floats:
    """Probability of each logged row of `day`, in the order of `day_rows`.

    `history` holds logged rows before the day: at least those of the day's entities, of all kinds. Both are logged events.
    Raises DataError for a row outside the day, or a history row that is not before it.
    """
    start, end = schema.day_start(day), schema.day_end(day)
    _require(day_rows, f"rows of day {day}", first=microseconds(start), end=microseconds(end))
    _require(history, f"history before day {day}", first=None, end=microseconds(start))
    rows = TaskRows.of(pa.concat_tables([history, day_rows]).combine_chunks(), encoder, cfg)
    specs = as_served(rows, from_us=microseconds(start), support_rows=network.support_rows[network.kind])
    scores: Floats = np.empty(day_rows.num_rows)
    if specs:
        scores[rows.source_row[np.concatenate([spec.query for spec in specs])] - history.num_rows] = score_specs(
            network, rows, specs
        )
    return scores


def _require(logged: pa.Table, what: str, *, first: int | None, end: int) -> None:
    stamps = logged["timestamp"].cast(pa.int64()).to_numpy()
    outside = int((stamps >= end).sum() + ((stamps < first).sum() if first is not None else 0))
    if outside:
        raise DataError(f"{what} must lie within it, got {outside} of {len(stamps)} rows that do not; pass each day's own rows")
