"""The load: one closed loop a connection over keep-alive HTTP/1.1, written for little work a request.

A client on the machine it measures takes from the services what it spends itself, so requests are bytes made beforehand, the
next one is sent from within the callback that received the last byte of an answer, and an answer is checked by counting in its
bytes.
"""

import asyncio
import gc
import json
import re
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Literal, cast

import uvloop

from benchmarks.options import BenchmarkError

Verdict = Literal["good", "fallback", "error"]
Check = Callable[[int, bytes], Verdict]

_STALL_S = 30.0
"""No answer at all for this long ends the run."""
_PERSONALISED = re.compile(rb'"fallback"\s*:\s*null')


def post(path: str, body: Any) -> bytes:
    """One request as it goes over the wire."""
    content = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def ranked(num_items: int) -> Check:
    """Status 200 with `num_items` items; `fallback` unless it says that the stored embedding was used."""

    def check(status: int, body: bytes) -> Verdict:
        if status != 200 or body.count(b'"item_id"') != num_items:
            return "error"
        return "good" if _PERSONALISED.search(body) else "fallback"

    return check


def answered(status: int, body: bytes) -> Verdict:
    """Status 200 and a body: what a no-op can be asked for."""
    return "good" if status == 200 and body else "error"


class ResponseReader:
    """Puts responses together, one after the other, whose bodies have a Content-Length or come in chunks."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> tuple[int, bytes] | None:
        """(status, body) once the response is whole, else None. Raises ValueError for what is not one HTTP/1.1 response."""
        received = self._received
        received += data
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return None
        head, start = bytes(received[:end]).lower(), end + 4
        if not head.startswith(b"http/1.1 "):
            raise ValueError(f"a response must be HTTP/1.1, got {head[:40]!r}")
        if (at := head.find(b"\r\ncontent-length:")) >= 0:
            stop = start + int(head[at + 17 :].split(b"\r\n", 1)[0])
            found = (bytes(received[start:stop]), stop) if len(received) >= stop else None
        elif b"\r\ntransfer-encoding: chunked" in head:
            found = _chunks(received, start)
        else:
            raise ValueError("a response must have a Content-Length or be chunked, got neither")
        if found is None:
            return None
        body, stop = found
        if len(received) > stop:
            raise ValueError(f"one request must get one response, got {len(received) - stop} bytes more")
        received.clear()
        return int(head[9:12]), body


def _chunks(received: bytearray, at: int) -> tuple[bytes, int] | None:
    """A chunked body (without trailers) from `at` on, and where it ends; None while a part is missing."""
    parts: list[bytes] = []
    while (line_end := received.find(b"\r\n", at)) >= 0:
        size, start = int(received[at:line_end].split(b";")[0], 16), line_end + 2
        at = start + size + 2
        if len(received) < at:
            return None
        if size == 0:
            return b"".join(parts), at
        parts.append(bytes(received[start : start + size]))
    return None


@dataclass
class Tally:
    """What one load found."""

    latencies_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Of every answer, errors too."""
    seconds: float = 0.0
    errors: int = 0
    fallbacks: int = 0
    first_error: str = ""


def load(
    port: int,
    requests: Sequence[bytes],
    check: Check,
    *,
    concurrency: int,
    seconds: float = float("inf"),
    count: float = float("inf"),
    every_second: Callable[[int], None] | None = None,
) -> Tally:
    """Keep `concurrency` connections busy with `requests` in turn, for `seconds` or until `count` were sent.

    `every_second` gets the number of answers so far. Raises BenchmarkError if the service cannot be reached or stands still.
    """
    running = _Load(port, requests, check, seconds, count)
    # The client's own collections would be counted as the services' time.
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(running.run(concurrency, every_second))
    except OSError as error:
        raise BenchmarkError(f"the service on port {port} must answer, got {error!r}; its log says why") from error
    finally:
        gc.enable()
    return running.tally


class _Load:
    def __init__(self, port: int, requests: Sequence[bytes], check: Check, seconds: float, count: float) -> None:
        self.tally = Tally()
        self.check = check
        self._port, self._seconds, self._left = port, seconds, count
        self._requests = cycle(requests)

    async def run(self, concurrency: int, every_second: Callable[[int], None] | None) -> None:
        start = time.perf_counter()
        self._end = start + self._seconds
        connections = [asyncio.create_task(self._keep_connected()) for _ in range(concurrency)]
        answers, moved_at, waiting = 0, start, set(connections)
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=1.0)
            for task in done:
                task.result()
            now = time.perf_counter()
            if len(self.tally.latencies_s) > answers:
                answers, moved_at = len(self.tally.latencies_s), now
            elif now - moved_at > _STALL_S:
                raise BenchmarkError(f"the service on port {self._port} gave no answer for {_STALL_S:g} s, after {answers}")
            if every_second:
                every_second(answers)
        self.tally.seconds = time.perf_counter() - start

    async def _keep_connected(self) -> None:
        """One loop; a connection that the service closes in the middle is an error, and is opened again."""
        finished = False
        while not finished:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self), "127.0.0.1", self._port
            )
            finished = await connection.closed

    def next_request(self) -> bytes | None:
        if self._left <= 0 or time.perf_counter() >= self._end:
            return None
        self._left -= 1
        return next(self._requests)

    def failed(self, what: str) -> None:
        self.tally.errors += 1
        self.tally.first_error = self.tally.first_error or what

    def judge(self, status: int, body: bytes) -> None:
        verdict = self.check(status, body)
        if verdict == "error":
            self.failed(f"status {status}: {body[:300].decode(errors='replace')}")
        elif verdict == "fallback":
            self.tally.fallbacks += 1


class _Connection(asyncio.Protocol):
    """Sends a request, waits for its answer, sends the next. `closed` becomes whether all that was to be sent was answered."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._reader = ResponseReader()
        self._finished = False
        self._waiting = False
        self._sent_at = 0.0
        self.closed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are not asyncio's own class.
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            response = self._reader.feed(data)
        except ValueError as error:
            self._load.failed(str(error))
            self._transport.abort()
            return
        if response is not None:
            self._load.tally.latencies_s.append(now - self._sent_at)
            self._load.judge(*response)
            self._waiting = False
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._finished and self._waiting:
            self._load.failed(f"the connection was closed before the answer: {error!r}")
        if not self.closed.done():
            self.closed.set_result(self._finished)

    def _send(self) -> None:
        request = self._load.next_request()
        if request is None:
            self._finished = True
            self._transport.close()
            return
        self._waiting = True
        self._sent_at = time.perf_counter()
        self._transport.write(request)
