"""The middleware alone, driven as an ASGI app: what it stops and what it passes on unchanged."""

import asyncio
import json

import pytest

from serving.api import MAX_BODY_BYTES, request_model
from serving.errors import RequestGuard

GOOD = b'{"user_id": "u1", "item_ids": ["i1"]}'


async def echo(scope, receive, send):
    """Answers 200 with the body it was given."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def call(chunks, *, path="/rank", method="POST", headers=((b"content-type", b"application/json"),)):
    """Send a request in chunks; returns (status, body), or None if nothing was answered."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if messages:
        messages[-1]["more_body"] = False
    incoming, sent = iter(messages), []

    async def receive():
        return next(incoming, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    guard = RequestGuard(echo, path="/rank", request_type=request_model(3))
    scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
    asyncio.run(guard(scope, receive, send))
    return (sent[0]["status"], sent[1]["body"]) if sent else None


def test_a_good_body_goes_through_unchanged():
    assert call([GOOD]) == (200, GOOD)
    assert call([GOOD[:5], GOOD[5:12], GOOD[12:]]) == (200, GOOD)
    assert call([GOOD], headers=[]) == (200, GOOD)
    assert call([GOOD], headers=[(b"content-type", b"application/json; charset=utf-8")]) == (200, GOOD)


def test_a_bad_body_never_reaches_the_service():
    status, body = call([b'{"user_id": 3, "item_ids": ["i1"]}'])
    assert status == 400
    assert json.loads(body) == {
        "error": {
            "field": "user_id",
            "rule": "must be a valid string",
            "value": 3,
            "remedy": "see /docs.json for the types and ranges",
        }
    }


@pytest.mark.parametrize("kind", [b"application/vnd.bentoml+pickle", b"multipart/form-data; boundary=x", b"text/plain"])
def test_only_json_is_decoded(kind):
    status, body = call([GOOD], headers=[(b"content-type", kind)])
    error = json.loads(body)["error"]
    assert (status, error["field"], error["value"]) == (415, "Content-Type", kind.decode())


def test_a_body_larger_than_any_valid_request_is_not_read_to_its_end():
    chunk = b" " * (MAX_BODY_BYTES // 2)
    status, body = call([chunk, chunk, b"1", chunk])
    assert status == 400
    assert json.loads(body)["error"]["rule"] == f"must be at most {MAX_BODY_BYTES} bytes"


def test_a_client_that_went_away_is_not_answered():
    assert call([]) is None


def test_other_paths_are_not_touched():
    assert call([b"anything"], path="/metrics") == (200, b"anything")
    assert call([b"anything"], method="GET") == (200, b"anything")
