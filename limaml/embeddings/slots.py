"""Fill the idle slot with a new model version's embeddings (contract 4).

    plan_fill   retire what held the idle slot, empty it, plan the shards, publish the features they are served with
    fill_shard  adapt, write the partition, gate, publish, read a sample back; shards in any order, each as often as needed

Then `switch.cut_over` makes the version the champion, and `daily` keeps it up to date. Every step can be repeated and gives
the same end. Slot, state and `complete_through` are tags of the model version, changed under the lease of the online store:

    filling   its slot is being filled; nobody reads it
    ready     its slot holds every row it should; the champion, and the version before it until its slot is filled again
    retired   its slot was given to another version
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from limaml import registry, schema
from limaml.config import Config, require_features
from limaml.embeddings.adapt import active_entities
from limaml.embeddings.partition import (
    Adaptation,
    FillPlan,
    read_partition,
    read_plan,
    write_partition,
    write_plan,
)
from limaml.embeddings.publish import OnlineView, publish, require_published, sample
from limaml.errors import BusyError, DataError, NothingToDo, StoreError
from limaml.events import snapshots
from limaml.events.affinity_maps import maps
from limaml.events.catalogue import Kind, kinds
from limaml.events.day_store import EventStore
from limaml.io.lease import Held, holder_name, lease
from limaml.io.storage import Storage
from limaml.registry import ModelVersion, Registry
from limaml.telemetry import get_logger

if TYPE_CHECKING:
    from feast import FeatureStore

    from limaml.models.bundle import Bundle

FILLING, READY, RETIRED = "filling", "ready", "retired"
AFFINITIES = "affinities"
_VIEWS = {"user": schema.USER_VIEW, "item": schema.ITEM_VIEW, AFFINITIES: schema.AFFINITY_VIEW}
_log = get_logger(__name__)


@dataclass(frozen=True)
class Places:
    """Where a step reads and writes."""

    cfg: Config
    storage: Storage
    registry: Registry

    @classmethod
    def of(cls, cfg: Config) -> "Places":
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
        """The part of a version that serves. Raises ConfigError if other features are declared than it was trained on."""
        from limaml.models.bundle import load

        with TemporaryDirectory(prefix="limaml-bundle-") as folder:
            found = load(self.registry.download(version, folder), parts=("refit",))
        require_features(found.config, self.cfg, version)
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


def plan_fill(cfg: Config, version: str, through: date, run: str) -> dict[str, Any]:
    """Prepare the idle slot for `version`; returns version, slot, as_of_day and the list of shards.

    The fill's as-of day is `through` or, if that is later, the last day the champion is complete for. Raises BusyError while
    another version is being filled or servers may still read the slot, NothingToDo if `version` is the champion already.
    """
    places = Places.of(cfg)
    with places.writing("plan-fill", run) as held:
        champion = places.registry.champion()
        target = places.registry.get(version)
        if champion is not None and champion.version == version:
            raise NothingToDo(f"version {version} is the champion already")
        slot = idle_slot(champion)
        _refuse_before_dwell(cfg, champion)
        holders = _holders(places.registry, slot, version)
        _refuse_if_filling(cfg, holders)
        day = max([through, *([complete_day(champion)] if champion else [])])
        plans = _plan(places, version, day)
        for holder in [*holders, *([target] if registry.STATE in target.tags else [])]:
            places.tag(held, holder.version, {registry.STATE: RETIRED})
        store = places.store()
        for plan in plans:
            held.check()
            write_plan(places.storage, plan)
            held.check()
            OnlineView(store, schema.embedding_view(plan.kind.name, slot)).clear()
        features = {name: snapshots.latest(places.storage, kind, day) for name, kind in places.kinds.items()}
        features |= places.affinities(features["user"], day)
        written = publish_features(places, store, features, held)
        # The state is the last of them: a slot that was not emptied to the end cannot be filled.
        places.tag(held, version, _filling_tags(slot, day, run))
    entities = sum(len(plan.entities) for plan in plans)
    _log.info("fill_planned", model_version=version, slot=slot, day=day.isoformat(), entities=entities, features=written)
    shards = list(range(cfg.embeddings.num_shards))
    return {"version": version, "slot": slot, "as_of_day": day.isoformat(), "entities": entities, "shards": shards}


def fill_shard(cfg: Config, version: str, shard: int, run: str) -> dict[str, Any]:
    """Adapt and publish one shard of the version's fill; returns counts and the partition's path.

    Raises StoreError if the version is not being filled (any more).
    """
    places = Places.of(cfg)
    slot, day = _open_fill(places.registry.get(version))
    bundle = places.bundle(version)
    as_of = schema.day_end(day)
    done, plans = Adaptation(), []
    for kind in cfg.task_kinds:
        plan = read_plan(places.storage, kind, version, day)
        if shard >= plan.num_shards:
            raise DataError(
                f"shard must be below the fill's {plan.num_shards} shards, got {shard}; take one of plan-fill's result"
            )
        inputs, entities = {"plan": plan.digest}, plan.shard_entities(shard)
        done += write_partition(cfg, places.storage, bundle, plan.shard(shard), entities, as_of, inputs)
        plans.append(plan)
    written = 0
    with places.writing("fill", run) as held:
        if _open_fill(places.registry.get(version)) != (slot, day):
            raise StoreError(f"version {version} was planned again while shard {shard} was adapted; fill its shards again")
        store = places.store()
        for plan in plans:
            table = read_partition(places.storage, plan.shard(shard), as_of, {"plan": plan.digest})
            view = OnlineView(store, schema.embedding_view(plan.kind.name, slot))
            written += publish(view, table, held, cfg.embeddings.write_batch_rows).num_rows
            require_published(view, sample(table, cfg.embeddings.read_back_rows), cfg.embeddings.write_batch_rows)
        places.tag(held, version, {registry.FILL_SEEN_AT: now().isoformat()})
    _log.info("shard_filled", model_version=version, slot=slot, shard=shard, written=written, **done.figures)
    paths = [places.storage.path(plan.shard(shard).path) for plan in plans]
    return {"version": version, "slot": slot, "shard": shard, **done.figures, "written": written, "paths": paths}


def publish_features(places: Places, store: "FeatureStore", tables: dict[str, pa.Table], held: Held) -> int:
    """Publish snapshot rows of users and items, read what was written back; returns the number of rows written."""
    settings, total = places.cfg.embeddings, 0
    for kind, table in tables.items():
        view = OnlineView(store, _VIEWS[kind])
        written = publish(view, table, held, settings.write_batch_rows)
        require_published(view, written, settings.write_batch_rows)
        total += written.num_rows
    return total


def complete_day(version: ModelVersion) -> date:
    """The last day all of whose changed entities are online for this version."""
    return complete_through(version).date() - timedelta(days=1)


def complete_through(version: ModelVersion) -> datetime:
    """Exclusive end of `complete_day`, as tagged."""
    return datetime.fromisoformat(version.tags[registry.COMPLETE_THROUGH])


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


def _plan(places: Places, version: str, day: date) -> list[FillPlan]:
    revisions = EventStore(places.storage).lineage(day)
    shards = places.cfg.embeddings.num_shards
    return [
        FillPlan(
            kind,
            version,
            day,
            shards,
            revisions,
            tuple(active_entities(places.storage, places.tables, kind, schema.day_end(day))),
        )
        for kind in places.cfg.task_kinds
    ]


def _open_fill(version: ModelVersion) -> tuple[str, date]:
    """`filling`, for a shard: once a cut-over has accepted the fill, its rows could replace newer ones."""
    if version.tags.get(registry.STATE) == FILLING and registry.COMPLETE_THROUGH in version.tags:
        raise StoreError(
            f"version {version.version} takes no shard any more, its fill was found complete; run limaml cut-over for it"
        )
    return filling(version)


def _holders(store: Registry, slot: str, version: str) -> list[ModelVersion]:
    """Versions other than `version` that have something in the slot."""
    held = [found for found in store.find(registry.SLOT, slot) if found.tags.get(registry.STATE) in (FILLING, READY)]
    return [found for found in held if found.version != version]


def _refuse_before_dwell(cfg: Config, champion: ModelVersion | None) -> None:
    if champion is None:
        return
    since = datetime.fromisoformat(champion.tags[registry.CUT_OVER_AT])
    free_at = since + timedelta(seconds=cfg.embeddings.min_dwell_s)
    if now() < free_at:
        raise BusyError(
            f"busy: switch to version {champion.version} since {since:%Y-%m-%dT%H:%M:%SZ}; servers may read the other slot "
            f"until {free_at:%H:%M:%SZ} (embeddings.min_dwell_s = {cfg.embeddings.min_dwell_s:g}); plan the fill after that"
        )


def _refuse_if_filling(cfg: Config, holders: list[ModelVersion]) -> None:
    limit = timedelta(seconds=cfg.embeddings.fill_timeout_s)
    for holder in holders:
        if holder.tags[registry.STATE] != FILLING:
            continue
        seen = datetime.fromisoformat(holder.tags[registry.FILL_SEEN_AT])
        if now() < seen + limit:
            raise BusyError(
                f"busy: fill of version {holder.version} by {holder.tags[registry.FILLED_BY]} since {seen:%Y-%m-%dT%H:%M:%SZ}; "
                f"wait for its cut-over, or until it has been silent for embeddings.fill_timeout_s = {limit.total_seconds():g}"
            )


def _filling_tags(slot: str, day: date, run: str) -> dict[str, str | None]:
    return {
        registry.COMPLETE_THROUGH: None,
        registry.CUT_OVER_AT: None,
        registry.SLOT: slot,
        registry.FILL_DAY: day.isoformat(),
        registry.FILLED_BY: run,
        registry.FILL_SEEN_AT: now().isoformat(),
        registry.STATE: FILLING,
    }
