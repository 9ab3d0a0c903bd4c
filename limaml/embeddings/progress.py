"""How far a long adaptation is: a bar on a terminal, else a log line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from limaml.telemetry import get_logger

LOG_INTERVAL_S = 10.0
_log = get_logger(__name__)


@contextmanager
def progress(total: int | None, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int], None]]:
    """Report entities done to standard error; the function given takes how many more are done. `total` None: not known."""
    with _bar(total) if sys.stderr.isatty() else _lines(total, clock) as advance:
        yield advance


@contextmanager
def _bar(total: int | None) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich
    from rich.console import Console

    class Rate(rich.ProgressColumn):
        def render(self, task: rich.Task) -> str:
            return f"{task.speed:,.0f} entities/s" if task.speed else ""

    columns: list[Any] = [rich.TextColumn("adapting"), rich.BarColumn(), rich.MofNCompleteColumn(), Rate()]
    with rich.Progress(*columns, rich.TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        task = shown.add_task("adapting", total=total)
        yield lambda count: shown.update(task, advance=count)


@contextmanager
def _lines(total: int | None, clock: Callable[[], float]) -> Iterator[Callable[[int], None]]:
    started = said = clock()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = clock()
        if now - said >= LOG_INTERVAL_S:
            said = now
            rate = round(done / (now - started), 1)
            _log.info("adapting", entities=done, total=total, entities_per_s=rate)

    yield advance
