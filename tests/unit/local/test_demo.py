"""Asking the service: a late answer is asked for again, a refusal is an error at once."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from limaml.config import Config, FeatureConfig
from limaml.errors import LimamlError
from limaml.local import demo

USER = demo.DemoUser("u1", "much history", 3, ("i1", "i2"))
TIMEOUT_S = 1.5


@pytest.fixture
def answering() -> Iterator[Callable[[list[int]], tuple[str, list[int]]]]:
    """`answering(statuses)` serves them one after another, the last for ever; returns its URL and the statuses given so far."""
    servers: list[ThreadingHTTPServer] = []

    def serve(statuses: list[int]) -> tuple[str, list[int]]:
        given: list[int] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                given.append(statuses[min(len(given), len(statuses) - 1)])
                self.send_response(given[-1])
                self.end_headers()
                self.wfile.write(json.dumps({"model_version": "7", "error": "why"}).encode())

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", given

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("late", [503, 504])
def test_a_late_service_is_asked_again(answering: Callable[[list[int]], tuple[str, list[int]]], late: int) -> None:
    url, given = answering([late, late, 200])
    assert demo.ask(url, USER, timeout_s=60.0)["model_version"] == "7"
    assert given == [late, late, 200]


@pytest.mark.parametrize("status", [400, 500])
def test_a_refusal_is_an_error_at_once(answering: Callable[[list[int]], tuple[str, list[int]]], status: int) -> None:
    url, given = answering([status, 200])
    with pytest.raises(LimamlError, match=rf"the service refused user 'u1': {status} .*why"):
        demo.ask(url, USER, timeout_s=60.0)
    assert given == [status]


def test_a_service_that_stays_late_is_an_error_after_the_limit(
    answering: Callable[[list[int]], tuple[str, list[int]]], free_ports: Callable[[int], list[int]]
) -> None:
    url, given = answering([504])
    started = time.monotonic()
    with pytest.raises(LimamlError, match="504"):
        demo.ask(url, USER, timeout_s=TIMEOUT_S)
    assert time.monotonic() - started >= TIMEOUT_S
    assert len(given) > 1
    with pytest.raises(LimamlError, match="ConnectError"):
        demo.ask(f"http://127.0.0.1:{free_ports(1)[0]}", USER, timeout_s=0.1)


def test_a_request_says_that_its_moment_is_not_known() -> None:
    """What only a service's callers know; a clock's values are left to the service."""
    features = (
        FeatureConfig(entity="context", name="page", type="category", per_candidate=True),
        FeatureConfig(entity="context", name="temperature", type="number"),
        FeatureConfig(entity="context", name="hour", type="cycle", clock="hour"),
    )
    cfg = Config.model_validate({"source": {"kind": "synthetic"}, "features": features})
    assert demo._unknown_context(cfg, 2) == {"page": [None, None], "temperature": None}
