"""Logged rows against their offline counterparts, value by value; what is counted, and how, stands here alone.

A *row* is one entity of one view as a request fetched it. It is *missing* if the store had it and the offline join does not.
Where the offline join has a row, each of its values is compared, exactly; one that the store did not have differs. Where
neither has a row, nothing is compared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

PRESENT = "(present)"
"""Column of booleans: whether there is a row."""
MAX_EXAMPLES = 1000
"""Differing values kept a view: enough to see a pattern, few enough to be read."""
VIEWS = pa.schema(
    [("view", pa.string())]
    + [(name, pa.int64()) for name in ("rows", "missing", "values", "mismatched")]
    + [(name, pa.float64()) for name in ("max_difference", "mismatch_ratio", "missing_ratio")]
)
"""`Tally.row`."""
EXAMPLES = pa.schema(
    [
        ("view", pa.string()),
        ("entity", pa.string()),
        ("feature", pa.string()),
        ("compared_at", pa.timestamp("us", tz="UTC")),
        ("logged", pa.string()),
        ("offline", pa.string()),
        ("difference", pa.float64()),
        ("rows", pa.int64()),
    ]
)


@dataclass
class Tally:
    """Counts of one view, added up over parts of the log."""

    rows: int = 0
    missing: int = 0
    values: int = 0
    mismatched: int = 0
    max_difference: float = 0.0
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def mismatch_ratio(self) -> float:
        return self.mismatched / self.values if self.values else math.nan

    @property
    def missing_ratio(self) -> float:
        return self.missing / self.rows if self.rows else math.nan

    def row(self, view: str) -> dict[str, Any]:
        """The counts as a table's row; a ratio of nothing is None, and so is an infinite difference: JSON has neither."""
        counts = {name: getattr(self, name) for name in ("rows", "missing", "values", "mismatched")}
        numbers = {name: getattr(self, name) for name in ("max_difference", "mismatch_ratio", "missing_ratio")}
        return {"view": view, **counts, **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}

    def add_example(self, example: dict[str, Any]) -> None:
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


def compare_features(tally: Tally, view: str, logged: pa.Table, offline: pa.Table, names: Sequence[str]) -> None:
    """Add rows of a view of features to its tally.

    `logged` has `entity`, `compared_at`, `rows` (how many logged rows are like this one), PRESENT and the features; `offline`
    has PRESENT and the features, row for row.
    """
    weight = logged["rows"].to_numpy()
    online, known = (side[PRESENT].to_numpy() for side in (logged, offline))
    tally.rows += int(weight.sum())
    tally.missing += int(weight[online & ~known].sum())
    for example in np.flatnonzero(online & ~known):
        tally.add_example(_example(view, logged, int(example), "(row)", "present", None, None))
    for name in names:
        mine, theirs = logged[name], offline[name]
        differs = known & ~_equal(mine, theirs)
        tally.values += int(weight[known].sum())
        tally.mismatched += int(weight[differs].sum())
        gaps = _gaps(mine, theirs)
        for at in np.flatnonzero(differs):
            gap = None if gaps is None or math.isnan(gaps[at]) else float(gaps[at])
            tally.max_difference = max(tally.max_difference, gap or 0.0)
            tally.add_example(_example(view, logged, int(at), name, mine[int(at)].as_py(), theirs[int(at)].as_py(), gap))


def compare_vector(
    tally: Tally, where: Mapping[str, Any], logged: npt.NDArray[np.float32] | None, offline: Sequence[npt.NDArray[np.float32]]
) -> None:
    """Add one logged embedding; `offline` holds what may have been online (several: either is right), none if no row exists.

    `where` gives view, entity and compared_at of an example.
    """
    tally.rows += 1
    if not offline:
        if logged is not None:
            tally.missing += 1
            tally.add_example({**where, "feature": "(row)", "logged": "present", "rows": 1})
        return
    tally.values += offline[0].size
    if logged is None or logged.shape != offline[0].shape:
        tally.mismatched += offline[0].size
        found = None if logged is None else f"{logged.size} values"
        tally.add_example({**where, "feature": "(row)", "logged": found, "offline": "present", "rows": 1})
        return
    best = min(offline, key=lambda one: int((one != logged).sum()))
    differs = int((best != logged).sum())
    if differs:
        gap = np.abs(best.astype(np.float64) - logged)
        tally.mismatched += differs
        largest = float(np.where(np.isfinite(gap), gap, math.inf).max())
        tally.max_difference = max(tally.max_difference, largest)
        note = {"feature": "embedding", "logged": f"{differs} of {best.size} differ", "difference": largest, "rows": 1}
        tally.add_example({**where, **note})


def _equal(mine: pa.ChunkedArray, theirs: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    same = pc.or_kleene(pc.equal(mine, theirs).fill_null(False), pc.and_(mine.is_null(), theirs.is_null()))
    values: npt.NDArray[np.bool_] = same.to_numpy()
    return values


def _gaps(mine: pa.ChunkedArray, theirs: pa.ChunkedArray) -> npt.NDArray[np.float64] | None:
    """Absolute differences, NaN where a side has no value; None where they are no numbers."""
    if not (pa.types.is_integer(mine.type) or pa.types.is_floating(mine.type)):
        return None
    gaps: npt.NDArray[np.float64] = pc.abs(pc.subtract(mine.cast(pa.float64()), theirs.cast(pa.float64()))).to_numpy()
    return gaps


def _example(
    view: str, logged: pa.Table, at: int, feature: str, mine: object, theirs: object, difference: float | None
) -> dict[str, Any]:
    return {
        "view": view,
        "entity": logged["entity"][at].as_py(),
        "feature": feature,
        "compared_at": logged["compared_at"][at].as_py(),
        "logged": None if mine is None else str(mine),
        "offline": None if theirs is None else str(theirs),
        "difference": difference,
        "rows": logged["rows"][at].as_py(),
    }
