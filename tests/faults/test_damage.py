"""What was written whole is damaged afterwards: who reads it says so and changes nothing, and its own verb writes it again."""

from pathlib import Path

import pytest

from tests.faults.installation import Installation, require_same
from tests.faults.test_killed_verbs import SAME


def the_file(folder: Path, pattern: str) -> Path:
    [found] = folder.glob(pattern)
    return found


@pytest.mark.parametrize("folder", ["logged", "events"])
@pytest.mark.fault(
    "a truncated partition of a day's events, or of its logged features",
    after=f"nothing is adapted from it; once the day is ingested again {SAME}",
)
def test_a_truncated_partition_of_a_day(installation: Installation, folder: str) -> None:
    installation.begin("adapt")
    before = installation.state()
    path = the_file(installation.root / "data" / folder, f"dt={installation.day}/*.parquet")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, result = installation.start("adapt").ended()
    assert code == 65, result
    assert f"{folder}/dt={installation.day}/{path.name}" in result["message"]
    assert "ingest" in result["message"]
    assert installation.start("ingest").done()["status"] == "ingested"
    require_same(installation.state(), before)
    installation.start("adapt").done()
    require_same(installation.state(), installation.left_by("adapt"))


@pytest.mark.fault(
    "a truncated partition of embeddings", after=f"nothing is published from it; once it is adapted again {SAME}"
)
def test_a_truncated_partition_of_embeddings(installation: Installation) -> None:
    installation.begin("publish")
    before = installation.state()
    path = the_file(installation.root / "data" / "embeddings", f"*/*/dt={installation.day}/shard-000.parquet")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, result = installation.start("publish").ended()
    assert (code, result["error"]) == (65, "DataError")
    assert f"{path} must be a readable Parquet file" in result["message"]
    installation.start("adapt").done()
    require_same(installation.state(), before)


@pytest.mark.fault("a flipped byte in the bundle that adapts", after=f"nothing is adapted with it; once it is put right {SAME}")
def test_a_flipped_byte_in_the_bundle_that_adapts(installation: Installation) -> None:
    installation.begin("adapt")
    before = installation.state()
    whole = {path: path.read_bytes() for path in (installation.root / "artifacts").rglob("refit.safetensors")}
    for path, content in whole.items():
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    code, result = installation.start("adapt").ended()
    assert (code, result["error"]) == (65, "BundleError")
    assert "refit.safetensors must have its manifest's SHA-256" in result["message"]
    require_same(installation.state(), before)
    for path, content in whole.items():
        path.write_bytes(content)
    installation.start("adapt").done()
    require_same(installation.state(), installation.left_by("adapt"))
