"""Files on a local disk or an object store, written whole or not at all.

Paths are strings or URLs under one root; local writes go to a temporary name and are renamed.
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from limaml.errors import DataError
from limaml.io import atomic

_ROW_GROUP_ROWS = 65_536
"""Rows a row group of a file that is written in a stream: what a reader must hold at once."""
_NO_FOOTER = "Parquet magic bytes not found in footer"
_READ_BUFFER_BYTES = 1 << 20
"""A column's pages are read in pieces of this size, not a whole row group at once."""

_NUM_WRITERS = 4


def each_in_threads(write: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Call `write` for every item, a few at a time: one compresses while another waits for its disk or store.

    The first error ends it: what has begun is finished, nothing more is begun.
    """
    with ThreadPoolExecutor(_NUM_WRITERS, thread_name_prefix="write") as pool:
        for _ in pool.map(write, items):
            pass


@contextmanager
def whole_files(remedy: str) -> Iterator[None]:
    """Raises DataError with the remedy where a Parquet file that the block reads was cut short: Arrow says so, or duckdb."""
    try:
        yield
    except Exception as error:
        if _NO_FOOTER not in str(error):
            raise
        raise DataError(f"{error} {remedy}") from error


def absolute(root: str) -> str:
    """A folder or URL that means the same from every working directory."""
    return root if "://" in root else os.path.abspath(root)


class Storage:
    """A root folder or URL; every path given to a method is relative to it."""

    def __init__(self, root: str) -> None:
        self.root = root
        if "://" in root:
            self._fs, self._base = fs.FileSystem.from_uri(root)
        else:
            self._fs, self._base = fs.LocalFileSystem(), os.path.abspath(root)
        self._local = isinstance(self._fs, fs.LocalFileSystem)

    def path(self, relative: str) -> str:
        """Absolute path or URL of `relative`, as other tools (duckdb, Feast) read it; what follows a URL's `?` stays last."""
        if self._local:
            return f"{self._base}/{relative}"
        folder, mark, options = self.root.partition("?")
        return f"{folder.rstrip('/')}/{relative}{mark}{options}"

    def exists(self, relative: str) -> bool:
        return bool(self._info(relative).type != fs.FileType.NotFound)

    def is_folder(self, relative: str) -> bool:
        return bool(self._info(relative).type == fs.FileType.Directory)

    def list(self, relative: str) -> list[str]:
        """Names directly under a folder, sorted, but those hidden, which a killed writer leaves; empty if it does not exist."""
        selector = fs.FileSelector(f"{self._base}/{relative}", allow_not_found=True)
        names = (os.path.basename(info.path) for info in self._fs.get_file_info(selector))
        return sorted(name for name in names if not name.startswith("."))

    def read_bytes(self, relative: str) -> bytes:
        with self._fs.open_input_stream(f"{self._base}/{relative}") as stream:
            return bytes(stream.read())

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a whole file; a reader sees the old bytes or the new ones, never a part."""
        target = f"{self._base}/{relative}"
        self._fs.create_dir(os.path.dirname(target), recursive=True)
        if self._local:
            atomic.write(target, data)
            return
        # An object store shows an object when its stream is closed, not from the first byte on.
        with self._fs.open_output_stream(target) as stream:
            stream.write(data)

    def read_json(self, relative: str) -> Any:
        return json.loads(self.read_bytes(relative))

    def write_json(self, relative: str, value: Any) -> None:
        self.write_bytes(relative, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def read_table(self, relative: str) -> pa.Table:
        """Read one Parquet file. Raises DataError if it is not readable Parquet."""
        try:
            return pq.read_table(pa.BufferReader(self.read_bytes(relative)))
        except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path(relative)} must be a readable Parquet file: {error}; write it again") from error

    def read_columns(self, relative: str, columns: Sequence[str]) -> pa.Table:
        """Those of these columns that a Parquet file has."""
        with self._fs.open_input_file(f"{self._base}/{relative}") as source, pq.ParquetFile(source) as file:
            return file.read([name for name in columns if name in file.schema_arrow.names])

    def num_rows(self, relative: str) -> int | None:
        """Rows of a Parquet file by its footer, which a file that was cut short has lost; None if there is no such file."""
        try:
            with self._fs.open_input_file(f"{self._base}/{relative}") as source:
                return int(pq.read_metadata(source).num_rows)
        except (FileNotFoundError, pa.ArrowInvalid):
            return None

    def write_table(self, relative: str, table: pa.Table) -> None:
        """Write one Parquet file; the same table gives the same bytes."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.write_bytes(relative, buffer.getvalue())

    def write_batches(self, relative: str, batches: pa.RecordBatchReader) -> int:
        """Write one Parquet file as its batches come; returns the number of rows. The same batches give the same bytes.

        The file appears whole, after the last batch; if the batches end in an error, what was there before stays.
        """
        target = f"{self._base}/{relative}"
        self._fs.create_dir(os.path.dirname(target), recursive=True)
        with self._replacing(target) as temporary, self._fs.open_output_stream(temporary) as stream:
            return _write_row_groups(stream, batches)

    def read_batches(self, relative: str, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Columns of one Parquet file, `batch_rows` rows at a time; strings come dictionary-encoded, lists of them too."""
        with self._fs.open_input_file(f"{self._base}/{relative}") as source:
            leaves = pq.read_metadata(source).schema
            strings = [leaf.path for leaf in map(leaves.column, range(len(leaves))) if str(leaf.logical_type) == "String"]
            # pre_buffer would keep all that was read until the file is closed.
            with pq.ParquetFile(source, read_dictionary=strings, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False) as file:
                yield from file.iter_batches(batch_rows, columns=list(columns), use_threads=False)

    def read_row_groups(self, relative: str) -> Iterator[pa.Table]:
        """A Parquet file's row groups, one at a time; one empty table if it has none."""
        with self._fs.open_input_file(f"{self._base}/{relative}") as source, pq.ParquetFile(source, pre_buffer=False) as file:
            groups = (file.read_row_group(number) for number in range(file.num_row_groups))
            yield from groups if file.num_row_groups else [file.schema_arrow.empty_table()]

    def dataset(self, relative: Sequence[str], schema: pa.Schema) -> ds.Dataset:
        """Parquet files as one lazily read dataset; columns are cast to `schema`. No file gives an empty dataset."""
        if not relative:
            return ds.dataset(schema.empty_table())
        paths = [f"{self._base}/{name}" for name in relative]
        return ds.dataset(paths, schema=schema, filesystem=self._fs, format="parquet")

    def scanner(
        self, relative: Sequence[str], schema: pa.Schema, column: str = "", span: tuple[str, str] | None = None
    ) -> ds.Scanner:
        """`dataset`, to be read once, in flat memory: a dataset reads files ahead, 1.3 GB of a span of 9.6 million rows.

        With `span`, only rows whose `column` lies in it, both ends included; row groups without any are not read.
        """
        within = None if span is None else (ds.field(column) >= span[0]) & (ds.field(column) <= span[1])
        options = ds.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=_READ_BUFFER_BYTES)
        return self.dataset(relative, schema).scanner(
            filter=within, batch_readahead=1, fragment_readahead=1, use_threads=False, fragment_scan_options=options
        )

    def move(self, source: str, target: str) -> None:
        absolute = f"{self._base}/{target}"
        self._fs.create_dir(os.path.dirname(absolute), recursive=True)
        self._fs.move(f"{self._base}/{source}", absolute)

    def delete(self, relative: str) -> None:
        """Delete a file that is there."""
        self._fs.delete_file(f"{self._base}/{relative}")

    def delete_dir(self, relative: str) -> None:
        if self.exists(relative):
            self._fs.delete_dir(f"{self._base}/{relative}")

    def walk(self, relative: str) -> Iterator[str]:
        """Relative paths of all files under a folder, sorted."""
        selector = fs.FileSelector(f"{self._base}/{relative}", recursive=True, allow_not_found=True)
        infos = sorted(self._fs.get_file_info(selector), key=lambda info: info.path)
        for info in infos:
            if info.type == fs.FileType.File:
                yield str(Path(info.path).relative_to(self._base))

    def stamps(self, relative: str) -> dict[str, str]:
        """Files under a folder that are not hidden, sorted, each with its size and the time it was written, in one listing."""
        selector = fs.FileSelector(f"{self._base}/{relative}", recursive=True, allow_not_found=True)
        infos = [info for info in self._fs.get_file_info(selector) if info.type == fs.FileType.File]
        visible = sorted((info for info in infos if not info.base_name.startswith(".")), key=lambda info: info.path)
        return {str(Path(info.path).relative_to(self._base)): f"{info.size} {info.mtime_ns}" for info in visible}

    @contextmanager
    def _replacing(self, target: str) -> Iterator[str]:
        """`atomic.replacing`, on an object store too: a stream is closed, and so shows what it has, even if its block fails."""
        if self._local:
            with atomic.replacing(target) as path:
                yield str(path)
            return
        temporary = str(atomic.hidden(target))
        try:
            yield temporary
            self._fs.move(temporary, target)
        except BaseException:
            if self._fs.get_file_info(temporary).type != fs.FileType.NotFound:
                self._fs.delete_file(temporary)
            raise

    def _info(self, relative: str) -> fs.FileInfo:
        return self._fs.get_file_info(f"{self._base}/{relative}")


def _write_row_groups(stream: Any, batches: pa.RecordBatchReader) -> int:
    # A dictionary pays where values repeat; of floats it would hold nearly all.
    values = {field: getattr(field.type, "value_type", field.type) for field in batches.schema}
    repeated = [_leaf(field) for field, of in values.items() if not pa.types.is_floating(of)]
    num_rows, group = 0, []
    with pq.ParquetWriter(stream, batches.schema, compression="zstd", use_dictionary=repeated) as writer:
        for batch in batches:
            group.append(batch)
            if sum(each.num_rows for each in group) >= _ROW_GROUP_ROWS:
                num_rows += _write_row_group(writer, group)
                group = []
        num_rows += _write_row_group(writer, group)
    return num_rows


def _leaf(field: pa.Field) -> str:
    """Parquet's name of what a column, or a list of it, holds."""
    nested = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
    return f"{field.name}.list.element" if nested else str(field.name)


def _write_row_group(writer: pq.ParquetWriter, group: list[pa.RecordBatch]) -> int:
    table = pa.Table.from_batches(group, writer.schema)
    if table.num_rows:
        writer.write_table(table, row_group_size=table.num_rows)
    return int(table.num_rows)
