"""Parts of the results joined to one: what every process of `make bench` measured, as a tree of numbers."""

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from limaml.io import atomic

Results = dict[str, Any]


def merge(parts: Iterable[Results]) -> Results:
    """Join the parts; of a speed that several processes measured (ours, the GEMM peak, an error) the largest stays.

    Raises ValueError where two parts disagree about anything else.
    """
    joined: Results = {}
    for part in parts:
        _merge_into(joined, part, "")
    return joined


def machine() -> Results:
    """Its class; no name that would tell whose it is."""
    cores = len(os.sched_getaffinity(0))
    model = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    flags = next((line.split(":")[1].split() for line in _read("/proc/cpuinfo") if line.startswith("flags")), [])
    widest = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "none")
    memory_gib = round(psutil.virtual_memory().total / 2**30)
    return {"cpu": model, "vector_extension": widest, "cores": cores, "memory_gib": memory_gib, "system": platform.system()}


def versions() -> Results:
    """Of what ours runs on; each peer's part carries its own."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("limaml", "torch", "numpy")}


def write(results: Results, path: Path) -> None:
    """Write as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(results, indent=1, sort_keys=True) + "\n")


def _merge_into(joined: Results, part: Results, where: str) -> None:
    for key, value in part.items():
        at = f"{where}.{key}".lstrip(".")
        if key not in joined:
            joined[key] = merge([value]) if isinstance(value, dict) else value
        elif isinstance(value, dict) and isinstance(joined[key], dict):
            _merge_into(joined[key], value, at)
        elif isinstance(value, list) and isinstance(joined[key], list):
            joined[key] = [*joined[key], *value]
        elif isinstance(value, float) and isinstance(joined[key], float):
            joined[key] = max(joined[key], value)
        elif value != joined[key]:
            raise ValueError(
                f"{at} must be the same in every part, got {joined[key]!r} and {value!r}; measure both in one environment"
            )


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
