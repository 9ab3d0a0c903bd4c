"""The results file: JSON values, keys sorted, floats of five digits; what is not defined is null."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.designs import read_designs
from limaml.io import atomic

RESULTS = Path(__file__).parent / "results"
_DIGITS = 5


def merge(parts: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of all parts, with how it was made and how many configurations each method was given."""
    designs = read_designs()
    found: dict[str, Any] = {**about, "units": {"auc": "0 to 1", "delta": "0 to 1", "seconds": "s"}, "designs": designs}
    found["configurations"] = {name: design["configurations"] for name, design in designs.items()}
    for part in parts:
        found |= part
    return found


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write results.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / "results.json", json.dumps(plain(results), indent=1, sort_keys=True, allow_nan=False) + "\n")


def read(folder: Path = RESULTS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def plain(value: Any) -> Any:
    """As the file holds it: keys are text, floats are rounded, what is not defined is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{_DIGITS}g}")
    return value
