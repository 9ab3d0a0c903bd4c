"""Local files and folders are there whole or not at all, whatever happens while they are written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from limaml.io import atomic


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    atomic.write(tmp_path / "text", "größer\n")
    atomic.write(str(tmp_path / "bytes"), b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "größer\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    atomic.write(tmp_path / "text", "")
    assert (tmp_path / "text").read_bytes() == b""
    assert names(tmp_path) == ["bytes", "text"]


@pytest.mark.usefixtures("umask")
def test_a_mode_holds_before_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, replace = [], os.replace

    def seen(source: Path, target: Path) -> None:
        modes.append(os.stat(source).st_mode & 0o777)
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", seen)
    atomic.write(tmp_path / "open", "")
    atomic.write(tmp_path / "secret", "", mode=0o600)
    assert modes == [0o644, 0o600]


def test_until_a_block_ends_a_reader_sees_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with atomic.replacing(path) as temporary:
        temporary.write_text("new, in part")
        assert path.read_text() == "old"
        assert temporary.name.startswith(".")
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path, folder = tmp_path / "result.json", tmp_path / "bundle"
    path.write_text("old")
    folder.mkdir()
    (folder / "old").touch()

    def write_file() -> None:
        with atomic.replacing(path) as temporary:
            temporary.write_text("new, in part")
            raise error

    def write_folder() -> None:
        with atomic.replacing_folder(folder) as temporary:
            (temporary / "new").touch()
            raise error

    for fails in (write_file, write_folder):
        with pytest.raises(error):
            fails()
    with pytest.raises(error), atomic.replacing(path):
        raise error
    assert path.read_text() == "old"
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["bundle", "result.json"]


def test_a_folder_takes_the_place_of_the_one_before_with_all_it_held(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "bundle"
    for name in ("first", "second"):
        with atomic.replacing_folder(folder) as temporary:
            (temporary / name).touch()
        assert names(folder) == [name]
    assert names(folder.parent) == ["bundle"]
