"""Files that hold a table: a path, folder, pattern or URL of Parquet, CSV or JSON, and how duckdb reads them.

Names that begin with `.` or `_` are unfinished work, as for `parquet_source`. No extension of duckdb is loaded or fetched: URLs
are opened by fsspec and pyarrow.
"""

import fnmatch
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import duckdb
import fsspec
import pyarrow as pa
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from limaml.errors import ConfigError, DataError, StoreError

_FORMATS = {"parquet": "parquet", "csv": "csv", "tsv": "csv", "txt": "csv", "json": "json", "jsonl": "json", "ndjson": "json"}
_COMPRESSED = (".gz", ".zst")
_WANTED = "Parquet (.parquet), CSV (.csv, .tsv, .txt) or JSON (.json, .jsonl, .ndjson) files, these two also as .gz or .zst"
_ROUTE = "table+"
"""Before a URL: duckdb hands it to fsspec, instead of asking for an extension of its own."""
_LIMITS = {"memory_limit": "1GB", "preserve_insertion_order": False}
_OFFLINE = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}


class Table(Protocol):
    """What messages say of a table."""

    @property
    def setting(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def remedy(self) -> str: ...


@dataclass(frozen=True)
class TableFiles:
    """Files of one format, and what they are called in the configuration."""

    setting: str
    format: str
    paths: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.format.upper()

    @property
    def remedy(self) -> str:
        return "correct the files, or leave them out"

    @property
    def is_lazy(self) -> bool:
        """Whether a part can be read without the rest."""
        return self.format == "parquet"


def connect(folder: str) -> Any:
    """A connection in bounded memory, what does not fit in `folder`; it opens URLs, and its clock is UTC's."""
    connection = duckdb.connect(f"{folder}/tables.duckdb", config=_OFFLINE | _LIMITS | {"temp_directory": f"{folder}/sorted"})
    connection.execute("SET TimeZone = 'UTC'")
    connection.register_filesystem(_Remote())
    return connection


def find(setting: str, location: str) -> TableFiles:
    """The files that `location`, the value of `setting`, names. Raises DataError if there are none, or of two formats."""
    if not location:
        raise ConfigError(f"{setting} must name {_WANTED}, got ''; set it to a file, folder, pattern or URL")
    location = location.removeprefix("file://")
    paths = [path for path in _listed(location) if not _is_hidden(path, location)]
    formats = {path: form for path in paths if (form := _format(path))}
    if not formats:
        found = f"found only {', '.join(paths[:3])}" if paths else "found none"
        raise DataError(f"{setting} must name {_WANTED}, got {location!r}, {found}; correct the path or deliver the files")
    if len(set(formats.values())) > 1:
        examples = ", ".join({form: path for path, form in formats.items()}.values())
        raise DataError(
            f"{setting} must name files of one format, got {examples}; name one format with a pattern such as *.csv"
        )
    # The newest name first: its columns are those that a table has where files differ.
    names = sorted(formats, reverse=True)
    return TableFiles(setting, formats[names[0]], tuple(f"{_ROUTE}{name}" if _is_url(name) else name for name in names))


def relation(connection: Any, files: TableFiles, types: Mapping[str, str], decimal: str = ".", *, same: bool = False) -> str:
    """SQL that reads the files. `types` of columns override what duckdb guesses; `same`: all files have equal columns."""
    paths = "[" + ", ".join(literal(path) for path in files.paths) + "]"
    if files.format == "parquet":
        return f"read_parquet({paths}, union_by_name = {not same}, hive_partitioning = {'=' in ''.join(files.paths)})"
    if files.format == "csv":
        # All rows decide on a type: a number in the first thousands may be text later.
        options = f"union_by_name = true, sample_size = -1, decimal_separator = {literal(decimal)}"
        reader = f"read_csv({paths}, {options}"
        wanted = {n: t for n, t in types.items() if n in _names(connection, f"{reader})", files)} if types else {}
        return f"{reader}, types = {_struct(wanted)})" if wanted else f"{reader})"
    reader = f"read_json({paths}, union_by_name = true, sample_size = -1"
    wanted = {n: t for n, t in types.items() if n in _names(connection, f"{reader})", files)} if types else {}
    if not wanted:
        return f"{reader})"
    return f"{reader}, columns = {_struct(columns_of(connection, reader + ')', files) | wanted)})"


def columns_of(connection: Any, source: str, files: TableFiles) -> dict[str, str]:
    """Names and duckdb types of a relation's columns. Raises DataError or StoreError if its files cannot be read."""
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()  # noqa: S608  paths are quoted
    except duckdb.Error as error:
        raise unreadable(files, error) from error
    except OSError as error:
        raise StoreError(f"{files.setting} must be readable, got {files.paths[0]}: {error}; try again") from error
    return {name: str(kind) for name, kind, *_ in described}


def unreadable(table: Table, error: Exception) -> DataError:
    return DataError(f"{table.setting} must be readable {table.kind}: {told(error)}; {table.remedy}")


def told(error: Exception, limit: int = 300) -> str:
    """What duckdb says, without its picture of the statement, cut, on one line."""
    text = re.split(r"\n\s*\n?LINE \d+:", str(error))[0]
    text = re.sub(r"\s+", " ", text.replace(_ROUTE, "")).strip()
    return text if len(text) <= limit else f"{text[:limit]}…"


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _names(connection: Any, source: str, files: TableFiles) -> set[str]:
    return set(columns_of(connection, source, files))


def _struct(types: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in types.items()) + "}"


def _format(path: str) -> str | None:
    name = path.split("?")[0].lower()
    for ending in _COMPRESSED:
        if name.endswith(ending) and not name.endswith(f".parquet{ending}"):
            name = name.removesuffix(ending)
            break
    return _FORMATS.get(name.rpartition(".")[2])


def _is_hidden(path: str, location: str) -> bool:
    """Whether the part of a path that the configuration does not spell out is hidden."""
    fixed = re.split(r"[*?\[]", location)[0]
    return path != fixed and any(part.startswith((".", "_")) for part in path.removeprefix(fixed).split("/"))


def _is_url(location: str) -> bool:
    return re.match(r"[a-z0-9]+://", location) is not None


def _listed(location: str) -> list[str]:
    if _is_url(location):
        return _listed_remote(location)
    if os.path.isfile(location):
        return [location]
    pattern = f"{glob.escape(location.rstrip('/'))}/**" if os.path.isdir(location) else location
    return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]


def _listed_remote(url: str) -> list[str]:
    if url.startswith(("http://", "https://")):
        return [url]
    address, mark, query = url.partition("?")
    fixed = re.split(r"[*\[]", address)[0]
    try:
        system, base = fs.FileSystem.from_uri((fixed if fixed == address else fixed.rpartition("/")[0]) + mark + query)
        if system.get_file_info(base).type == fs.FileType.File:
            return [url]
        found = system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"{url} must be reachable: {error}; check the address and the credentials, then try again") from error
    scheme = address.partition("://")[0]
    urls = [f"{scheme}://{each.path}" for each in found if each.type == fs.FileType.File]
    return [each + mark + query for each in urls if fixed == address or fnmatch.fnmatch(each, address)]


class _Remote(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """URLs for duckdb: web servers through fsspec, object stores as pyarrow opens them everywhere else."""

    protocol = tuple(f"{_ROUTE}{scheme}" for scheme in ("http", "https", "s3", "gs", "gcs", "abfs", "abfss", "hdfs"))
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        system, inner = _system(path.removeprefix(_ROUTE))
        if inner != path.removeprefix(_ROUTE) or system.info(inner).get("partial"):
            return system.open(inner, mode)
        kept = tempfile.NamedTemporaryFile()  # noqa: SIM115  A web server that sends no parts; closed when duckdb lets it go.
        with system.open(inner, mode, block_size=0) as file:
            shutil.copyfileobj(file, kept)
        kept.seek(0)
        return kept

    def info(self, path: str, **_: Any) -> Any:
        system, inner = _system(path.removeprefix(_ROUTE))
        return system.info(inner)

    def exists(self, path: str, **_: Any) -> bool:
        system, inner = _system(path.removeprefix(_ROUTE))
        return bool(system.exists(inner))

    def modified(self, path: str) -> datetime:  # noqa: ARG002
        return datetime(1970, 1, 1, tzinfo=UTC)  # A connection lives as long as a verb: what it has read stays.

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path]


def _system(url: str) -> tuple[Any, str]:
    if url.startswith(("http://", "https://")):
        return fsspec.filesystem("http"), url
    system, path = fs.FileSystem.from_uri(url)
    return ArrowFSWrapper(system), path
