"""Values of settings that an extension may add to: those that ship, and those that code has registered (docs/extend.md)."""

import re
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from limaml.errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class Names:
    """The values of one setting. Nothing that is read at run time adds to them, a model version least of all."""

    def __init__(self, *shipped: str) -> None:
        self._known = list(shipped)

    @property
    def known(self) -> tuple[str, ...]:
        return tuple(self._known)

    def add(self, name: str) -> None:
        """Raises ConfigError for a name that there is already, or that is none."""
        if name in self._known or not _NAME.fullmatch(name):
            raise ConfigError(
                f"a name to be registered must match {_NAME.pattern} and be none of {self._known}, got {name!r}; choose another"
            )
        self._known.append(name)

    def check(self, name: str) -> str:
        if name not in self._known:
            raise ValueError(f"must be one of {self._known}; correct it, or register what it names (docs/extend.md)")
        return name


META_BLOCKS = Names("task_vector", "posterior", "id_mlp", "row_mlp", "sequence", "set", "hybrid")
"""Built by `limaml.models.blocks`."""
FEATURE_TYPES = Names("number", "category", "categories", "cycle", "text", "vector")
"""Encoded by `limaml.features.columns`."""
SOURCE_KINDS = Names("movielens", "completejourney", "synthetic", "parquet", "table")
"""Opened by `limaml.events.sources`."""
TRANSFER_PROVIDERS = Names("minilm", "static", "folder", "onnx", "table", "graph")
"""Opened by `limaml.transfer.providers`."""

MetaBlockName = Annotated[str, AfterValidator(META_BLOCKS.check), WithJsonSchema({"enum": [*META_BLOCKS.known]})]
FeatureType = Annotated[str, AfterValidator(FEATURE_TYPES.check), WithJsonSchema({"enum": [*FEATURE_TYPES.known]})]
SourceKind = Annotated[str, AfterValidator(SOURCE_KINDS.check), WithJsonSchema({"enum": [*SOURCE_KINDS.known]})]
_PROVIDERS = {"enum": [*TRANSFER_PROVIDERS.known]}
TransferProvider = Annotated[str, AfterValidator(TRANSFER_PROVIDERS.check), WithJsonSchema(_PROVIDERS)]
