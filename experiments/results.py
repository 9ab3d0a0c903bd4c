"""Results as files hold them: JSON values, floats of five digits; what is not defined is null."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_DIGITS = 5


def plain(value: Any) -> Any:
    """As the file holds it: keys are text, floats are rounded, what is not defined is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{_DIGITS}g}")
    return value
