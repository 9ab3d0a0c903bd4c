"""Where candidates lie: copied whole to the storage and back, complete only with candidate.json, the newest kept."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from limaml.errors import DataError
from limaml.io.storage import Storage
from limaml.training import candidate
from limaml.training.candidate import Candidate, download_candidate, read_candidate

FOUND = Candidate("f" * 64, "run", "2026-01-31", 10, 0.75, 1.5)
FILES = {"bundle/manifest.json": b"{}", "bundle/refit.safetensors": bytes(range(256)), "history.json": b'{"twin": []}'}


@pytest.fixture
def trained(tmp_path):
    """A local folder as training leaves it."""
    files = {**FILES, "candidate.json": json.dumps(asdict(FOUND)).encode()}
    for name, data in files.items():
        (tmp_path / "trained" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "trained" / name).write_bytes(data)
    return tmp_path / "trained"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_candidate_comes_back_from_the_storage_as_it_was(trained, tmp_path):
    storage = Storage(str(tmp_path / "data"))
    candidate._upload(trained, storage, "candidates/one")
    location = storage.path("candidates/one")
    assert read_candidate(location) == FOUND
    download_candidate(location, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(trained)


def test_a_copy_that_was_cut_short_is_no_candidate_until_it_is_made_again(trained, tmp_path, monkeypatch):
    """Also where a complete one was there before: its files are being replaced."""
    storage = Storage(str(tmp_path / "data"))
    candidate._upload(trained, storage, "candidates/one")
    write = Storage.write_bytes

    def full(self, relative, data):
        if relative.endswith("history.json"):
            raise OSError(28, "No space left on device")
        write(self, relative, data)

    monkeypatch.setattr(Storage, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        candidate._upload(trained, storage, "candidates/one")
    monkeypatch.undo()
    for use in (read_candidate, lambda location: download_candidate(location, tmp_path / "back")):
        with pytest.raises(DataError, match=r"candidates/one must hold candidate.json, .* run `limaml train` again"):
            use(storage.path("candidates/one"))
    candidate._upload(trained, storage, "candidates/one")
    assert read_candidate(storage.path("candidates/one")) == FOUND


def test_the_newest_candidates_stay(trained, tmp_path):
    """By the time they were written, not by name; what is not complete may be on its way and stays."""
    storage = Storage(str(tmp_path / "data"))
    names = [f"2026-01-{day:02d}-x" for day in (9, 3, 7, 1, 8, 2, 6)]
    for age, name in enumerate(names):
        candidate._upload(trained, storage, f"candidates/{name}")
        os.utime(tmp_path / "data" / "candidates" / name / "candidate.json", (1e9 - age, 1e9 - age))
    storage.write_bytes("candidates/on-its-way/history.json", b"{}")
    candidate._keep_newest(storage, f"candidates/{names[-1]}")
    assert storage.list("candidates") == sorted([*names[: candidate._KEPT - 1], names[-1], "on-its-way"])
