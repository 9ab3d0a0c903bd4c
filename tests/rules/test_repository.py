"""Rules about the repository itself: the lock, what may be committed, the map, the commands."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
OWN = {"limaml", "serving", "dags", "feature_repo", "tests", "benchmarks", "experiments", "helm", "tools"}
BROWSER = Path("tests/browser.py")
SCHEMAS = Path("tests/deploy/kubernetes_schemas.py")
SEQUENCE = Path("experiments/sequence/sasrec.py")
"""Programs of their own, in environments of their own."""
PEERS = Path("benchmarks", "peers")
MAX_COMMITTED_BYTES = 1_000_000
MAX_LINES = 400


def committed() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def python_files() -> list[Path]:
    return [path for path in committed() if path.suffix == ".py"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(*files: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for name in files for line in (ROOT / name).read_text().splitlines()]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def locked() -> dict[str, str]:
    return pins("requirements.lock", "requirements-data.lock")


def peers_locked() -> dict[str, str]:
    """The peers' own environment (benchmarks/.venv)."""
    return pins("benchmarks/requirements-peers.txt")


def services_locked() -> dict[str, str]:
    """The environment of the S3 server that tests start (tests/.venv)."""
    return pins("tests/requirements-services.txt")


def sequence_locked() -> dict[str, str]:
    """The sequence rival's environment (experiments/.sequence)."""
    return pins("experiments/sequence/requirements.txt")


def imported(path: Path) -> set[str]:
    """Top-level names of absolute imports anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_what_drives_the_browser_is_in_the_services_lock() -> None:
    """A program of its own, in the environment of the services' tests."""
    assert imported(BROWSER) - set(sys.stdlib_module_names) == {"playwright"}
    assert "playwright" in services_locked()


def test_every_pin_is_exact() -> None:
    every = [*locked().items(), *peers_locked().items(), *services_locked().items(), *sequence_locked().items()]
    assert not [name for name, version in every if not re.fullmatch(r"[0-9][0-9A-Za-z.+!]*", version)]


def test_the_lock_has_no_gpu_build() -> None:
    # nvidia-ml-py is one pure Python file, which BentoML imports on every machine.
    every = (set(locked()) | set(peers_locked()) | set(services_locked()) | set(sequence_locked())) - {"nvidia-ml-py"}
    assert not [name for name in every if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_the_lock_holds_what_its_packages_require() -> None:
    """The Makefile installs it without resolving. The data wheel is read, never imported: what it requires stays out."""
    data = {line.partition("==")[0] for line in (ROOT / "requirements-data.lock").read_text().split()}
    gpu = ("nvidia-", "cuda-", "triton")
    missing = {
        f"{name} requires {needed.name}"
        for name in set(locked()) - data
        for needed in map(Requirement, requires(name) or [])
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
        if normal(needed.name) not in locked() and not (name == "torch" and needed.name.startswith(gpu))
    }
    assert not missing


def test_the_lock_contains_every_import() -> None:
    distributions = packages_distributions()
    local = {path.stem for path in python_files()}
    missing = {
        f"{path}: {name}"
        for path in python_files()
        if not path.is_relative_to(PEERS) and path not in (BROWSER, SCHEMAS, SEQUENCE)
        for name in imported(path) - OWN - local - set(sys.stdlib_module_names)
        if not {normal(found) for found in distributions.get(name, [])} & set(locked())
    }
    assert not missing


def test_the_peers_lock_contains_every_import_of_a_peer() -> None:
    """Their packages are not installed here: a module must be called as its distribution is."""
    missing = {
        f"{path}: {name}"
        for path in python_files()
        if path.is_relative_to(PEERS)
        for name in imported(path) - OWN - set(sys.stdlib_module_names)
        if normal(name) not in peers_locked()
    }
    assert not missing


def test_ours_runs_beside_the_peers_on_the_same_versions() -> None:
    """So that a ratio compares engines, not versions of what they stand on."""
    shared = set(locked()) & set(peers_locked())
    assert {"torch", "numpy", "pydantic", "pyarrow"} <= shared
    assert not {name: (locked()[name], peers_locked()[name]) for name in shared if locked()[name] != peers_locked()[name]}


def test_the_s3_server_has_the_versions_of_the_lock() -> None:
    """What it shares with the project is checked and updated once."""
    shared = set(locked()) & set(services_locked())
    assert {"requests", "cryptography"} <= shared
    assert not {name for name in shared if locked()[name] != services_locked()[name]}


def test_the_sequence_rivals_lock_contains_what_it_imports() -> None:
    """Of what it shares with the project only what RecTools bounds has another version."""
    assert {normal(name) for name in imported(SEQUENCE) - set(sys.stdlib_module_names)} <= set(sequence_locked())
    shared = set(locked()) & set(sequence_locked())
    assert {name for name in shared if locked()[name] != sequence_locked()[name]} <= {"attrs", "numpy"}


def test_no_data_set_model_or_large_file_is_committed() -> None:
    """MovieLens may not be redistributed; it comes out of a package when it is installed."""
    data = {".inter", ".item", ".user", ".data", ".base", ".parquet", ".safetensors", ".db", ".pkl", ".pt", ".csv"}
    assert not [path for path in committed() if path.suffix in data]
    assert not [path for path in committed() if (ROOT / path).stat().st_size > MAX_COMMITTED_BYTES]


def test_no_pickle_is_read_or_written() -> None:
    users = [path for path in python_files() if imported(path) & {"pickle", "cloudpickle", "dill", "joblib"}]
    assert not users


def test_files_stay_readable() -> None:
    shipped = [path for path in python_files() if path.parts[0] in ("limaml", "serving", "dags", "feature_repo")]
    long = [path for path in shipped if len((ROOT / path).read_text().splitlines()) > MAX_LINES]
    reasons = {path: ast.get_docstring(ast.parse((ROOT / path).read_text())) or "" for path in long}
    assert not [path for path, reason in reasons.items() if "Over 400 lines, because " not in reason]


def test_ci_calls_the_same_targets_as_people_do() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("test", "test-services", "experiments", "run", "stop"):
        assert re.search(rf"^\s*make {target}\b", script, re.MULTILINE), target
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), target


def test_the_map_has_every_top_level_folder() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.parts[0] for path in committed() if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    assert not [folder for folder in folders if not re.search(rf"^\s*{folder}/\s", page, re.MULTILINE)]
