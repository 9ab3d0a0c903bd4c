"""The strongest sequence model as a rival: SASRec of RecTools on positives, its state refreshed daily or at each request.

It runs in an environment of its own (`make experiments/.sequence/installed`): rows go there in a file, probabilities come back.
What a row may read is decided here; the program there (experiments/sequence/sasrec.py) gets no label of a judged row, but as
part of the sequences of later ones. Its weights are of the training cut, as everybody's; states and rates are refreshed.

# P positives in the order of their users and times, R rows that are scored (first those that validate), N logged rows
"""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from limaml.metrics import Floats, Ints
from limaml.tasks.sampling import MICROSECONDS_PER_DAY
from limaml.tasks.splits import Split

ROOT = Path(__file__).parents[1]
TARGET = "experiments/.sequence/installed"
PYTHON = ROOT / "experiments" / ".sequence" / "bin" / "python"
FORMS = ("sasrec_daily", "sasrec_request")
_PRIOR_ROWS = 10.0
"""Rows at the mean rate that an item's or a user's rate begins with."""


def score(
    logged: pa.Table,
    split: Split,
    judged_places: Ints,
    validation_places: Ints,
    asked: pa.Table | None = None,
    *,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Floats], dict[str, Any]]:
    """Train, stop and calibrate on rows before T2; give form -> probabilities at `judged_places` and, behind them, of `asked`
    rows (user_id, item_id, timestamp), which nobody saw; and a report of the fit.

    A place is a row's number in `logged` (user_id, item_id, timestamp, label). The calibration reads the item's rate and the
    user's own beside the logit. `options` are the program's; its defaults are what was chosen.
    Raises FileNotFoundError, with the remedy, where the environment is not installed.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "rows.npz", allow_pickle=False, **prepared(logged, split, judged_places, validation_places, asked))
        (folder / "options.json").write_text(json.dumps({**(options or {}), "seed": seed}))
        _run(folder)
        with np.load(folder / "scores.npz", allow_pickle=False) as found:
            scores = {form: found[form].astype(np.float64) for form in found.files}
        return scores, json.loads((folder / "report.json").read_text())


def _run(folder: Path) -> None:
    if not PYTHON.exists():
        raise FileNotFoundError(f"the sequence rival needs an environment of its own, got no {PYTHON}; run make {TARGET}")
    command = [str(PYTHON), str(ROOT / "experiments" / "sequence" / "sasrec.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"experiments/sequence/sasrec.py ended with {done.returncode}:\n{done.stderr[-2000:]}")


def prepared(
    logged: pa.Table, split: Split, judged_places: Ints, validation_places: Ints, asked: pa.Table | None = None
) -> dict[str, npt.NDArray[Any]]:
    """What the program reads: all positives in order, and of every scored row the number of them that it comes after."""
    names, place_R = ("user_id", "item_id", "timestamp"), np.r_[validation_places, judged_places]
    scored = logged.select(names).take(pa.array(place_R))
    scored = scored if asked is None else pa.concat_tables([scored, asked.select(names)])
    (user_N, user_R), (item_N, item_R) = (_numbered(logged[name], scored[name]) for name in names[:2])
    time_N, time_R = (rows["timestamp"].cast(pa.int64()).to_numpy() for rows in (logged, scored))
    day_N, day_R = (time // MICROSECONDS_PER_DAY * MICROSECONDS_PER_DAY for time in (time_N, time_R))
    label_N = logged["label"].to_numpy().astype(np.int64)
    known_N = pc.is_in(logged["user_id"], value_set=pa.array(split.train_users, pa.string())).to_numpy()
    trains_N = known_N & (time_N < split.train_end_us)
    rate = float(label_N[trains_N].mean())
    order = np.lexsort((time_N, user_N))
    place_P = order[label_N[order] == 1]
    shown_R, positive_R = _counts(item_N, day_N, label_N, item_R, day_R)
    found = {
        "user_P": user_N[place_P],
        "item_P": item_N[place_P],
        "trains_P": trains_N[place_P],
        "shown_I": np.bincount(item_N[trains_N], minlength=int(item_N.max()) + 1),
        "user_R": user_R,
        "item_R": item_R,
        "item_rate_R": _log_odds(positive_R, shown_R, rate),
        "item_shown_R": np.log1p(shown_R),
        "validation_labels": label_N[validation_places],
    }
    first_R = np.searchsorted(user_N[place_P], user_R)
    for form, before_R in zip(FORMS, (day_R, time_R), strict=True):
        shown_R, positive_R = _counts(user_N, time_N, label_N, user_R, before_R)
        found[f"{form}.seen"] = first_R + positive_R
        found[f"{form}.user_rate"] = _log_odds(positive_R, shown_R, rate)
    return found


def _numbered(logged: pa.ChunkedArray, scored: pa.ChunkedArray) -> tuple[Ints, Ints]:
    """Of scored rows those that are logged have one, too."""
    names, place_N = np.unique(logged.to_numpy(), return_inverse=True)
    return place_N.astype(np.int64), np.searchsorted(names, scored.to_numpy())


def _counts(key_N: Ints, time_N: Ints, label_N: Ints, key_R: Ints, before_R: Ints) -> tuple[Ints, Ints]:
    """Of each row the number of logged rows with its key before an instant, and of the positives among them."""
    order = np.lexsort((time_N, key_N))
    instants, both = np.unique(np.r_[time_N[order], before_R], return_inverse=True)
    at_N = key_N[order] * len(instants) + both[: len(order)]
    stop_R = np.searchsorted(at_N, key_R * len(instants) + both[len(order) :])
    start_R = np.searchsorted(key_N[order], key_R)
    positives = np.r_[0, np.cumsum(label_N[order])]
    return stop_R - start_R, positives[stop_R] - positives[start_R]


def _log_odds(positive_R: Ints, shown_R: Ints, mean: float) -> Floats:
    rate_R = (positive_R + _PRIOR_ROWS * mean) / (shown_R + _PRIOR_ROWS)
    return np.log(rate_R) - np.log1p(-rate_R)
