"""BentoML's own command, whose supervisor refuses new connections before it ends its workers.

BentoML ends the workers first and closes the listening socket last: a client that connects in between, as one does whose kept
connection was closed, is accepted by the kernel and then cut off. Told to end (SIGTERM), this one stops listening at once;
what was accepted before is answered, what comes later is refused and can go elsewhere.
"""

import runpy
import socket
from contextlib import suppress
from typing import Any


def refuse_before_stopping() -> None:
    """Make every supervisor of this process do so."""
    from circus.arbiter import Arbiter

    stop = Arbiter.stop

    def refuse_and_stop(self: Any) -> Any:
        for listening in self.sockets.values():
            with suppress(OSError):
                # Of the socket itself, so for all workers that share it, where `close` would be for this process alone.
                listening.shutdown(socket.SHUT_RDWR)
        return stop(self)

    Arbiter.stop = refuse_and_stop


if __name__ == "__main__":
    refuse_before_stopping()
    runpy.run_module("bentoml", run_name="__main__", alter_sys=True)
