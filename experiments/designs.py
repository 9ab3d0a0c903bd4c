"""The frozen designs: what every method is fitted with, chosen on validation users by `python -m experiments.search`."""

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "designs.json"


def read_designs() -> dict[str, Any]:
    """Method -> {"design", "validation", "configurations"}: the number of configurations that were compared."""
    found: dict[str, Any] = json.loads(PATH.read_text())
    return found
