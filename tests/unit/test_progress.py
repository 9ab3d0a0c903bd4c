"""Progress of long work: log lines where nobody watches, a bar where somebody does, nothing of what is short."""

import os
import subprocess
import sys

from structlog.testing import capture_logs

from limaml.progress import progress, tracked

ON_A_TERMINAL = """
from itertools import count
from limaml.progress import progress
seconds = count(step={step})
with progress("adapting", "entities", 1000, clock=lambda: next(seconds)) as advance:
    advance(400)
    advance(600)
"""


def shown_on_a_terminal(step: float) -> bytes:
    """What `advance` twice prints if `step` seconds pass from one look at the clock to the next."""
    watcher, terminal = os.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL.format(step=step)], stderr=terminal, env=environment) as child:
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(watcher, 65_536):
                shown += part
        except OSError:  # the other end is closed: the child has ended
            pass
        os.close(watcher)
    assert child.returncode == 0
    return shown


def test_a_log_line_comes_at_most_every_ten_seconds_with_rate_and_time_left() -> None:
    now = [0.0]
    with capture_logs() as lines, progress("adapting", "entities", 1000, clock=lambda: now[0]) as advance:
        for now[0] in (1.0, 9.9, 10.0, 19.9, 20.0, 25.0):
            advance(100)
    assert [(line["what"], line["unit"], line["done"], line["total"], line["per_s"], line["left_s"]) for line in lines] == [
        ("adapting", "entities", 300, 1000, 30.0, 23),
        ("adapting", "entities", 500, 1000, 25.0, 20),
    ]


def test_without_a_total_no_time_is_left() -> None:
    now = [0.0]
    with capture_logs() as lines, progress("adapting", "entities", None, clock=lambda: now[0]) as advance:
        now[0] = 12.0
        advance(60)
    assert [(line["done"], line["total"], line["per_s"], line["left_s"]) for line in lines] == [(60, None, 5.0, None)]


def test_tracked_gives_every_item() -> None:
    assert list(tracked("abc", "reading", "letters", 3)) == ["a", "b", "c"]


def test_a_terminal_gets_a_bar_with_the_rate() -> None:
    shown = shown_on_a_terminal(step=1.5)
    assert b"1000/1000" in shown
    assert b"entities/s" in shown


def test_a_terminal_gets_no_bar_of_what_is_short() -> None:
    assert b"1000" not in shown_on_a_terminal(step=0.01)
