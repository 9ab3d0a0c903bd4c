"""BentoML's own command, whose supervisor refuses new connections before it ends its workers.

BentoML ends the workers first and closes the listening socket last: a client that connects in between, as one does whose kept
connection was closed, is accepted by the kernel and then cut off. Told to end (SIGTERM), this one stops listening once no
connection waits for a worker, which the kernel would reset; what was accepted before is answered, what comes later is refused
and can go elsewhere.
"""

import runpy
import socket
import struct
import time
from contextlib import suppress
from typing import Any

_WAIT_S = 1.0
"""For busy workers to accept what waits."""
_AT_UNACKED = 24
"""Where Linux's `struct tcp_info` has `tcpi_unacked`: of a listening socket, the connections that nobody has accepted."""


def refuse_before_stopping() -> None:
    """Make every supervisor of this process do so."""
    from circus.arbiter import Arbiter

    stop = Arbiter.stop

    def refuse_and_stop(self: Any) -> Any:
        for listening in self.sockets.values():
            refuse(listening)
        return stop(self)

    Arbiter.stop = refuse_and_stop


def refuse(listening: socket.socket) -> None:
    """Stop listening, after workers have accepted what has connected."""
    until_s = time.monotonic() + _WAIT_S
    # No TCP_INFO elsewhere than on Linux, and none of a Unix socket.
    with suppress(OSError, AttributeError):
        while _waiting(listening) and time.monotonic() < until_s:
            time.sleep(0.001)
    with suppress(OSError):
        # Of the socket itself, so for all workers that share it, where `close` would be for this process alone.
        listening.shutdown(socket.SHUT_RDWR)


def _waiting(listening: socket.socket) -> int:
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _AT_UNACKED + 4)
    found: int = struct.unpack_from("=I", info, _AT_UNACKED)[0]
    return found


if __name__ == "__main__":
    refuse_before_stopping()
    runpy.run_module("bentoml", run_name="__main__", alter_sys=True)
