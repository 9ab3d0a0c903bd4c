"""What Feast's duckdb offline store reads on a URL, read by Arrow: duckdb would download an extension for it."""

import fnmatch
from typing import Any

import ibis
import pyarrow.dataset as ds
from ibis.backends.duckdb import Backend

from limaml.errors import DataError
from limaml.io.storage import Storage


class UrlBackend(Backend):  # type: ignore[misc]
    """ibis' duckdb; a pattern of Parquet files on a URL may have what `storage.root` has behind its `?`."""

    def read_parquet(self, paths: Any, /, **options: Any) -> Any:
        return ibis.memtable(url_dataset(str(paths))) if "://" in str(paths) else super().read_parquet(paths, **options)


def url_dataset(url: str) -> ds.Dataset:
    """Parquet files that match a pattern as `Storage.path` makes one. Raises DataError if there are none."""
    pattern, mark, options = url.partition("?")
    root, _, folder = pattern[: pattern.index("*")].rpartition("/")[0].rpartition("/")
    storage = Storage(root + mark + options)
    names = fnmatch.filter(storage.walk(folder), pattern.removeprefix(f"{root}/"))
    if not names:
        raise DataError(f"{pattern} must match a Parquet file, but nothing was written there yet; run limaml ingest first")
    return storage.dataset(names, storage.read_table(names[0]).schema)
