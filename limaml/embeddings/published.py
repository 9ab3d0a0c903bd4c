"""Which partitions a version's embeddings were published from, and of whom they are."""

from collections.abc import Iterable

from limaml.io.storage import Storage


def version_folder(kind: str, version: str) -> str:
    """Where the partitions of one version's embeddings of one kind lie."""
    return f"embeddings/kind={kind}/version={version}"


def published_files(storage: Storage, kind: str, version: str) -> list[str]:
    """Paths of the version's partitions that have passed their gate: their manifest, written last, says so."""
    return _passed(list(storage.walk(version_folder(kind, version))))


class PublishedEntities:
    """Names of the entities that a version has embeddings of; a partition is read again only when it was written again."""

    def __init__(self, storage: Storage, kind: str, version: str, column: str) -> None:
        self._storage, self._folder, self._column = storage, version_folder(kind, version), column
        self._read: dict[str, str] = {}
        self._names: set[str] = set()

    def read(self) -> list[str]:
        """All of them, sorted. Raises what the storage raises."""
        stamps = self._storage.stamps(self._folder)
        for path in _passed(stamps):
            if self._read.get(path) != stamps[path]:
                self._names.update(self._storage.read_columns(path, [self._column])[self._column].to_pylist())
                self._read[path] = stamps[path]
        return sorted(self._names)


def _passed(paths: Iterable[str]) -> list[str]:
    found = list(paths)
    passed = {path.removesuffix(".json") for path in found if path.endswith(".json")}
    return [path for path in found if path.endswith(".parquet") and path.removesuffix(".parquet") in passed]
