"""One installation for the files of this folder, whose steps were run once, undisturbed."""

from collections.abc import Iterator

import pytest

from tests.faults.installation import Installation


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation.build(tmp_path_factory.mktemp("faults") / "installation").undisturbed()


@pytest.fixture
def installation(built: Installation) -> Iterator[Installation]:
    yield built
    built.end()
