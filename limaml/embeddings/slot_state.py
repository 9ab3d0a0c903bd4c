"""A version's slot and its state: tags of the model version, changed under the lease of the online store (contract 4).

filling   its slot is being filled; nobody reads it
ready     its slot holds every row it should; the champion, and the version before it until its slot is filled again
retired   its slot was given to another version
"""

from datetime import UTC, date, datetime, timedelta

from limaml import registry, schema
from limaml.config import Config, TaskKindConfig
from limaml.errors import StoreError
from limaml.registry import ModelVersion, Registry

FILLING, READY, RETIRED = "filling", "ready", "retired"


def complete_day(version: ModelVersion) -> date:
    """The last day all of whose changed entities, of every kind, are online for this version."""
    return complete_through(version).date() - timedelta(days=1)


def complete_through(version: ModelVersion) -> datetime:
    """Exclusive end of `complete_day`, as tagged."""
    return datetime.fromisoformat(version.tags[registry.COMPLETE_THROUGH])


def kinds_of(version: ModelVersion, cfg: Config) -> list[TaskKindConfig]:
    """The configured kinds that a version was filled with, in the order in which they are published: the first one last."""
    tags = registry.complete_through_tags([kind.name for kind in cfg.task_kinds])
    return [kind for kind in cfg.task_kinds[::-1] if tags[kind.name] in version.tags]


def filling(version: ModelVersion, *, or_ready: bool = False) -> tuple[str, date]:
    """Slot and as-of day of the version's fill. Raises StoreError if it is in another state."""
    state = version.tags.get(registry.STATE)
    if state != FILLING and not (or_ready and state == READY):
        raise StoreError(f"version {version.version} must be filling, its state is {state}; run limaml plan-fill for it first")
    return version.tags[registry.SLOT], date.fromisoformat(version.tags[registry.FILL_DAY])


def idle_slot(champion: ModelVersion | None) -> str:
    """The slot that the champion does not use."""
    return next(slot for slot in schema.SLOTS if champion is None or slot != champion.tags[registry.SLOT])


def ready_beside(store: Registry, champion: ModelVersion) -> ModelVersion | None:
    """The version in the other slot, if it is ready: the one to roll back to."""
    found = store.find(registry.SLOT, idle_slot(champion))
    return next((version for version in found if version.tags.get(registry.STATE) == READY), None)


def now() -> datetime:
    return datetime.now(UTC)
