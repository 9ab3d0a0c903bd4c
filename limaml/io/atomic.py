"""Local files and folders written whole or not at all: under a hidden name beside the target, then renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: str | Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write a whole file, text as UTF-8; a reader sees the old content or the new one, never a part.

    `mode` holds from the first byte on, less what the process's umask takes; the folder must be there.
    """
    content = data.encode() if isinstance(data, str) else data
    with replacing(path) as temporary, open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write a file to, which becomes `path` when the block ends; if the block fails, what `path` was stays."""
    temporary = hidden(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends; if the block fails, what `path` was stays.

    Of a folder that is there already nothing is kept. It is moved aside first, so a reader may find none for an instant.
    """
    target, temporary = Path(path), hidden(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            replaced = hidden(target)
            os.rename(target, replaced)
            os.rename(temporary, target)
            shutil.rmtree(replaced)
        else:
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hidden(path: str | Path) -> Path:
    """A new name beside `path` that no reader of the folder takes for data."""
    target = Path(path)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")
