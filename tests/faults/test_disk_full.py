"""No space is left while a partition or a bundle is written: a tmpfs of its own, filled up, with a little more room each time.

A limit on a file's size (`ulimit -f`) would end the writer by a signal, and not tell it ENOSPC as a full disk does.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from limaml.models import bundle as bundles
from tests.faults.installation import Installation, require_same
from tests.faults.test_killed_verbs import SAME

pytestmark = pytest.mark.services

SIZE_BYTES = 16 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
"""What a tmpfs gives at a time."""


@dataclass
class Disk:
    root: Path

    def fill(self, pages_left: int) -> None:
        """Leave so many pages free."""
        self.empty()
        free = os.statvfs(self.root)
        with (self.root / ".filler").open("wb") as file:
            file.write(b"\1" * (free.f_bavail * free.f_frsize - pages_left * PAGE_BYTES))

    def empty(self) -> None:
        (self.root / ".filler").unlink(missing_ok=True)


def small_disk(folder: Path) -> Iterator[Disk]:
    """Mounted while the generator is."""
    if os.geteuid() != 0:
        pytest.fail("a small disk is mounted for this test, which needs root: sudo make test-services")
    root = folder / "disk"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "limaml-tests", root], check=True)
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", root], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from small_disk(tmp_path)


@pytest.mark.parametrize(("step", "pages"), [("ingest", 4), ("adapt", 1)])
@pytest.mark.fault(
    "disk full while the partitions of a day, and one of embeddings, are written", after=f"with room again, {SAME}"
)
def test_a_disk_that_is_full_while_partitions_are_written(
    installation: Installation, disk: Disk, step: str, pages: int
) -> None:
    """There are so many pages more each time."""
    installation.begin(step)
    data = disk.root / "data"
    shutil.copytree(installation.root / "data", data)
    days = installation.files(data / "days")
    for failures in range(100):
        disk.fill(pages_left=pages * failures)
        code, result = installation.start(step, f"--set=storage.root={data}").ended()
        if code == 0:
            break
        assert (code, "No space left on device" in result["message"]) == (1, True), result
        assert installation.files(data / "days") == days, "nothing counts as ingested"
        assert not list(data.rglob(".*")), "what did not fit was left behind"
    assert failures > 1
    expected = installation.left_by(step)
    require_same(installation.state() | {"files": installation.files(data)}, expected)


@pytest.mark.fault(
    "disk full while a bundle is written",
    after="the one before it is still whole; with room again, its bytes are those of one written undisturbed",
)
def test_a_disk_that_is_full_while_a_bundle_is_written(installation: Installation, disk: Disk) -> None:
    [old, new] = [bundles.load(installation.root / f"bundle-{seed}") for seed in (1, 2)]
    whole = installation.files(installation.root / "bundle-1"), installation.files(installation.root / "bundle-2")
    bundles.save(old, disk.root / "bundle")
    pages, failures = sum(len(content) // PAGE_BYTES + 1 for content in whole[1].values()), 0
    for pages_left in range(0, pages + 1, 2):
        disk.fill(pages_left)
        try:
            bundles.save(new, disk.root / "bundle")
        except OSError:
            failures += 1
            assert installation.files(disk.root / "bundle") == whole[0]
            assert sorted(path.name for path in disk.root.iterdir()) == [".filler", "bundle"]
    assert failures > 1
    disk.empty()
    bundles.save(new, disk.root / "bundle")
    assert installation.files(disk.root / "bundle") == whole[1]
