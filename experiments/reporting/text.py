"""How numbers, differences and tables are spelled; methods' names, in the order in which tables show them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Interval = Mapping[str, float | None]

DASH = "-"
NAMES = {
    "item_mean": "item mean",
    "user_level": "item mean + one shrunk number per user",
    "logistic": "logistic regression on aggregates",
    "lightgbm": "LightGBM on aggregates",
    "global_mlp": "global MLP, not personalised",
    "user_id": "wide & deep with user ids",
    "history_mlp": "MLP with history features",
    "prior": "LiMAML, its prior only",
    "id_mlp": "LiMAML, stored, id block",
    "row_mlp": "LiMAML, stored, row-level block",
    "full": "LiMAML, full adapted network, row-level block",
    "history": "LiMAML, stored, with history features",
    "stored": "LiMAML, stored embedding (shipped)",
}
OURS = ("stored", "full", "history")
RIVALS = ("item_mean", "user_level", "logistic", "lightgbm", "global_mlp", "user_id", "history_mlp")
METRICS = {"auc": "pooled", "peruser_auc": "per-user"}
PERSONAL_KS = ("20", "50")
CADENCES = {
    "never": "never",
    "weekly": "weekly",
    "daily": "daily",
    "hourly": "hourly",
    "ten_minutes": "10 minutes",
    "at_once": "at once",
}


def pick(found: Any, *path: str) -> Any:
    """What lies at a path of keys, None where there is nothing."""
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def ordered(names: Iterable[str]) -> list[str]:
    """Methods in the order of `NAMES`; unknown ones last."""
    known = list(NAMES)
    return sorted(names, key=lambda name: (known.index(name) if name in NAMES else len(known), name))


def by_number(keys: Iterable[str]) -> list[str]:
    """JSON sorts keys as text: 10 before 2."""
    return sorted(keys, key=int)


def name_of(method: str) -> str:
    return NAMES.get(method, method)


def points(value: float | None, digits: int = 1) -> str:
    """An AUC or a share, 0 to 1, in hundredths."""
    return DASH if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """A difference in points."""
    return DASH if value is None else f"{100 * value:+.{digits}f}"


def change(found: Interval | None, digits: int = 1) -> str:
    """`+1.4 [+0.5, +2.3]` in points, bold where the interval excludes zero."""
    if found is None or found["mean"] is None:
        return DASH
    shown = f"{signed(found['mean'], digits)} [{signed(found['low'], digits)}, {signed(found['high'], digits)}]"
    return f"**{shown}**" if excludes_zero(found) else shown


def excludes_zero(found: Interval) -> bool:
    low, high = found["low"], found["high"]
    return low is not None and high is not None and (low > 0.0 or high < 0.0)


def negated(found: Interval | None) -> Interval | None:
    """The same difference the other way round."""
    if found is None or None in found.values():
        return None
    values = {name: -value for name, value in found.items() if value is not None}
    return {"mean": values["mean"], "low": values["high"], "high": values["low"]}


def mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if len(there) == len(values) else None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table and an empty line after it."""
    lines = [" | ".join(header), "|".join("---" for _ in header)]
    return [f"| {lines[0]} |", f"|{lines[1]}|", *(f"| {' | '.join(row)} |" for row in rows), ""]
