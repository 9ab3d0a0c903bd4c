"""ASGI middleware in front of BentoML: bad requests are answered here, with field, rule, value and remedy.

BentoML hides the text of 5xx errors and wraps 4xx errors without the offending value, so `/rank` bodies are checked
before it sees them.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.api import MAX_BODY_BYTES, RankRequest, RequestError, parse_request

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class RequestGuard:
    """Checks the shape of `POST <path>` and passes the unchanged body on; everything else goes through untouched."""

    def __init__(self, app: App, *, path: str, request_type: type[RankRequest]) -> None:
        self.app = app
        self.path = path
        self.request_type = request_type

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self.path or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            _check_content_type(scope)
            body = await _read(receive)
            if body is None:
                return
            parse_request(body, self.request_type)
        except RequestError as refused:
            from starlette.responses import JSONResponse

            await JSONResponse(refused.body, status_code=refused.status)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)


def _check_content_type(scope: MutableMapping[str, Any]) -> None:
    # Anything else would choose another of BentoML's decoders than the one the check below stands for.
    for name, value in scope["headers"]:
        if name == b"content-type" and value.split(b";")[0].strip().lower() != b"application/json":
            raise RequestError(
                415,
                field="Content-Type",
                rule="must be application/json",
                value=value.decode("latin-1")[:100],
                remedy="send the request as JSON",
            )


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None if the client went away. Raises RequestError when it is larger than any valid request."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(
                400,
                field="(body)",
                rule=f"must be at most {MAX_BODY_BYTES} bytes",
                value=f"over {MAX_BODY_BYTES} bytes",
                remedy="split the candidates over several requests",
            )
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then whatever the server says next."""
    pending = True

    async def replayed() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
