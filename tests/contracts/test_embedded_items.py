"""Vectors that are made here, from the catalogue's text to a trained model: what is read is what was encoded.

The encoder is the packaged one. A world is generated; a delivery grows by an item, and its texts change.
"""

from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml import schema
from limaml.errors import DataError, NothingToDo
from limaml.events import catalogue
from limaml.events.check import check
from limaml.events.ingest import ingest_day, ingest_history
from limaml.events.logged import read_logged
from limaml.events.synthetic import SyntheticSource
from limaml.features.feature_store import apply
from limaml.governance import card
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.training.candidate import BUNDLE
from limaml.transfer.bert import minilm
from limaml.transfer.embed_items import embed_items
from tests import declared
from tests.contracts import small_world

TODAY = date(2026, 3, 2)
VECTOR = {"entity": "item", "name": "meaning", "type": "vector", "width": 384}
VECTOR |= {"encoder": "all-MiniLM-L6-v2 0.1.0", "licence": "Apache-2.0"}
TRANSFER = {"feature": "meaning", "provider": "minilm", "template": "{title}: {genres}"}


class World:
    """A delivery of generated days as files."""

    def __init__(self, folder):
        cfg = small_world.config_of(folder)
        source = SyntheticSource(cfg.source, TODAY - timedelta(days=cfg.source.synthetic_days) - date(2000, 1, 3))
        self.folder, self.days, (users, self.items) = folder, source.days(), source.catalogue()
        for day in self.days:
            if (table := source.read_day(day)) is not None:
                self.write(f"events/dt={day}/part.parquet", table)
        self.write("users.parquet", users)
        self.deliver(self.items)
        values = cfg.model_dump() | {"features": [*declared.FEATURES, VECTOR], "transfer": [TRANSFER]}
        values["source"] |= {"kind": "parquet", "path": str(folder / "delivered")}
        self.cfg = type(cfg).model_validate(values)
        self.storage, self.tables = Storage(self.cfg.storage.root), schema.tables(self.cfg.features)

    def write(self, name, table):
        path = self.folder / "delivered" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)

    def deliver(self, items):
        self.write("items.parquet", items)

    @property
    def vectors(self):
        found = catalogue.item_vectors(self.storage, self.tables)
        return dict(zip(found["item_id"].to_pylist(), found["meaning"].to_pylist(), strict=True))

    @property
    def files(self):
        return {path: self.storage.read_bytes(path) for path in self.storage.walk("embedded")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("embedded"))


def test_nothing_is_ingested_before_items_have_their_vectors(world):
    apply(world.cfg)
    assert any("run limaml embed-items" in line for line in check(world.cfg, TODAY).wrong)
    with pytest.raises(DataError, match=r"meaning must have been made of every item .*; run limaml embed-items"):
        ingest_history(world.cfg, world.days[-2], TODAY)
    assert not world.storage.list("days")


def test_what_is_trained_on_is_what_was_encoded(world):
    assert embed_items(world.cfg, TODAY)["features"]["meaning"]["items"] == world.items.num_rows
    assert not check(world.cfg, TODAY).wrong
    ingest_history(world.cfg, world.days[-2], TODAY)
    encoder, rows = minilm(), world.items.to_pylist()
    wanted = {row["item_id"]: encoder.encode([f"{row['title']}: {', '.join(row['genres'])}"])[0] for row in rows}
    vectors = world.vectors
    assert vectors.keys() == wanted.keys()
    assert max(np.abs(np.float32(vectors[item]) - wanted[item]).max() for item in wanted) < 1e-6
    assert "meaning" not in read_logged(world.storage, world.tables, through=world.days[-2]).column_names
    version = bundle.load(small_world.train(world.cfg, world.days[-2], world.folder / "candidate") / BUNDLE)
    [said], trained = version.card["made_of"]["encoders"], version.refit
    assert (said["encoder"], said["digest"], said["licence"]) == (VECTOR["encoder"], encoder.origin.digest, VECTOR["licence"])
    assert f"    digest {encoder.origin.digest}" in list(card.lines(version.card))
    table = trained.encoder.with_items(catalogue.item_vectors(world.storage, world.tables)).item_table
    assert table.width >= 384
    numbers = table.encoded[table.rows(pa.array(["i0", "i1", "nobody"]))]
    assert numbers[0].any()
    assert not np.allclose(numbers[0], numbers[1])
    assert not numbers[2].any()


def test_again_nothing_is_done_and_nothing_is_written(world):
    before = world.files
    with pytest.raises(NothingToDo, match=f"all {world.items.num_rows} items have their vectors"):
        embed_items(world.cfg, TODAY)
    assert world.files == before


def test_an_item_that_comes_later_gets_its_own_and_a_changed_text_changes_no_vector(world):
    before, items = world.vectors, world.items.to_pylist()
    grown = [*items, items[0] | {"item_id": "new", "title": "A film that nobody saw"}]
    grown[3] |= {"title": "Under another title"}
    world.deliver(pa.Table.from_pylist(grown, schema=world.items.schema))
    with pytest.raises(DataError, match="for item_id new and 0 others"):
        ingest_day(world.cfg, world.days[-1], TODAY)
    found = embed_items(world.cfg, TODAY)
    assert found["features"]["meaning"] == {"items": 1, "encoded": 1, "without": 0, "changed": 1}
    assert found["first_changed"] == ["i3 (meaning)"]
    assert ingest_day(world.cfg, world.days[-1], TODAY)["status"] == "ingested"
    vectors = world.vectors
    wanted = minilm().encode([f"A film that nobody saw: {', '.join(items[0]['genres'])}"])[0]
    assert np.abs(np.float32(vectors.pop("new")) - wanted).max() < 1e-6
    assert vectors == before
