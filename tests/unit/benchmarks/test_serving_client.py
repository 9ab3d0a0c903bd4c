"""The load against a small HTTP server of our own, whose answers come in every form that a service may choose."""

import asyncio
import json
import threading

import pytest

from benchmarks.options import BenchmarkError
from benchmarks.serving.client import ResponseReader, answered, load, post, ranked

ITEMS = b'{"items": [{"item_id": "a", "score": 0.5}, {"item_id": "b", "score": 0.25}], '
GOOD = ITEMS + b'"embeddings": {"user": {"age_s": 1.5, "fallback": null}}}'
FELL_BACK = ITEMS + b'"embeddings": {"user": {"age_s": null, "fallback":"stale"}}}'
CHECK = ranked(2)


def plain(body, status=b"200 OK"):
    return b"HTTP/1.1 " + status + b"\r\nX: y\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body


def chunked(*parts):
    chunks = b"".join(f"{len(part):X}\r\n".encode() + part + b"\r\n" for part in (*parts, b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


class Server:
    """Gives `answers` in turn over all connections, each in pieces of `piece` bytes; None closes the connection instead."""

    def __init__(self, *answers, piece=1 << 20):
        self.answers, self.piece = answers, piece
        self.requests, self.num_connections = [], 0
        self._loop, self._listening = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self):
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self):
        self._stop, self._handlers = asyncio.Event(), set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._stop.wait()
        server.close()
        await server.wait_closed()
        await asyncio.gather(*self._handlers)

    async def _connected(self, reader, writer):
        self._handlers.add(asyncio.current_task())
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                answer = self.answers[len(self.requests) % len(self.answers)]
                self.requests.append(json.loads(body))
                if answer is None:
                    break
                for start in range(0, len(answer), self.piece):
                    writer.write(answer[start : start + self.piece])
                    await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (plain(GOOD), (200, GOOD)),
        (plain(b"", b"503 Busy"), (503, b"")),
        (chunked(GOOD), (200, GOOD)),
        (chunked(GOOD[:5], GOOD[5:], b"\r\n0\r\n\r\n"), (200, GOOD + b"\r\n0\r\n\r\n")),
    ],
)
def test_a_response_is_put_together_from_pieces(response, expected, piece):
    reader = ResponseReader()
    for _ in range(2):
        pieces = [response[start : start + piece] for start in range(0, len(response), piece)]
        *early, last = [reader.feed(part) for part in pieces]
        assert early == [None] * len(early)
        assert last == expected


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (plain(GOOD) + b"more", "4 bytes more"),
        (b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n", "Content-Length or be chunked"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "must be HTTP/1.1"),
    ],
)
def test_what_is_not_one_response_is_refused(response, why):
    with pytest.raises(ValueError, match=why):
        ResponseReader().feed(response)


def test_an_answer_is_judged_by_its_items_and_its_fallback():
    assert CHECK(200, GOOD) == CHECK(200, GOOD.replace(b": null", b":null")) == "good"
    assert CHECK(200, FELL_BACK) == "fallback"
    assert CHECK(200, b'{"items": [{"item_id": "a"}, {"item_id": "b"}]}') == "fallback", "it does not say that it used one"
    assert CHECK(503, GOOD) == ranked(3)(200, GOOD) == "error"
    assert (answered(200, b"{}"), answered(200, b""), answered(500, b"{}")) == ("good", "error", "error")


def test_connections_are_kept_and_every_request_is_sent_in_turn():
    requests = [post("/rank", {"number": number}) for number in range(3)]
    seen = []
    with Server(plain(GOOD), chunked(GOOD), chunked(FELL_BACK, b" "), piece=50) as server:
        tally = load(server.port, requests, CHECK, concurrency=2, count=30, every_second=seen.append)
    assert (len(tally.latencies_s), tally.errors, tally.fallbacks) == (30, 0, 10)
    assert server.num_connections == 2
    assert sorted(request["number"] for request in server.requests) == sorted(list(range(3)) * 10)
    assert min(tally.latencies_s) > 0
    assert sum(tally.latencies_s) <= 2 * tally.seconds
    assert seen[-1] == 30


def test_a_load_of_some_seconds_ends_after_them():
    with Server(plain(b"{}")) as server:
        tally = load(server.port, [post("/rank", {})], answered, concurrency=8, seconds=0.2)
    assert tally.seconds >= 0.2
    assert len(tally.latencies_s) == len(server.requests) > 8
    assert server.num_connections == 8


def test_errors_are_counted_and_the_first_one_is_told():
    with Server(plain(GOOD), plain(b"too busy", b"503 Busy")) as server:
        tally = load(server.port, [post("/rank", {})], CHECK, concurrency=1, count=10)
    assert (len(tally.latencies_s), tally.errors, tally.first_error) == (10, 5, "status 503: too busy")


def test_a_connection_closed_before_the_answer_is_an_error_and_is_opened_again():
    with Server(plain(GOOD), None, plain(GOOD)) as server:
        tally = load(server.port, [post("/rank", {})], CHECK, concurrency=1, count=6)
    assert (len(tally.latencies_s), tally.errors, server.num_connections) == (4, 2, 3)
    assert "closed before the answer" in tally.first_error


def test_nobody_there_ends_the_run(free_ports):
    (port,) = free_ports(1)
    with pytest.raises(BenchmarkError, match=f"port {port} must answer"):
        load(port, [post("/rank", {})], answered, concurrency=1, count=1)
