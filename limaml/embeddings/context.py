"""Where the verbs of embeddings read and write: storage, model registry, online store, and the lease that they hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pyarrow as pa

from limaml import schema
from limaml.config import Config, require_features, require_permitted_version
from limaml.errors import ConfigError
from limaml.events.affinity_maps import maps
from limaml.events.catalogue import Kind, kinds
from limaml.io.lease import Held, holder_name, lease
from limaml.io.storage import Storage
from limaml.registry import Registry

if TYPE_CHECKING:
    from feast import FeatureStore

    from limaml.models.bundle import Bundle

AFFINITIES = "affinities"


@dataclass(frozen=True)
class EmbeddingContext:
    """Where a step reads and writes."""

    cfg: Config
    storage: Storage
    registry: Registry

    @classmethod
    def of(cls, cfg: Config) -> "EmbeddingContext":
        return cls(cfg, Storage(cfg.storage.root), Registry(cfg.registry))

    @property
    def tables(self) -> schema.Tables:
        return schema.tables(self.cfg.features)

    @property
    def kinds(self) -> dict[str, Kind]:
        """Users and items."""
        return kinds(self.tables)

    @contextmanager
    def writing(self, verb: str, run: str) -> Iterator[Held]:
        with lease(self.cfg, holder_name(verb, run)) as held:
            yield held

    def bundle(self, version: str) -> "Bundle":
        """The part of a version that serves. Raises ConfigError if other features are declared than it was trained on, or its
        data and encoders do not permit what models are for.
        """
        from limaml.models.bundle import load

        with TemporaryDirectory(prefix="limaml-bundle-") as folder:
            found = load(self.registry.download(version, folder), parts=("refit",))
        require_features(found.config, self.cfg, version)
        require_permitted_version(found.config, self.cfg)
        return found

    def bundle_to_fill(self, version: str) -> "Bundle":
        """`bundle`. Raises ConfigError if other task kinds are configured than it was trained with."""
        found = self.bundle(version)
        trained, now = ([kind.name for kind in cfg.task_kinds] for cfg in (found.config, self.cfg))
        if trained != now:
            raise ConfigError(
                f"task_kinds must be those that version {version} was trained with, {trained}, got {now}; fill it with its own "
                "configuration, or train a new version"
            )
        return found

    def affinities(self, users: pa.Table, through: date) -> dict[str, pa.Table]:
        """What is kept of users, whose snapshot rows these are, by attributes of items; nothing where none is declared."""
        return {AFFINITIES: maps(self.storage, self.tables, users, through)} if self.tables.affinities else {}

    def store(self) -> "FeatureStore":
        from limaml.features.feature_store import open_store

        return open_store(self.cfg)

    def tag(self, held: Held, version: str, tags: dict[str, str | None]) -> None:
        """Change tags of a version in the order given, each after a check of the lease; None removes a tag."""
        for name, value in tags.items():
            held.check()
            self.registry.set_tags(version, {name: value})
