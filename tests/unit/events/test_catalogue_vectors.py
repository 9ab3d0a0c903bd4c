"""Vectors of items: declared, cast, gated, and kept once an item, whatever is delivered later."""

from datetime import date

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from limaml import schema
from limaml.config import FeatureConfig
from limaml.errors import DataError
from limaml.events import catalogue, gates
from limaml.events.casting import with_types
from limaml.io.storage import Storage

VECTOR = {"entity": "item", "name": "text", "type": "vector", "width": 3, "encoder": "hashes-1", "licence": "MIT"}
FEATURES = (
    FeatureConfig(entity="item", name="kind", type="category"),
    FeatureConfig(**VECTOR),
    FeatureConfig(entity="item", name="item_events", type="number", aggregate="count"),
)
TABLES = schema.tables(FEATURES)
KIND = catalogue.kinds(TABLES)["item"]
FIRST, NEXT = date(2026, 1, 1), date(2026, 1, 2)


def _items(vectors, kind=None):
    kind = kind or pa.list_(pa.float32(), 3)
    ids, values = list(vectors), list(vectors.values())
    return pa.table({"item_id": ids, "kind": ["a"] * len(ids), "text": pa.array(values, kind)})


def _judge(vectors, kind):
    table, _ = catalogue.declared(KIND, TABLES, _items(vectors, kind))
    return gates.check_catalogue(table, KIND.delivered)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"width": None}, "a vector must be of an item and have width, encoder and licence; got the vector text of item"),
        ({"encoder": " "}, "must be of an item and have width, encoder and licence"),
        ({"licence": ""}, "must be of an item and have width, encoder and licence"),
        ({"entity": "user"}, "must be of an item and have width, encoder and licence; got the vector text of user"),
        ({"width": 0}, "greater than or equal to 1"),
        ({"width": 4097}, "less than or equal to 4096"),
        ({"aggregate": "count"}, "an aggregate must be a number"),
        ({"minimum": 0.0}, "minimum and maximum must be of a number"),
        ({"values": ("a",)}, "values must be of a category"),
        ({"type": "number"}, "width, encoder, licence and attribution must be of a vector; got the number text of item"),
    ],
)
def test_a_declaration_that_cannot_be(change, rule):
    FeatureConfig(**VECTOR)
    with pytest.raises(ValidationError, match=rule):
        FeatureConfig(**VECTOR | change)


def test_a_vector_is_delivered_and_in_no_table_that_is_copied():
    assert KIND.delivered.names == ("item_id", "kind", "text")
    assert KIND.delivered.arrow.field("text").type == pa.list_(pa.float32(), 3)
    assert KIND.delivered.arrow.field("text").nullable
    for table in (KIND.catalogue, KIND.snapshots, TABLES.logged_events):
        assert "text" not in table.names
    assert TABLES.names("item") == ("kind", "item_events")
    assert " text:" not in str(TABLES.request_log.arrow)


@pytest.mark.parametrize("of", [pa.float16(), pa.float32(), pa.float64(), pa.int64()])
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda of: pa.list_(of, 3)])
def test_lists_of_numbers_become_vectors(kind, of):
    values = {"a": [np.float16(1), np.float16(2), np.float16(3)], "b": None, "c": [np.float16(0)] * 3}
    if of != pa.float16():
        values = {key: None if value is None else [int(x) for x in value] for key, value in values.items()}
    table = with_types(_items(values, kind(of)), KIND.delivered)
    assert table.schema.field("text").type == pa.list_(pa.float32(), 3)
    assert table["text"].to_pylist() == [[1.0, 2.0, 3.0], None, [0.0, 0.0, 0.0]]
    assert gates.check_catalogue(table, KIND.delivered).success


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_of_lists_becomes_vectors(kind):
    texts = pa.chunked_array([pa.array(["[1, 2.5,-3e0]", None]), pa.array([" [0.1, 0 ,0.25] "])]).cast(kind)
    table = pa.table({"item_id": ["a", "b", "c"], "kind": ["a"] * 3, "text": texts})
    assert with_types(table, KIND.delivered)["text"].to_pylist() == [[1.0, 2.5, -3.0], None, [np.float32(0.1), 0.0, 0.25]]


def test_text_of_another_width_or_of_no_number_is_refused():
    assert "item_id b: 2 numbers" in _judge({"a": "[1, 2, 3]", "b": "[1, 2]"}, pa.string()).explain()
    assert "item_id a: nan at place 1" in _judge({"a": "[1, nan, 3]"}, pa.string()).explain()
    for text in ("[1, two, 3]", "[]", "1, 2, 3", "[[1, 2, 3]]", "[1,,3]"):
        assert _judge({"a": text}, pa.string()).failed == ("expect_column_values_to_be_of_type(text)",), text


def test_another_width_is_refused_with_its_item():
    result = _judge({"a": [1.0, 2.0, 3.0], "b": [1.0], "c": None, "d": [1.0] * 4}, pa.list_(pa.float64()))
    assert result.failed == ("vector_width_to_be(text)",)
    assert "width 3 [2 rows, e.g. item_id b: 1 numbers, item_id d: 4 numbers]" in result.explain()
    fixed = _judge({"a": [1.0, 2.0]}, pa.list_(pa.float32(), 2))
    assert "item_id a: 2 numbers" in fixed.explain()


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float64(), 3)])
def test_a_number_that_is_not_finite_is_refused_with_its_place(kind):
    vectors = {"a": None, "b": [1.0, 2.0, float("nan")], "c": [1.0, 2.0, 3.0], "d": [0.0, -float("inf"), float("nan")]}
    result = _judge(vectors | {"e": [1.0, None, 2.0]}, kind)
    assert result.failed == ("vector_values_to_be_finite(text)",)
    assert (
        "[3 rows, e.g. item_id b: nan at place 2, item_id d: -inf at place 1, item_id e: None at place 1]" in result.explain()
    )


def test_a_double_that_no_float_holds_is_refused():
    assert "item_id a: inf at place 1" in _judge({"a": [0.0, 1e300, 1.0]}, pa.list_(pa.float64())).explain()


def test_what_is_no_list_of_numbers_is_refused_by_its_type():
    result = _judge({"a": "0.1 0.2 0.3"}, pa.string())
    assert result.failed == ("expect_column_values_to_be_of_type(text)",)
    assert "string" in result.explain()


def test_vectors_are_kept_once_and_new_items_come_every_day(tmp_path):
    storage = Storage(str(tmp_path))
    first = _items({"b": [1.0, 2.0, 3.0], "a": None})
    assert catalogue.record(storage, KIND, first, FIRST)
    catalogue.require_same_vectors(storage, KIND, first)
    assert not catalogue.record(storage, KIND, first, FIRST)
    # b is no longer delivered, and c is new.
    second = _items({"c": [4.0, 5.0, 6.0], "a": None})
    catalogue.require_same_vectors(storage, KIND, second)
    catalogue.record(storage, KIND, second, NEXT)
    assert catalogue.read(storage, "item").column_names == ["item_id", "kind"]
    assert catalogue.read(storage, "item")["item_id"].to_pylist() == ["a", "c"]
    assert "text" not in catalogue.history(storage, KIND).column_names
    kept = catalogue.item_vectors(storage, TABLES)
    assert kept.schema.equals(TABLES.item_vectors.arrow)
    assert kept.to_pylist() == [
        {"item_id": "a", "text": None},
        {"item_id": "b", "text": [1.0, 2.0, 3.0]},
        {"item_id": "c", "text": [4.0, 5.0, 6.0]},
    ]
    assert storage.list("catalogue_vectors/item") == ["dt=2026-01-01.parquet", "dt=2026-01-02.parquet"]


@pytest.mark.parametrize(
    ("vectors", "found"),
    [
        ({"a": [1.0, 2.0, 3.5], "b": None, "c": [0.0, 1.0, 0.0]}, r"got 3\.5 instead of 3 at place 2 for item_id a \(1 items"),
        ({"c": [9.0, 0.0, 0.0], "a": [9.0, 0.0, 0.0]}, r"got 9 instead of 1 at place 0 for item_id a \(2 items"),
        ({"b": [1.0, 2.0, 3.0]}, "got a vector where it had none for item_id b"),
        ({"b": [0.0, 0.0, 0.0]}, "got a vector where it had none for item_id b"),
        ({"c": None}, "got no vector where it had one for item_id c"),
    ],
)
def test_a_vector_of_a_known_item_does_not_change(tmp_path, vectors, found):
    storage = Storage(str(tmp_path))
    catalogue.record(storage, KIND, _items({"c": [0.0, 1.0, 0.0], "b": None, "a": [1.0, 2.0, 3.0]}), FIRST)
    with pytest.raises(DataError, match=found):
        catalogue.require_same_vectors(storage, KIND, _items(vectors))


def test_other_vectors_have_another_digest_and_later_ones_do_not_count(tmp_path):
    """What a model was trained with: the fingerprint of a training has it."""
    one, other = Storage(str(tmp_path / "one")), Storage(str(tmp_path / "other"))
    catalogue.record(one, KIND, _items({"a": [1.0, 2.0, 3.0], "b": None}), FIRST)
    catalogue.record(other, KIND, _items({"a": [1.0, 2.0, 3.5], "b": None}), FIRST)
    before = catalogue.vectors_digest(one, TABLES, FIRST)
    assert before != catalogue.vectors_digest(other, TABLES, FIRST)
    catalogue.record(one, KIND, _items({"c": [4.0, 5.0, 6.0]}), NEXT)
    assert catalogue.vectors_digest(one, TABLES, FIRST) == before != catalogue.vectors_digest(one, TABLES, NEXT)
    assert catalogue.vectors_digest(one, schema.tables(FEATURES[:1]), NEXT) is None


def test_without_a_vector_nothing_of_it_is_there(tmp_path):
    tables = schema.tables(FEATURES[:1])
    kind, storage = catalogue.kinds(tables)["item"], Storage(str(tmp_path))
    items = _items({"a": None}).drop_columns("text")
    catalogue.require_same_vectors(storage, kind, items)
    catalogue.record(storage, kind, items, FIRST)
    assert catalogue.item_vectors(storage, tables) is None
    assert storage.list("catalogue_vectors") == []
