"""The real service under 200 requests a second: while champions change, and when it is told to end.

Every version scores differently and has embeddings of its own in its slot, so that a response shows which block and which
embedding it was scored with. Some users have an embedding, one has none.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

NOW = datetime.now(UTC).replace(microsecond=0)
ITEMS = ["i1", "i3", "i5", "i7"]
USERS = ("much", "old", "nobody")
RATE_PER_S = 200
CLIENTS = 10
CUT_OVERS = 10
DWELL_S = 1.5
"""Between two cut-overs, half before it counts as undisturbed: some hundred requests."""
TOLERANCE = 1e-6


class Seen(NamedTuple):
    """One request: when it was due and when its answer was complete (seconds), and the answer, or why there is none."""

    user: str
    due_s: float
    done_s: float
    status: int
    body: dict
    failure: str

    @property
    def took_s(self):
        """From when it was due, so that what piles up behind a slow answer counts."""
        return self.done_s - self.due_s


class Load:
    """`load.py` in a process of its own, so that what the test does meanwhile does not hold the clients up."""

    def __init__(self, port):
        program = str(Path(__file__).with_name("load.py"))
        command = [sys.executable, program, str(port), str(RATE_PER_S), str(CLIENTS), ",".join(USERS), ",".join(ITEMS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stop(self):
        """All that was seen."""
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return [Seen(*json.loads(line)) for line in output.splitlines()]


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("load"))
    assert world.registry.champion() is None
    world.build()
    return world


def vectors(number):
    """Embeddings of the users that have one, other ones in every version."""
    return {"much": [2.0 - 0.3 * number, -1.0, 0.5, 1.5], "old": [-1.0, 1.0 + 0.2 * number, 1.0, -0.1 * number]}


def fill(world, number):
    """A version in the idle slot, which is ready to be cut over to."""
    slot = ("blue", "green")[number % 2]
    version = world.register(seed=number, slot=slot, complete_through=NOW - timedelta(days=1))
    world.publish(slot, version, vectors(number), as_of=NOW - timedelta(days=1))
    return version


@pytest.fixture(scope="module")
def server(world, start_server):
    server = start_server(world.cfg, world.folder)
    first = fill(world, 0)
    world.registry.set_champion(first)
    server.wait_until("/readyz", 200)
    return server


def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def test_no_request_notices_ten_cut_overs_and_a_roll_back(world, server, wait_until):
    numbers = {world.registry.champion().version: 0}
    load, switches, undisturbed = Load(server.port), [], []
    try:
        for number in range(1, CUT_OVERS + 1):
            version = fill(world, number)
            numbers[version] = number
            undisturbed.append(pause())
            switches.append(cut_over(world, server, version, wait_until))
        [previous] = [version for version, number in numbers.items() if number == CUT_OVERS - 1]
        undisturbed.append(pause())
        switches.append(cut_over(world, server, previous, wait_until))
    finally:
        seen = load.stop()
    failed = [(answer.status, answer.failure) for answer in seen if answer.status != 200]
    assert failed == []
    assert len(seen) > RATE_PER_S * DWELL_S * CUT_OVERS * 0.9, "the clients could not keep the rate"
    assert {answer.body["model_version"] for answer in seen} == set(numbers)
    wrong = [answer for answer in seen if not scored_as_it_says(world, numbers, answer)]
    assert wrong == []
    calm = [answer.took_s for answer in seen if any(start <= answer.due_s < end for start, end in undisturbed)]
    during = [answer.took_s for answer in seen if any(start <= answer.due_s < end for start, end in switches)]
    assert len(calm) > 1000
    assert len(during) > 200
    print(f"p99 {quantile(calm, 0.99) * 1e3:.1f} ms before, {quantile(during, 0.99) * 1e3:.1f} ms during a switch")
    assert quantile(during, 0.99) <= 3 * quantile(calm, 0.99)


def pause():
    """A while in which nothing happens; its start and end."""
    start = time.monotonic()
    threading.Event().wait(DWELL_S)
    return start, time.monotonic()


def cut_over(world, server, version, wait_until):
    """Point at a version and wait until it serves; the start and end of the change, with the time in which it is loaded."""
    start = time.monotonic()
    world.registry.set_champion(version)
    wait_until(lambda: server.ranked("much", ITEMS)["model_version"] == version, f"version {version}")
    return start, time.monotonic() + 0.1


_EXPECTED = {}


def scored_as_it_says(world, numbers, answer):
    """Whether the scores are the named version's, with its own embedding or, for a user without one, its prior."""
    version, user = answer.body["model_version"], answer.user
    vector = vectors(numbers[version]).get(user)
    if (version, user) not in _EXPECTED:
        _EXPECTED[version, user] = world.expected(version, user, ITEMS, vector)
    scores = {entry["item_id"]: entry["score"] for entry in answer.body["items"]}
    fallback = answer.body["embeddings"]["user"]["fallback"]
    expected = _EXPECTED[version, user]
    return fallback == (None if vector else "missing") and scores == pytest.approx(expected, abs=TOLERANCE)


def test_the_versions_can_be_told_apart(world):
    """Without this the test above could not fail."""
    found = [tuple(world.expected(version, user, ITEMS).values()) for version in world.networks for user in USERS]
    found += [
        tuple(world.expected(version, user, ITEMS, vectors(number)[user]).values())
        for number, version in enumerate(world.networks)
        for user in ("much", "old")
    ]
    for at, one in enumerate(found):
        for other in found[:at]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 100 * TOLERANCE


def test_told_to_end_it_answers_what_it_has_accepted(world, server):
    """The last test of this server."""
    load = Load(server.port)
    pause()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(20)
    ended_s = time.monotonic()
    seen = load.stop()
    assert [(answer.status, answer.failure) for answer in seen if answer.status != 200] == []
    assert len(seen) > RATE_PER_S * DWELL_S * 0.9
    assert max(answer.done_s for answer in seen) <= ended_s + 0.1
