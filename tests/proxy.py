"""A TCP proxy on loopback that passes on, late or not at all, cuts connections, or answers HTTP requests with 503 itself."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Coroutine
from typing import Any

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_UNAVAILABLE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: " + str(len(_SLOW_DOWN)).encode() + b"\r\n\r\n" + _SLOW_DOWN
)
_METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")


class Proxy:
    """Between clients and `target` (host:port); nobody can connect while it is `down`."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.host, port = target.split(":")
        self.target_port = int(port)
        self.delay_s = 0.0
        """Every answer is so late."""
        self.silent = False
        """What comes from either side is lost, and the connections stay open: a network that drops."""
        self.cut_every = 0
        """So many answers are passed on, then the connection of the next one is cut instead; 0: none is."""
        self.refuse_every = 0
        """Every so manieth HTTP request is answered with 503; 0: none is."""
        self.refused = 0
        self.port = 0
        self._answers, self._requests = itertools.count(1), itertools.count(1)
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.up()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def up(self) -> None:
        async def listen() -> None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

        self._run(listen())

    def down(self) -> None:
        async def close() -> None:
            self._server.close()
            for writer in list(self._connections):
                writer.transport.abort()

        self._run(close())

    def stop(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(self.host, self.target_port)
        except OSError:
            writer.close()
            return
        self._connections |= {writer, upstream_writer}
        await asyncio.gather(self._ask(reader, upstream_writer, writer), self._answer(upstream_reader, writer))

    async def _ask(self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._refuses(data):
                    client.write(_UNAVAILABLE)
                    await client.drain()
                    client.write_eof()
                    # Its body may still come; a connection that is closed before has lost the answer.
                    while await reader.read(65536):
                        pass
                    break
                if not self.silent:
                    upstream.write(data)
        self._close(upstream)

    async def _answer(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay_s)
                if self.cut_every and next(self._answers) % self.cut_every == 0:
                    client.transport.abort()
                    break
                if not self.silent:
                    client.write(data)
        self._close(client)

    def _refuses(self, data: bytes) -> bool:
        is_request = bool(self.refuse_every) and data.startswith(_METHODS)
        refuses = is_request and next(self._requests) % self.refuse_every == 0
        self.refused += refuses
        return refuses

    def _close(self, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.close()
        self._connections.discard(writer)
