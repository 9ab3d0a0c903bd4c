"""The service's `rank` for callers inside BentoML, who reach it without `serving.endpoint`."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from tests.polling import DEADLINE_S

NOW = datetime.now(UTC).replace(microsecond=0)
VECTOR = [2.0, -1.0, 0.5, 1.5]
CALL = f"""
import asyncio, json, sys, time
from serving.service import Ranking, Request

async def main(service):
    end = time.monotonic() + {DEADLINE_S}
    while not await service.__is_ready__():
        assert time.monotonic() < end, "no champion was loaded"
        await asyncio.sleep(0.02)
    ranked = await service.rank(Request.model_validate_json(sys.argv[1]))
    refused = await service.rank(Request.model_validate({{"user_id": "much", "item_ids": ["i1", "i99"]}}))
    print(json.dumps([ranked.model_dump(), refused.status_code, json.loads(refused.body)]))

service = Ranking.inner()
service.start()
asyncio.run(main(service))
service.stop()
"""


@pytest.fixture(scope="module")
def answers(make_world, tmp_path_factory):
    """The world, its champion, and what came of a good and a bad request."""
    world = make_world(tmp_path_factory.mktemp("in-process"))
    world.build()
    version = world.register(seed=1, slot="blue", complete_through=NOW - timedelta(days=1))
    world.publish("blue", version, {"much": VECTOR}, as_of=NOW - timedelta(days=1))
    world.registry.set_champion(version)
    config = world.folder / "config.json"
    config.write_text(world.cfg.model_dump_json())
    request = {"user_id": "much", "item_ids": ["i1", "i7", "i2"], "context": {"hour": 12}}
    environment = {
        **os.environ,
        "LIMAML_CONFIG": str(config),
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics")),
    }
    run = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps(request)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return world, version, *json.loads(run.stdout.splitlines()[-1])


def test_it_is_answered_as_over_http(answers):
    world, version, ranked, _, _ = answers
    assert ranked["model_version"] == version
    assert ranked["embeddings"]["user"]["fallback"] is None
    scores = {entry["item_id"]: entry["score"] for entry in ranked["items"]}
    assert scores == pytest.approx(world.expected(version, "much", ["i1", "i7", "i2"], VECTOR), abs=1e-6)
    assert list(scores) == sorted(scores, key=scores.get, reverse=True)


def test_a_refusal_has_the_same_shape(answers):
    _, _, _, status, body = answers
    assert (status, body["error"]["field"], body["error"]["value"]) == (400, "item_ids.1", "i99")
