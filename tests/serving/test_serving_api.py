"""Requests that must be refused, each with the field, the rule, the value and a remedy."""

import json

import pytest

from limaml import schema
from limaml.config import FeatureConfig
from serving.api import RequestError, parse_request, request_model
from serving.items import Items
from tests import declared

REQUEST = request_model(3, declared.TABLES)
GOOD = {"user_id": "u1", "item_ids": ["i1", "i2"], "context": {"hour": 23}}
# A context that no clock says: a number for all candidates, and a category of each.
SHOP = (
    FeatureConfig(entity="context", name="temperature", type="number", minimum=-60, maximum=60),
    FeatureConfig(entity="context", name="page", type="category", per_candidate=True),
)
IN_SHOP = {"user_id": "u1", "item_ids": ["i1", "i2"], "context": {"temperature": 3.5, "page": ["front", None]}}


def refused(body, request=REQUEST):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        parse_request(raw, request)
    assert caught.value.status == 400
    error = caught.value.body["error"]
    assert set(error) == {"field", "rule", "value", "remedy"}
    assert error["remedy"]
    json.dumps(error)
    return error["field"], error["rule"], error["value"]


def test_a_good_request_is_read():
    request = parse_request(json.dumps(GOOD).encode(), REQUEST)
    assert request.user_id == "u1"
    assert request.item_ids == ["i1", "i2"]
    assert request.context.hour == 23
    assert parse_request(b'{"user_id": "u1", "item_ids": ["i1"]}', REQUEST).context.hour is None


@pytest.mark.parametrize(
    ("change", "field", "rule", "value"),
    [
        ({"user_id": 7}, "user_id", "must be a valid string", 7),
        ({"user_id": ""}, "user_id", "must have at least 1 character", ""),
        ({"user_id": None}, "user_id", "must be a valid string", None),
        ({"item_ids": "i1"}, "item_ids", "must be a valid array", "i1"),
        ({"item_ids": [1]}, "item_ids.0", "must be a valid string", 1),
        ({"item_ids": []}, "item_ids", "must have at least 1 item", "list of 0"),
        ({"item_ids": ["a", "b", "c", "d"]}, "item_ids", "must have at most 3 items", "list of 4"),
        ({"item_ids": ["a", "b", "a"]}, "item_ids", "must name each item once", "a"),
        ({"context": {"hour": 24}}, "context.hour", "must be less than or equal to 23", 24),
        ({"context": {"hour": -1}}, "context.hour", "must be greater than or equal to 0", -1),
        ({"context": {"hour": "5"}}, "context.hour", "must be a valid integer", "5"),
        ({"context": {"hour": True}}, "context.hour", "must be a valid integer", True),
        ({"context": {"minute": 5}}, "context.minute", "is not a known field", 5),
        ({"context": None}, "context", "must be an object", None),
        ({"limit": 10}, "limit", "is not a known field", 10),
    ],
)
def test_wrong_fields_are_named(change, field, rule, value):
    assert refused({**GOOD, **change}) == (field, rule, value)


def test_a_missing_field_is_named():
    assert refused({"item_ids": ["i1"]}) == ("user_id", "is required", None)
    assert refused({"user_id": "u1"}) == ("item_ids", "is required", None)


@pytest.mark.parametrize(
    ("context", "field", "rule", "value"),
    [
        ({"page": ["front", None]}, "context.temperature", "is required", None),
        ({"temperature": None}, "context.page", "is required", None),
        ({"temperature": 61.0, "page": ["a", "b"]}, "context.temperature", "must be less than or equal to 60", "61.0"),
        ({"temperature": None, "page": "front"}, "context.page", "must be a valid array", "front"),
        ({"temperature": None, "page": ["front"]}, "context.page", "must have one value a candidate, 2", "list of 1"),
        ({"temperature": None, "page": ["a", "b", "c"]}, "context.page", "must have one value a candidate, 2", "list of 3"),
        ({"temperature": None, "page": []}, "context.page", "must have one value a candidate, 2", "list of 0"),
        ({"temperature": None, "page": ["a", 1]}, "context.page.1", "must be a valid string", 1),
    ],
)
def test_a_declared_context_must_be_said_and_fit_the_candidates(context, field, rule, value):
    request = request_model(3, schema.tables(SHOP))
    assert parse_request(json.dumps(IN_SHOP).encode(), request).context.page == ["front", None]
    assert refused({**IN_SHOP, "context": context}, request) == (field, rule, value)
    assert refused({name: IN_SHOP[name] for name in ("user_id", "item_ids")}, request) == ("context", "is required", None)


def test_a_body_that_is_no_json_object():
    field, rule, value = refused(b'{"user_id": ')
    assert (field, value) == ("(body)", None)
    assert rule.startswith("must be JSON: ")
    assert refused(b"[1, 2]")[:2] == ("(body)", "must be an object")
    assert refused(b"\xff\xfe")[0] == "(body)"
    assert refused(b"")[0] == "(body)"


def test_not_a_number_is_refused():
    assert refused(b'{"user_id": "u", "item_ids": ["a"], "context": {"hour": NaN}}')[0] == "context.hour"


def test_a_long_value_is_cut_in_the_answer():
    assert refused({**GOOD, "user_id": "x" * 1000})[2] == "x" * 100 + "…"
    assert refused({**GOOD, "item_ids": "x" * 101})[2] == "x" * 100 + "…"
    assert refused({**GOOD, "item_ids": "x" * 100})[2] == "x" * 100


def test_an_id_has_at_most_256_characters():
    longest = {"user_id": "u" * 256, "item_ids": ["i" * 256]}
    assert parse_request(json.dumps(longest).encode(), REQUEST).user_id == "u" * 256
    for field, change in (("user_id", {"user_id": "u" * 257}), ("item_ids.0", {"item_ids": ["i" * 257]})):
        assert refused({**GOOD, **change})[:2] == (field, "must have at most 256 characters")


def test_an_item_outside_the_catalogue_is_named():
    assert Items(catalogue=("i1", "i2")).find(["i2", "i1"]) == [1, 0]
    with pytest.raises(RequestError) as caught:
        Items(catalogue=("i1",)).find(["i1", "i2"])
    error = caught.value.body["error"]
    assert (caught.value.status, error["field"], error["value"]) == (400, "item_ids.1", "i2")
    assert error["rule"] == "must be in the catalogue"


def test_the_limit_stands_in_the_published_schema():
    items = REQUEST.model_json_schema()["properties"]["item_ids"]
    assert (items["minItems"], items["maxItems"]) == (1, 3)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"user_id": ' + b"[" * 50_000 + b"]" * 50_000 + b', "item_ids": ["a"]}',
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"user_id": "u\xff", "item_ids": ["a"]}',
        b'{"user_id": "u", "item_ids": ["\\ud800"]}',
        b'{"user_id": "u", "item_ids": ["a"], "context": {"hour": 1e999}}',
        b'{"user_id": "u", "item_ids": ["a"], "context": {"hour": 123456789012345678901234567890}}',
        b'{"user_id": "u", "item_ids": ["a"], "context": {"hour": Infinity}}',
    ],
    ids=["open", "deep list", "deep object", "not UTF-8", "lone surrogate", "huge", "long integer", "infinity"],
)
def test_what_json_cannot_or_must_not_say(body):
    field, rule, _ = refused(body)
    assert field
    assert rule
