"""The benchmark of publishing runs as it stands, and itself checks that Feast serves the rows it has counted."""

from typing import Any

import pyarrow as pa
import pytest

from benchmarks import publish as benchmark

STORES = ["sqlite", pytest.param("redis", marks=pytest.mark.services)]


@pytest.mark.parametrize("store", STORES)
def test_it_measures_each_path(store: benchmark.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TABLE_ROWS", 400)
    result = benchmark.measure(store, 1000)
    assert (result["store"], result["rows"]) == (store, 1000)
    speeds = [
        result[f"{name}rows_per_s{over}"] for name, over in [("", ""), ("", "_over_existing"), ("require_published_", "")]
    ]
    # Far below any real speed: a division by the wrong thing, or nothing done, would show.
    assert all(10 < speed < 1_000_000 for speed in speeds)


def test_its_rows_are_the_same_each_time_and_differ_by_version() -> None:
    first, again = (pa.concat_tables(benchmark.tables(5, "1")) for _ in range(2))
    assert first.equals(again)
    assert first["user_id"].to_pylist() == sorted(first["user_id"].to_pylist())
    assert not first["embedding"].equals(pa.concat_tables(benchmark.tables(5, "2"))["embedding"])


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(RuntimeError, match="redis-server must be installed for this benchmark: apt-get install redis-server"),
        benchmark.redis_server(tmp_path),
    ):
        pass
