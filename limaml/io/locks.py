"""One process at a time over a storage root, wherever it lies (contract 11).

A folder is locked by a file in it, which the kernel frees with its holder. On a URL files are no locks: there it is a lease in
the database of `embeddings.lease_url`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from limaml.config import Config
from limaml.errors import BusyError
from limaml.io.lease import holder_name, lease_named


class Lock(Protocol):
    """A lock that is held."""

    def check(self) -> None:
        """Call before each write. Raises BusyError if somebody else has it by now."""


class _FileLock:
    """The kernel gives it to nobody else while this process lives."""

    def check(self) -> None:
        pass


@contextmanager
def exclusive(cfg: Config, name: str, wait_s: float) -> Iterator[Lock]:
    """Hold the lock `name` of `cfg.storage.root` while the block runs. Raises BusyError if it is not free within `wait_s`."""
    root = cfg.storage.root
    if "://" in root:
        # A URL's options say how its place is reached: however two spell them, they must meet at one lock.
        place = root.partition("?")[0].rstrip("/")
        with lease_named(cfg.embeddings, f"{name} of {place}", holder_name(name), wait_s) as held:
            yield held
        return
    path = Path(root).absolute() / f"{name}.lock"
    busy = f"busy: another {name} has held {path} for over {wait_s:g} s; wait until it has ended, then run again"
    with held_file(path, wait_s, busy):
        yield _FileLock()


@contextmanager
def held_file(path: Path, wait_s: float, busy: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs. Raises BusyError(`busy`) if it is not free within `wait_s`."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=wait_s)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BusyError(busy) from None
    try:
        yield
    finally:
        lock.release()
