"""How far a long piece of work is: a bar on a terminal, else a log line every ten seconds; short work says nothing."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from limaml.telemetry import get_logger

LOG_INTERVAL_S = 10.0
_SHOWN_AFTER_S = 2.0
Item = TypeVar("Item")
_log = get_logger(__name__)


@contextmanager
def progress(
    what: str, unit: str, total: int | None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Report to standard error how many `unit` of `total` (None: not known) are done, their rate and the time left.

    The function given takes how many more are done. A bar shows once two seconds have passed.
    """
    with _bar(what, unit, total, clock) if sys.stderr.isatty() else _lines(what, unit, total, clock) as advance:
        yield advance


def tracked(items: Iterable[Item], what: str, unit: str, total: int | None) -> Iterator[Item]:
    """The items, each counted once the loop over them asks for the next one."""
    with progress(what, unit, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def _bar(what: str, unit: str, total: int | None, clock: Callable[[], float]) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich
    from rich.console import Console

    class Rate(rich.ProgressColumn):
        def render(self, task: rich.Task) -> str:
            return f"{task.speed:,.0f} {unit}/s" if task.speed else ""

    columns: list[Any] = [
        rich.TextColumn(what),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        Rate(),
        rich.TimeRemainingColumn(),
    ]
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total, visible=False)
        started = clock()

        def advance(count: int) -> None:
            shown.update(task, advance=count, visible=clock() - started >= _SHOWN_AFTER_S)

        yield advance


@contextmanager
def _lines(what: str, unit: str, total: int | None, clock: Callable[[], float]) -> Iterator[Callable[[int], None]]:
    started = said = clock()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = clock()
        if now - said >= LOG_INTERVAL_S:
            said = now
            rate = done / (now - started)
            left = None if total is None else round(max(0, total - done) / rate)
            _log.info("progress", what=what, unit=unit, done=done, total=total, per_s=round(rate, 1), left_s=left)

    yield advance
