"""Progress of a long adaptation: log lines where nobody watches, a bar where somebody does."""

import os
import subprocess
import sys

from structlog.testing import capture_logs

from limaml.embeddings.progress import progress


def test_a_log_line_comes_at_most_every_ten_seconds() -> None:
    now = [0.0]
    with capture_logs() as lines, progress(1000, clock=lambda: now[0]) as advance:
        for now[0] in (1.0, 9.9, 10.0, 19.9, 20.0, 25.0):
            advance(100)
    assert [(line["event"], line["entities"], line["total"], line["entities_per_s"]) for line in lines] == [
        ("adapting", 300, 1000, 30.0),
        ("adapting", 500, 1000, 25.0),
    ]


def test_a_terminal_gets_a_bar_with_the_rate() -> None:
    code = "from limaml.embeddings.progress import progress\nwith progress(1000) as advance:\n  advance(400); advance(600)"
    watcher, terminal = os.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=terminal, env=environment) as child:
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(watcher, 65_536):
                shown += part
        except OSError:  # the other end is closed: the child has ended
            pass
        os.close(watcher)
    assert child.returncode == 0
    assert b"1000/1000" in shown
    assert b"entities/s" in shown
