"""Of whom a version's embeddings are, from partitions that have passed their gate."""

import pyarrow as pa
import pytest

from limaml.embeddings.published import PublishedEntities
from limaml.io.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


def write(storage, name, shops, *, passed=True):
    path = f"embeddings/kind=shop/version=3/{name}"
    storage.write_table(f"{path}.parquet", pa.table({"shop": shops, "support_size": [1] * len(shops)}))
    if passed:
        storage.write_json(f"{path}.json", {})


def test_each_day_brings_its_entities_and_a_partition_is_read_once(storage, monkeypatch):
    write(storage, "dt=2026-02-20/shard-000", ["b", "a"])
    write(storage, "dt=2026-02-20/planned", ["x"], passed=False)
    write(storage, "dt=2026-02-21/shard-000", ["y"], passed=False)
    published, reads, plain = PublishedEntities(storage, "shop", "3", "shop"), [], Storage.read_columns
    monkeypatch.setattr(Storage, "read_columns", lambda self, path, names: reads.append(path) or plain(self, path, names))
    assert [published.read(), published.read()] == [["a", "b"], ["a", "b"]]
    assert len(reads) == 1
    write(storage, "dt=2026-02-21/shard-000", ["c", "a"])
    assert published.read() == ["a", "b", "c"]
    write(storage, "dt=2026-02-21/shard-000", ["c", "longer than it"])
    assert published.read() == ["a", "b", "c", "longer than it"]
    assert len(reads) == 3
    assert PublishedEntities(storage, "shop", "4", "shop").read() == []
