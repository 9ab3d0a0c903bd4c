"""Where experiments keep what they ingested and computed, and the day that they take for today."""

from datetime import date
from pathlib import Path

WORK = Path("experiments/.work")
TODAY = date(2026, 11, 25)
"""Fixed: replayed days keep their place in time, so that the same command reads the same rows whenever it runs."""
