"""What earlier releases left on disk is read by this one: `tests/data/release-*`, made by `tools.release_data` in their time.

An archive is unpacked elsewhere than it was made, so the databases' absolute paths are moved first, as whoever moves an
installation would; everything else is as that release wrote it.
"""

import json
import sqlite3
import tarfile
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limaml import registry, schema
from limaml.config import Config, load
from limaml.embeddings import slot_state
from limaml.embeddings.daily import adapt_day, publish_day
from limaml.embeddings.publish import OnlineView
from limaml.errors import DataError
from limaml.events.day_store import EventStore
from limaml.events.ingest import ingest_day, ingest_history
from limaml.features.feature_store import apply, open_store
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.registry import Registry
from tools.release_data import ROOT, TODAY, scores

RELEASES = sorted((Path(__file__).parents[1] / "data").glob("release-*"))
_MOVED = {"experiments": "artifact_location", "runs": "artifact_uri", "model_versions": "source"}


@dataclass
class Installation:
    """One release's, unpacked; `expected` is what it said of itself."""

    root: Path
    cfg: Config
    expected: dict[str, Any]

    @property
    def storage(self) -> Storage:
        return Storage(self.cfg.storage.root)

    def day(self, name: str) -> date:
        return date.fromisoformat(self.expected[name])


@pytest.fixture(scope="module", params=RELEASES, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    release, root = request.param, tmp_path_factory.mktemp("installation")
    expected = json.loads((release / "expected.json").read_text())
    with tarfile.open(release / "installation.tar.xz") as archive:
        archive.extractall(root, filter="data")
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        for table, column in _MOVED.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (expected["made_in"], str(root)))
        database.commit()
    path = root / "config.json"
    path.write_text(path.read_text().replace(ROOT, str(root)))
    return Installation(root, load(path), expected)


def test_there_is_data_of_a_release_and_it_is_small() -> None:
    assert [path.name for path in RELEASES][:1] == ["release-0.1"]
    assert sum(path.stat().st_size for release in RELEASES for path in release.iterdir()) < 2**20


def test_its_bundle_is_read_and_scores_what_it_scored(old: Installation, tmp_path: Path) -> None:
    folder = Registry(old.cfg.registry).download(old.expected["version"], tmp_path)
    found = bundle.load(folder)
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == old.expected["bundle_format"]
    now = scores(old.cfg, found.refit, old.day("complete_day"))
    assert now.keys() == old.expected["scores"].keys()
    # Contract 7's bound: another machine's kernels may sum in another order.
    np.testing.assert_allclose(list(now.values()), [old.expected["scores"][event] for event in now], atol=1e-5, rtol=0)


def test_its_store_is_read_and_its_days_are_found_unchanged(old: Installation) -> None:
    days = EventStore(old.storage).manifests()
    assert max(days) == old.day("complete_day")
    result = ingest_history(old.cfg, max(days), TODAY)
    assert (result["status"], result["ingested"], result["unchanged"]) == ("unchanged", 0, len(days))


def test_its_online_rows_are_read_and_a_day_is_taken_in_on_top_of_them(old: Installation) -> None:
    """Registry, online store, snapshots, partitions and lease: one more day goes through all of them."""
    champion = Registry(old.cfg.registry).champion()
    assert champion is not None
    assert (champion.version, slot_state.complete_day(champion)) == (old.expected["version"], old.day("complete_day"))
    name = schema.embedding_view("user", champion.tags[registry.SLOT])
    folder = f"embeddings/kind=user/version={champion.version}/dt={old.expected['complete_day']}"
    view = OnlineView(open_store(old.cfg), name)
    for shard in range(old.cfg.embeddings.num_shards):
        table = old.storage.read_table(f"{folder}/shard-{shard:03d}.parquet")
        assert view.read(view.keys(table)) == view.rows(table)

    apply(old.cfg)  # the registry names the files of the place that it was made in
    day = old.day("next_day")
    assert ingest_day(old.cfg, day, TODAY)["status"] == "ingested"
    adapt_day(old.cfg, day)
    assert publish_day(old.cfg, day, "a run")["written"] > 0
    champion = Registry(old.cfg.registry).champion()
    assert champion is not None
    assert slot_state.complete_day(champion) == day


@pytest.mark.parametrize(
    ("found", "remedy"),
    [(2, "update limaml to read it"), (0, "ingest the history into a new storage.root"), ("x", "ingest the")],
)
def test_a_store_of_another_format_is_refused_with_the_remedy(tmp_path: Path, found: object, remedy: str) -> None:
    storage = Storage(str(tmp_path))
    storage.write_json("format.json", {"format_version": found})
    with pytest.raises(DataError, match=rf"format\.json: format_version must be 1, got {found}; {remedy}"):
        EventStore(storage).manifests()


def test_a_new_store_says_its_format(tmp_path: Path) -> None:
    EventStore(Storage(str(tmp_path))).record_no_data(date(2026, 1, 5))
    assert Storage(str(tmp_path)).read_json("format.json") == {"format_version": 1}
