"""How numbers, differences and tables are spelled on the pages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
DASH = "-"


def pick(found: Any, *path: str) -> Any:
    """What lies at a path of keys, None where there is nothing."""
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:,.{digits}f}"


def over(found: Results | None, digits: int = 1) -> str:
    """`+1.4 [+0.5, +2.3]` of a difference in points, bold where the interval excludes zero."""
    if found is None or found["mean"] is None or found["low"] is None:
        return DASH
    text = f"{found['mean']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table and an empty line after it."""
    lines = [" | ".join(header), "|".join("---" for _ in header)]
    return [f"| {lines[0]} |", f"|{lines[1]}|", *(f"| {' | '.join(row)} |" for row in rows), ""]
