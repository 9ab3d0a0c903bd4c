"""Vectors that were made come with the delivered catalogue, or ingestion is stopped with the remedy."""

import pyarrow as pa
import pytest

from limaml.config import Config
from limaml.errors import DataError
from limaml.events import embedded
from limaml.io.storage import Storage

VECTOR = {
    "entity": "item",
    "name": "text",
    "type": "vector",
    "column": "meaning",
    "width": 2,
    "encoder": "e 1",
    "licence": "MIT",
}


@pytest.fixture
def cfg(tmp_path):
    transfer = [{"feature": "text", "provider": "minilm", "template": "{title}"}]
    storage = Storage(str(tmp_path))
    rows = [("a", [1.0, 2.0]), ("b", None), ("7", [3.0, 4.0])]
    for number, (item, vector) in enumerate(rows):
        part = pa.table([[item], [bytes(32)], pa.array([vector], pa.list_(pa.float32()))], schema=embedded.ITEMS)
        storage.write_table(embedded.part_path("text", number), part)
    return Config.model_validate(
        {
            "source": {"kind": "synthetic"},
            "storage": {"root": str(tmp_path)},
            "features": [VECTOR],
            "transfer": transfer,
        }
    )


def test_every_item_gets_the_vector_it_was_made(cfg):
    items = pa.table({"item_id": ["b", "a", "b"]})
    assert embedded.with_embedded(cfg, items)["meaning"].to_pylist() == [None, [1.0, 2.0], None]
    numbered = embedded.with_embedded(cfg, pa.table({"item_id": [7]}))
    assert numbered["meaning"].to_pylist() == [[3.0, 4.0]]
    assert numbered["item_id"].to_pylist() == [7]


def test_an_item_that_was_not_looked_at_stops_it_with_the_remedy(cfg):
    with pytest.raises(DataError, match=r"text must have been made .* for item_id c and 1 others; run limaml embed-items"):
        embedded.with_embedded(cfg, pa.table({"item_id": ["a", "c", "d"]}))


def test_a_column_that_is_delivered_as_well_is_refused(cfg):
    with pytest.raises(DataError, match=r"meaning must not be a column of the delivered items, because .* makes text, got one"):
        embedded.with_embedded(cfg, pa.table({"item_id": ["a"], "meaning": [[1.0, 2.0]]}))


def test_what_the_gate_refuses_is_left_to_it(cfg):
    for items in (pa.table({"id": ["a"]}), pa.table({"item_id": [0.5]})):
        assert embedded.with_embedded(cfg, items) is items


def test_without_a_transfer_a_catalogue_is_as_it_was(cfg):
    items = pa.table({"item_id": ["c"]})
    assert embedded.with_embedded(cfg.model_copy(update={"transfer": ()}), items) is items
