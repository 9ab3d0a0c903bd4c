"""Every item once: what is stored, what is encoded anew, what a changed text does, and what keeps the first vectors."""

import json
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import structlog

from limaml.config import Config
from limaml.errors import ConfigError, DataError, NothingToDo
from limaml.events import embedded
from limaml.io.storage import Storage
from limaml.transfer import embed_items as module
from limaml.transfer.bert import BertEncoder
from limaml.transfer.embed_items import embed_items

TODAY = date(2026, 3, 2)
TITLES = {"i1": "Toy Story", "i2": "Heat", "i3": "The War", "i4": "Heat", "i5": None}


class Shop:
    """A delivery in `source`, an encoder in `tiny`, vectors below `data`."""

    def __init__(self, folder):
        self.folder = folder
        self.declared = {"width": 12, "encoder": "films 1", "licence": "MIT"}
        self.transfer = {"provider": "folder", "path": str(folder / "tiny"), "template": "{title}.", "batch_items": 2}
        (folder / "tiny" / "encoder.json").write_text('{"name": "films", "version": "1", "licence": "MIT"}')
        self.deliver(TITLES)

    @property
    def cfg(self):
        vector = {"entity": "item", "name": "meaning", "type": "vector"} | self.declared
        source = {"kind": "parquet", "path": str(self.folder / "source")}
        storage = {"root": str(self.folder / "data")}
        transfer = [{"feature": "meaning"} | self.transfer]
        return Config.model_validate({"source": source, "storage": storage, "features": [vector], "transfer": transfer})

    def deliver(self, titles, **more):
        (self.folder / "source").mkdir(exist_ok=True)
        items = pa.table({"item_id": list(titles), "title": pa.array(titles.values(), pa.string())} | more)
        pq.write_table(items, self.folder / "source" / "items.parquet")
        pq.write_table(pa.table({"user_id": ["u1"]}), self.folder / "source" / "users.parquet")

    def embed(self):
        self.said = embed_items(self.cfg, TODAY)
        assert self.said["status"] == "embedded"
        return self.said["features"]["meaning"]

    @property
    def vectors(self):
        table = embedded.read(Storage(self.cfg.storage.root), "meaning", "item_id", "vector")
        return dict(zip(table["item_id"].to_pylist(), table["vector"].to_pylist(), strict=True))

    @property
    def files(self):
        folder = self.folder / "data" / "embedded"
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def shop(tiny_bert, tmp_path):
    return Shop(tmp_path)


def test_every_item_has_the_vector_of_its_text_and_equal_texts_are_encoded_once(shop):
    assert shop.embed() == {"items": 5, "encoded": 3, "without": 1, "changed": 0}
    encoder, vectors = BertEncoder(shop.folder / "tiny"), shop.vectors
    assert vectors["i5"] is None
    for item in ("i1", "i2", "i3", "i4"):
        wanted = encoder.encode([f"{TITLES[item]}."])[0]
        assert np.abs(np.float32(vectors[item]) - wanted).max() < 1e-6, item  # What another batch's padding may change.
    assert vectors["i2"] == vectors["i4"]
    told = json.loads((shop.folder / "data" / "embedded" / "meaning" / "encoder.json").read_text())
    assert (told["name"], told["version"], told["licence"], told["digest"]) == ("films", "1", "MIT", encoder.origin.digest)


def test_again_there_is_nothing_to_do_and_nothing_is_written(shop):
    shop.embed()
    before = shop.files
    with pytest.raises(NothingToDo, match="all 5 items have their vectors"):
        shop.embed()
    assert shop.files == before


def test_the_same_items_give_the_same_bytes_in_parts_too(shop, monkeypatch):
    shop.embed()
    whole, once = shop.vectors, shop.files
    for path in sorted((shop.folder / "data").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    shop.embed()
    assert shop.files == once
    for path in (shop.folder / "data" / "embedded" / "meaning").iterdir():
        path.unlink()
    monkeypatch.setattr(module, "_PART_ITEMS", 2)
    assert shop.embed()["encoded"] == 3  # The second "Heat" is taken from the part before.
    assert len(shop.files) == 1 + 3
    assert list(shop.vectors) == list(whole)
    assert all(np.allclose(shop.vectors[item], whole[item], atol=1e-6) for item in whole if whole[item])


def test_only_a_new_item_is_encoded_and_one_with_a_known_text_not_even(shop):
    shop.embed()
    before, files = shop.vectors, shop.files
    shop.deliver(TITLES | {"i0": "Drama", "i6": "Heat"})
    assert shop.embed() == {"items": 2, "encoded": 1, "without": 0, "changed": 0}
    assert {item: shop.vectors[item] for item in before} == before
    assert shop.vectors["i6"] == before["i2"]
    assert {path: data for path, data in shop.files.items() if path in files} == files


def test_an_item_whose_text_changed_keeps_its_vector_and_is_named(shop):
    shop.embed()
    before = shop.vectors
    shop.deliver(TITLES | {"i2": "Heat, again", "i5": "No longer empty"})
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(NothingToDo, match=r": i2 \(meaning\), i5 \(m"),
    ):
        shop.embed()
    assert [log["first"] for log in logs if log["event"] == "changed_items_keep_their_vectors"] == [["i2", "i5"]]
    assert shop.vectors == before
    shop.deliver(TITLES | {"i2": "Heat, again", "i7": "Story"})
    assert shop.embed() == {"items": 1, "encoded": 1, "without": 0, "changed": 1}
    assert shop.said["first_changed"] == ["i2 (meaning)"]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"width": 11}, "width of meaning must be its encoder's, 12, got 11"),
        ({"encoder": "films 2"}, "encoder of meaning must be its encoder's, 'films 1', got 'films 2'"),
        ({"licence": "CC0"}, "licence of meaning must be its encoder's, 'MIT', got 'CC0'"),
    ],
)
def test_an_encoder_that_is_not_what_is_declared_makes_nothing(shop, declared, message):
    shop.declared |= declared
    with pytest.raises(ConfigError, match=message):
        shop.embed()
    assert not (shop.folder / "data" / "embedded").exists()


def test_another_encoder_is_refused_where_vectors_are(shop, change):
    shop.embed()
    change("config.json", layer_norm_eps=1e-6)
    shop.deliver(TITLES | {"i6": "Drama"})
    with pytest.raises(DataError, match=r"meaning must be made by what made its first vectors, films 1 .* a storage\.root of"):
        shop.embed()


def test_without_a_transfer_there_is_nothing_to_do_and_no_source_is_opened(shop):
    cfg = shop.cfg.model_copy(update={"transfer": (), "source": shop.cfg.source.model_copy(update={"path": "/nowhere"})})
    with pytest.raises(NothingToDo, match=r"no \[\[transfer\]\] is declared"):
        embed_items(cfg, TODAY)


def test_vectors_of_a_table_are_taken_over_and_what_is_not_finite_is_refused(shop):
    path = shop.folder / "posters.parquet"
    pq.write_table(pa.table({"item_id": ["i1", "i2"], "vector": [[1.0, 2.0], [3.0, 4.0]]}), path)
    shop.declared, shop.transfer = shop.declared | {"width": 2}, {"provider": "table", "path": str(path)}
    assert shop.embed() == {"items": 5, "encoded": 0, "without": 3, "changed": 0}
    assert (shop.vectors["i1"], shop.vectors["i3"]) == ([1.0, 2.0], None)
    pq.write_table(pa.table({"item_id": ["i1", "i2", "i8"], "vector": [[1.0, 2.0], [3.0, 5.0], [0.0, float("nan")]]}), path)
    shop.deliver(TITLES | {"i8": "Drama"})
    with pytest.raises(DataError, match=r"meaning must be 2 finite numbers of every item, got .* for item_id i8"):
        shop.embed()
    shop.deliver(TITLES | {"i9": "Drama"})
    assert shop.embed() == {"items": 1, "encoded": 0, "without": 1, "changed": 1}
    assert shop.said["first_changed"] == ["i2 (meaning)"]
    assert shop.vectors["i2"] == [3.0, 4.0]


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        ([{"feature": "mood"}], r"one of \['meaning'\] each, got \['mood'\]; declare mood in"),
        ([{"feature": "meaning"}] * 2, r"got \['meaning', 'meaning'\]; .* and make it once"),
    ],
)
def test_what_is_made_must_be_declared_once(shop, transfer, message):
    values = shop.cfg.model_dump()
    values["transfer"] = [{"provider": "minilm", "template": "{title}"} | each for each in transfer]
    with pytest.raises(ValueError, match=message):
        Config.model_validate(values)
