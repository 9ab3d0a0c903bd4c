"""A folder of an encoder's files, as sentence-transformers and model2vec leave them: what it says of itself, and its tokens."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limaml.errors import ConfigError
from limaml.transfer.encoders import Origin, digest_of

WEIGHTS, TOKENS, SETTINGS, ORIGIN = "model.safetensors", "tokenizer.json", "config.json", "encoder.json"
_ONNX = "*.onnx"


def require_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Raises ConfigError if one of an encoder's files is missing."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    if folder.suffix == ".onnx" or any(folder.rglob(_ONNX)):
        raise ConfigError(
            f'transfer.path must hold weights as safetensors, got an ONNX model in {folder}; use provider = "onnx"'
        )
    raise ConfigError(
        f"transfer.path must be a folder with {', '.join(names)}, got {folder} without {', '.join(missing)}; copy the whole "
        "folder of the model"
    )


def origin_of(folder: Path, files: Sequence[Path], width: int) -> Origin:
    """What `encoder.json` says; without it the folder's name, its digest, and the licence of its model card (README.md)."""
    digest, said = digest_of(files), read_settings(folder, ORIGIN)
    return Origin(
        said.get("name") or folder.resolve().name,
        said.get("version") or digest[:12],
        digest,
        width,
        said.get("licence") or card_licence(folder),
        said.get("attribution", ""),
    )


def card_licence(folder: Path) -> str:
    """`license` of the YAML at the head of a model card; empty if it has none."""
    card = folder / "README.md"
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    found = re.search(r"^license: *['\"]?([^'\"\n]+)", head[1], re.MULTILINE) if head else None
    return found[1].strip() if found else ""


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder; empty if there is no such file. Raises ConfigError if it is something else."""
    found = read_json(folder, name)
    if not isinstance(found, dict | None):
        raise ConfigError(f"{folder / name} must be a JSON object, got {type(found).__name__}; copy the model's folder again")
    return found or {}


def read_json(folder: Path, name: str) -> Any:
    """None if there is no such file. Raises ConfigError if it is no JSON."""
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{path} must be JSON: {error}; copy the model's folder again") from error


def open_tokenizer(folder: Path) -> Any:
    """Without padding and truncation. Raises ConfigError if the package is not installed."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "an encoder of text needs the package tokenizers, which is not installed; pip install 'limaml[text]'"
        ) from error
    tokenizer = Tokenizer.from_file(str(folder / TOKENS))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
