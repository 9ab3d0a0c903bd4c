"""The endpoint alone, driven as an ASGI app: what it refuses, what it counts and what it leaves to others."""

import asyncio
import json
import sys
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from limaml.config import ServingConfig
from serving.api import MAX_BODY_BYTES, RequestError, request_model
from serving.endpoint import RankEndpoint
from serving.metrics import Metrics
from tests import declared
from tests.polling import until

GOOD = b'{"user_id": "u1", "item_ids": ["i1"]}'
JSON = ((b"content-type", b"application/json"),)


async def others(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b"others"})


async def ranked(request):
    return request.user_id.encode()


class Endpoint:
    """An endpoint and its counters."""

    def __init__(self, rank=ranked, token=None, **serving):
        self.registry = CollectorRegistry()
        self.app = RankEndpoint(
            ServingConfig(**serving), path="/rank", request_type=request_model(3, declared.TABLES), token=token
        )
        self.metrics = Metrics(self.registry)
        self.metrics.start([])
        self.app.bind(rank, self.metrics)
        self.app.others = others

    def count(self, code, *, flush=True):
        if flush:
            self.metrics.flush()
        return self.registry.get_sample_value("limaml_rank_requests_total", {"code": str(code)})

    async def send(self, chunks, *, path="/rank", method="POST", headers=JSON):
        """Send a request in chunks; returns (status, headers, body), or None if nothing was answered."""
        messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        if messages:
            messages[-1]["more_body"] = False
        incoming, sent = iter(messages), []

        async def receive():
            return next(incoming, {"type": "http.disconnect"})

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
        await self.app(scope, receive, send)
        self.left = sum(1 for _ in incoming)
        return (sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]) if sent else None

    def call(self, chunks, **more):
        return asyncio.run(self.send(chunks, **more))


@pytest.fixture
def endpoint():
    return Endpoint()


def error(answer):
    return json.loads(answer[2])["error"]


def test_a_good_body_is_ranked(endpoint):
    before = endpoint.count(200)
    for chunks, headers in (
        ([GOOD], JSON),
        ([GOOD[:5], GOOD[5:12], GOOD[12:]], JSON),
        ([GOOD], ()),
        ([GOOD], [(b"content-type", b"application/json; charset=utf-8")]),
    ):
        status, sent, body = endpoint.call(chunks, headers=headers)
        assert (status, body) == (200, b"u1")
        assert sent == {b"content-type": b"application/json", b"content-length": b"2"}
    assert endpoint.count(200) == before + 4


def test_counts_are_seen_a_moment_later_or_when_a_page_is_asked_for(endpoint):
    async def scene():
        before = endpoint.count(200, flush=False)
        for _ in range(2):
            await endpoint.send([GOOD])
        assert endpoint.count(200, flush=False) == before
        await endpoint.send([], path="/metrics", method="GET")
        assert endpoint.count(200, flush=False) == before + 2
        for expected in (before + 3, before + 4):  # the timer is set anew after it went off
            await endpoint.send([GOOD])
            await until(lambda expected=expected: endpoint.count(200, flush=False) == expected)

    asyncio.run(scene())


def test_a_bad_body_is_never_ranked(endpoint):
    before = endpoint.count(400)
    answer = endpoint.call([b'{"user_id": 3, "item_ids": ["i1"]}'])
    assert answer[0] == 400
    assert error(answer) == {
        "field": "user_id",
        "rule": "must be a valid string",
        "value": 3,
        "remedy": "see /docs.json for the types and ranges",
    }
    assert endpoint.count(400) == before + 1


@pytest.mark.parametrize("kind", [b"application/vnd.bentoml+pickle", b"multipart/form-data; boundary=x", b"text/plain"])
def test_only_json_is_decoded(endpoint, kind):
    answer = endpoint.call([GOOD], headers=[(b"content-type", kind)])
    assert (answer[0], error(answer)["field"], error(answer)["value"]) == (415, "Content-Type", kind.decode())


def test_a_body_larger_than_any_valid_request_is_not_read_to_its_end(endpoint):
    chunk = b" " * (MAX_BODY_BYTES // 2)
    answer = endpoint.call([chunk, chunk, b"1", chunk])
    assert (answer[0], error(answer)["rule"], endpoint.left) == (400, f"must be at most {MAX_BODY_BYTES} bytes", 1)


def test_a_body_that_says_it_is_too_large_is_not_read_at_all(endpoint):
    answer = endpoint.call([GOOD], headers=[*JSON, (b"content-length", b"10000000")])
    assert (answer[0], error(answer)["field"], endpoint.left) == (400, "(body)", 1)


def test_the_largest_body_that_is_allowed_is_read(endpoint):
    body = GOOD + b" " * (MAX_BODY_BYTES - len(GOOD))
    assert endpoint.call([body], headers=[*JSON, (b"content-length", str(len(body)).encode())])[0] == 200
    answer = endpoint.call([body], headers=[*JSON, (b"content-length", str(len(body) + 1).encode())])
    assert (answer[0], error(answer)["field"]) == (400, "(body)")


def test_only_answers_that_rank_have_a_total_time(endpoint):
    def total():
        endpoint.metrics.flush()
        return endpoint.registry.get_sample_value("limaml_rank_seconds_count", {"stage": "total"})

    before = total()
    endpoint.call([b"no JSON"])
    assert total() == before
    endpoint.call([GOOD])
    assert total() == before + 1


def test_a_stranger_s_body_is_not_read():
    endpoint = Endpoint(token=b"secret")
    assert endpoint.call([GOOD, b"more"])[0] == 401
    assert endpoint.left == 2


def test_a_client_that_went_away_is_not_answered(endpoint):
    assert endpoint.call([]) is None


def test_other_paths_are_left_to_others(endpoint):
    assert endpoint.call([b"anything"], path="/metrics")[2] == b"others"
    assert endpoint.call([b"anything"], method="GET")[2] == b"others"


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (b"Bearer secret", 200),
        (b"bearer secret", 200),
        (b"Bearer wrong", 401),
        (b"Basic secret", 401),
        (b"secret", 401),
        (None, 401),
    ],
)
def test_the_token_is_asked_for(given, status):
    endpoint = Endpoint(token=b"secret")
    headers = JSON if given is None else [*JSON, (b"authorization", given)]
    before = endpoint.count(status)
    answer = endpoint.call([GOOD], headers=headers)
    assert answer[0] == status
    assert endpoint.count(status) == before + 1
    if status == 401:
        assert answer[1][b"www-authenticate"] == b"Bearer"
        assert error(answer)["field"] == "Authorization"
        assert b"wrong" not in answer[2]


def test_an_error_inside_is_told_in_our_shape_and_logged(monkeypatch):
    async def broken(request):
        raise ZeroDivisionError("a secret")

    logged = []

    def keep(event, **fields):
        logged.append((event, fields, sys.exc_info()[2]))

    monkeypatch.setattr("serving.endpoint.log", SimpleNamespace(exception=keep))
    endpoint = Endpoint(broken)
    before = endpoint.count(500)
    answer = endpoint.call([GOOD])
    assert (answer[0], error(answer)["rule"]) == (500, "internal error")
    assert b"secret" not in answer[2]
    assert endpoint.count(500) == before + 1
    [(event, fields, traceback)] = logged
    assert (event, fields) == ("rank_failed", {"error": "ZeroDivisionError: a secret"})
    assert traceback.tb_next is not None, "without the traceback nobody finds the cause"


def test_an_answer_that_takes_too_long_is_given_up():
    async def slow(request):
        await asyncio.Event().wait()

    endpoint = Endpoint(slow, timeout_s=0.05)
    answer = endpoint.call([GOOD])
    assert (answer[0], error(answer)["rule"]) == (504, "must answer within 0.05 s")


def test_more_than_it_can_hold_is_refused_at_once():
    async def scene():
        free = asyncio.Event()

        async def waiting(request):
            await free.wait()
            return b"{}"

        endpoint = Endpoint(waiting, max_in_flight=2)
        held = [asyncio.ensure_future(endpoint.send([GOOD])) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await asyncio.wait_for(endpoint.send([GOOD]), 1.0)
        free.set()
        done = await asyncio.gather(*held)
        return refused, done, await endpoint.send([GOOD])

    refused, done, later = asyncio.run(scene())
    assert (refused[0], refused[1][b"retry-after"]) == (503, b"1")
    assert error(refused)["rule"] == "works on at most 2 requests at a time"
    assert [answer[0] for answer in done] == [200, 200]
    assert later[0] == 200


def test_what_the_ranker_refuses_is_passed_on():
    async def refusing(request):
        raise RequestError(503, field="(service)", rule="must have loaded a champion", value=None, remedy="wait")

    assert error(Endpoint(refusing).call([GOOD]))["rule"] == "must have loaded a champion"
