"""What the caller of `make bench` chose."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


class BenchmarkError(Exception):
    """A measurement failed, or what is measured is wrong; the message says which."""


@dataclass(frozen=True)
class Options:
    quick: bool
    """A look in under a minute: one small cell."""
    peers_python: str
    """Interpreter of the peers' environment."""
    say: Callable[[str], None]
    """Progress, a line each."""
