"""Drawn requests by the OpenAPI page, valid and invalid, against the real service: whatever comes, it is no error of ours.

2,000 cases: by the page as it is, by the page with the world's items as the only ids (a drawn id is in no catalogue), and
against the page. Every answer is 200 or a refusal in our own shape.
"""

import copy
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def page(world, server):
    """The OpenAPI page of a service that has a champion."""
    world.build()
    version = world.register(seed=1, slot="blue", complete_through=NOW - timedelta(days=1))
    world.publish("blue", version, {"much": [2.0, -1.0, 0.5, 1.5]}, as_of=NOW - timedelta(days=1))
    world.registry.set_champion(version)
    server.wait_until("/readyz", 200)
    return server.client.get("/docs.json").json()


def with_known_items(page, world):
    page = copy.deepcopy(page)
    body = page["paths"]["/rank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body["properties"]["item_ids"] |= {"items": {"enum": world.items}, "uniqueItems": True}
    return page


@pytest.mark.parametrize(
    ("mode", "known_items", "cases", "must_come"),
    [
        (GenerationMode.POSITIVE, False, 600, {400}),
        (GenerationMode.POSITIVE, True, 600, {200}),
        (GenerationMode.NEGATIVE, False, 800, {400}),
    ],
    ids=["by the page", "by the page with known items", "against the page"],
)
def test_no_drawn_request_is_an_error_of_the_service(page, world, server, mode, known_items, cases, must_come):
    schema = schemathesis.openapi.from_dict(with_known_items(page, world) if known_items else page)
    codes, session = Counter(), requests.Session()
    session.trust_env = False

    # Derandomised, so that a case that fails fails again.
    @settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema["/rank"]["POST"].as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call(base_url=str(server.client.base_url), session=session)
        codes[response.status_code] += 1
        assert response.status_code in (200, 400, 415), (case.as_curl_command(), response.text)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"field", "rule", "value", "remedy"}

    with session:
        ask()
    assert must_come <= set(codes), codes
    assert codes.total() >= cases
