"""Files written whole or not at all, and found in order."""

import pytest

from limaml.io.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


def test_a_write_that_fails_leaves_what_was_there(storage):
    storage.write_bytes("folder/file", b"what was there")
    with pytest.raises(TypeError):
        storage.write_bytes("folder/file", object())
    assert storage.read_bytes("folder/file") == b"what was there"


def test_names_come_sorted_whatever_the_file_system_says(storage):
    names = [f"{number:02}" for number in range(40)]
    for name in reversed(names):
        storage.write_bytes(f"a/{name}/file", b"")
    assert storage.list("a") == names
    assert list(storage.walk("a")) == [f"a/{name}/file" for name in names]
    assert storage.list("nowhere") == []
