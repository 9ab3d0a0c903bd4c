"""What makes vectors of items: encoders of text, and tables of vectors that are there; each says what it is.

N texts or items, W numbers of a vector
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from limaml.config import FeatureConfig
from limaml.errors import ConfigError

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Origin:
    """What a vector comes from."""

    name: str
    version: str
    digest: str
    """SHA-256 (hex) over all that decides a vector."""
    width: int
    licence: str
    """Under which the vectors may be used."""
    attribution: str = ""
    """Whom the licence asks to be named."""

    @property
    def label(self) -> str:
        """What a feature's `encoder` must say."""
        return f"{self.name} {self.version}"


class TextEncoder(Protocol):
    """An encoder of text. Weights are read when they are first needed."""

    @property
    def origin(self) -> Origin: ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(N, W) in one batch; the same texts give the same bytes, a text its vector to 1e-6 whatever it is batched with."""
        ...


@runtime_checkable
class ItemVectors(Protocol):
    """Vectors that are there, by item."""

    @property
    def origin(self) -> Origin: ...

    def look_up(self, item_ids: Sequence[str]) -> list[Vectors | None]:
        """(W,) of each item, None for one that has none."""
        ...


def require_declared(feature: FeatureConfig, origin: Origin) -> None:
    """Raises ConfigError unless a vector is declared as what it comes from is: width, encoder and licence."""
    if not origin.licence:
        raise ConfigError(
            f"the licence of {origin.label} must be declared before it is used, got none; write it into encoder.json beside "
            f'its files, {{"name": …, "version": …, "licence": …, "attribution": …}}, as its owner gives it'
        )
    for key, said, own in (
        ("width", feature.width, origin.width),
        ("encoder", feature.encoder, origin.label),
        ("licence", feature.licence, origin.licence),
    ):
        if str(said).casefold() != str(own).casefold():
            raise ConfigError(
                f"features: {key} of {feature.name} must be its encoder's, {own!r}, got {said!r}; declare it so if that is "
                "what you mean to use, or name another encoder in [[transfer]]"
            )


def require_there(path: str, what: str) -> Path:
    """A file or folder of this machine. Raises ConfigError if it is not there: nothing is fetched."""
    found = Path(path)
    if not found.exists():
        raise ConfigError(
            f"transfer.path must be {what} on this machine, because nothing is fetched at run time, got {path!r}, which is not "
            "there; copy its files here and name them"
        )
    return found


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over files, in this order, whatever their names."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
