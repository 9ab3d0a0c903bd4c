"""A digest of the code that a job's result follows from: with other code, a kept output is not taken."""

import hashlib
from pathlib import Path

from limaml.training.revision import code_of, code_revision

_HERE = Path(__file__).parent


def revision(*parts: str) -> str:
    """SHA-256 (hex) of the core's model code and of the named modules or folders of this package."""
    digest = hashlib.sha256(code_revision().encode())
    files: list[Path] = []
    for part in ("data", *parts):
        path = _HERE / part
        files += path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    for file in sorted(files):
        digest.update(f"{file.relative_to(_HERE)}\0{code_of(file)}\0".encode())
    return digest.hexdigest()
