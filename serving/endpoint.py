"""`POST /rank`, answered before BentoML's own layers; everything else (pages, /metrics, health) is BentoML's.

BentoML's path to an endpoint checks a body a second time, builds pydantic models of the answer, hides the text of errors,
and leaves a timer alive for every request, whose collection makes its p99. So `/rank` is answered here, in the same process
and event loop: admission, token, body, time limit, error shape and the count of codes. What BentoML describes and supervises
stays as it was; its own per-endpoint metrics do not see `/rank`, ours do (`limaml_rank_*`).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from limaml import telemetry
from limaml.config import ServingConfig
from serving.api import MAX_BODY_BYTES, RankRequest, RequestError, parse_request
from serving.auth import check_token
from serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Rank = Callable[[RankRequest], Awaitable[bytes]]

log = telemetry.get_logger(__name__)

RETRY_AFTER_S = 1
_FLUSH_S = 0.1
"""Metrics of a request are seen this much later, at most."""


class ClientGone(Exception):  # noqa: N818 - it is no error
    """Nobody waits for an answer."""


class RankEndpoint:
    """ASGI application: `POST <path>` is ours, the rest is `others`'. `bind` it before the first request."""

    def __init__(self, cfg: ServingConfig, *, path: str, request_type: type[RankRequest], token: bytes | None) -> None:
        self.others: App | None = None
        self._cfg = cfg
        self._path = path
        self._request_type = request_type
        self._token = token
        self._in_flight = 0
        self._rank: Rank | None = None
        self._metrics: Metrics | None = None
        self._flush_is_due = False

    def bind(self, rank: Rank, metrics: Metrics) -> None:
        """What answers a checked request, and where codes and times are counted."""
        self._rank, self._metrics = rank, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "POST":
            assert self.others is not None
            if self._metrics is not None:
                self._metrics.flush()
            await self.others(scope, receive, send)
            return
        assert self._metrics is not None
        started = time.perf_counter()
        try:
            status, headers, body = await self._answer(scope, receive)
        except ClientGone:
            return
        self._metrics.answered(status)
        if status == 200:
            self._metrics.stage("total", time.perf_counter() - started)
        if not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_later(_FLUSH_S, self._flush)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _flush(self) -> None:
        assert self._metrics is not None
        self._flush_is_due = False
        self._metrics.flush()

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        try:
            if self._token is not None:
                check_token(scope["headers"], self._token)
            body = await self._admitted(scope, receive)
        except RequestError as refused:
            return refused.status, _headers(body := msgspec.json.encode(refused.body), refused), body
        return 200, _headers(body), body

    async def _admitted(self, scope: Scope, receive: Receive) -> bytes:
        """The answer's body. Raises RequestError: 503 when too many requests are in flight, 504 after `timeout_s`, 500."""
        if self._in_flight >= self._cfg.max_in_flight:
            raise _overloaded(self._cfg.max_in_flight)
        assert self._rank is not None
        self._in_flight += 1
        try:
            async with asyncio.timeout(self._cfg.timeout_s):
                request = parse_request(await _read(scope, receive), self._request_type)
                return await self._rank(request)
        except (RequestError, ClientGone):
            raise
        except TimeoutError:
            raise _late(self._cfg.timeout_s) from None
        except Exception as error:
            log.exception("rank_failed", error=f"{type(error).__name__}: {error}")
            raise _internal() from None
        finally:
            self._in_flight -= 1


def _headers(body: bytes, refused: RequestError | None = None) -> list[tuple[bytes, bytes]]:
    more = refused.headers if refused else {}
    return [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in more.items()),
    ]


async def _read(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises RequestError for one that is not JSON, or larger than any valid request, which is not read."""
    for name, value in scope["headers"]:
        if name == b"content-type" and value.split(b";")[0].strip().lower() != b"application/json":
            raise RequestError(
                415,
                field="Content-Type",
                rule="must be application/json",
                value=value.decode("latin-1")[:100],
                remedy="send the request as JSON",
            )
        if name == b"content-length" and value.isdigit() and int(value[:20]) > MAX_BODY_BYTES:
            raise _too_large()
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body") or b""
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return body


def _too_large() -> RequestError:
    return RequestError(
        400,
        field="(body)",
        rule=f"must be at most {MAX_BODY_BYTES} bytes",
        value=f"over {MAX_BODY_BYTES} bytes",
        remedy="split the candidates over several requests",
    )


def _overloaded(limit: int) -> RequestError:
    return RequestError(
        503,
        field="(service)",
        rule=f"works on at most {limit} requests at a time",
        value=limit,
        remedy="try again after the seconds in Retry-After, or run more workers",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def _late(timeout_s: float) -> RequestError:
    return RequestError(
        504,
        field="(service)",
        rule=f"must answer within {timeout_s:g} s",
        value=None,
        remedy="send the body at once, or try again",
    )


def _internal() -> RequestError:
    return RequestError(
        500,
        field="(service)",
        rule="internal error",
        value=None,
        remedy="try again; the service's log has the cause (rank_failed)",
    )
