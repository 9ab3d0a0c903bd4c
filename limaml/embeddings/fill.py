"""Fill the idle slot with a new model version's embeddings (contract 4).

    plan_fill   retire what held the idle slot, empty it, plan the shards, publish the features they are served with
    fill_shard  adapt, write the partition, gate, publish, read a sample back; shards in any order, each as often as needed

Then `cutover.cut_over` makes the version the champion, and `daily` keeps it up to date. Every step can be repeated and gives
the same end.
"""

from datetime import date, datetime, timedelta
from typing import Any

from limaml import registry, schema
from limaml.config import Config
from limaml.embeddings.adapt import active_entities
from limaml.embeddings.context import EmbeddingContext
from limaml.embeddings.partition import (
    Adaptation,
    FillPlan,
    read_partition,
    read_plan,
    write_partition,
    write_plan,
)
from limaml.embeddings.publish import OnlineView, publish, publish_features, require_published, sample
from limaml.embeddings.slot_state import FILLING, READY, RETIRED, complete_day, filling, idle_slot, now
from limaml.errors import BusyError, DataError, NothingToDo, StoreError
from limaml.events import snapshots
from limaml.events.day_store import EventStore
from limaml.registry import ModelVersion, Registry
from limaml.telemetry import get_logger

_log = get_logger(__name__)


def plan_fill(cfg: Config, version: str, through: date, run: str) -> dict[str, Any]:
    """Prepare the idle slot for `version`; returns version, slot, as_of_day and the list of shards.

    The fill's as-of day is `through` or, if that is later, the last day the champion is complete for. Raises BusyError while
    another version is being filled or servers may still read the slot, NothingToDo if `version` is the champion already.
    """
    context = EmbeddingContext.of(cfg)
    with context.writing("plan-fill", run) as held:
        champion = context.registry.champion()
        target = context.registry.get(version)
        if champion is not None and champion.version == version:
            raise NothingToDo(f"version {version} is the champion already")
        slot = idle_slot(champion)
        _refuse_before_dwell(cfg, champion)
        holders = _holders(context.registry, slot, version)
        _refuse_if_filling(cfg, holders)
        day = max([through, *([complete_day(champion)] if champion else [])])
        plans = _plan(context, version, day)
        for holder in [*holders, *([target] if registry.STATE in target.tags else [])]:
            context.tag(held, holder.version, {registry.STATE: RETIRED})
        store = context.store()
        for plan in plans:
            held.check()
            write_plan(context.storage, plan)
            held.check()
            OnlineView(store, schema.embedding_view(plan.kind.name, slot)).clear()
        features = {name: snapshots.latest(context.storage, kind, day) for name, kind in context.kinds.items()}
        features |= context.affinities(features["user"], day)
        written = publish_features(context, store, features, held)
        # The state is the last of them: a slot that was not emptied to the end cannot be filled.
        context.tag(held, version, _filling_tags(cfg, slot, day, run))
    entities = sum(len(plan.entities) for plan in plans)
    _log.info("fill_planned", model_version=version, slot=slot, day=day.isoformat(), entities=entities, features=written)
    shards = list(range(cfg.embeddings.num_shards))
    return {"version": version, "slot": slot, "as_of_day": day.isoformat(), "entities": entities, "shards": shards}


def fill_shard(cfg: Config, version: str, shard: int, run: str) -> dict[str, Any]:
    """Adapt and publish one shard of the version's fill; returns counts and the partition's path.

    Raises StoreError if the version is not being filled (any more).
    """
    context = EmbeddingContext.of(cfg)
    slot, day = _open_fill(context.registry.get(version))
    bundle = context.bundle_to_fill(version)
    as_of = schema.day_end(day)
    done, plans = Adaptation(), []
    for kind in cfg.task_kinds:
        plan = read_plan(context.storage, kind, version, day)
        if shard >= plan.num_shards:
            raise DataError(
                f"shard must be below the fill's {plan.num_shards} shards, got {shard}; take one of plan-fill's result"
            )
        inputs, entities = {"plan": plan.digest}, plan.shard_entities(shard)
        done += write_partition(cfg, context.storage, bundle, plan.shard(shard), entities, as_of, inputs)
        plans.append(plan)
    written = 0
    with context.writing("fill", run) as held:
        if _open_fill(context.registry.get(version)) != (slot, day):
            raise StoreError(f"version {version} was planned again while shard {shard} was adapted; fill its shards again")
        store = context.store()
        for plan in plans:
            table = read_partition(context.storage, plan.shard(shard), as_of, {"plan": plan.digest})
            view = OnlineView(store, schema.embedding_view(plan.kind.name, slot))
            written += publish(view, table, held, cfg.embeddings.write_batch_rows).num_rows
            require_published(view, sample(table, cfg.embeddings.read_back_rows), cfg.embeddings.write_batch_rows)
        context.tag(held, version, {registry.FILL_SEEN_AT: now().isoformat()})
    _log.info("shard_filled", model_version=version, slot=slot, shard=shard, written=written, **done.figures)
    paths = [context.storage.path(plan.shard(shard).path) for plan in plans]
    return {"version": version, "slot": slot, "shard": shard, **done.figures, "written": written, "paths": paths}


def _plan(context: EmbeddingContext, version: str, day: date) -> list[FillPlan]:
    revisions = EventStore(context.storage).lineage(day)
    shards = context.cfg.embeddings.num_shards
    return [
        FillPlan(
            kind,
            version,
            day,
            shards,
            revisions,
            tuple(active_entities(context.storage, context.tables, kind, schema.day_end(day))),
        )
        for kind in context.cfg.task_kinds
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


def _filling_tags(cfg: Config, slot: str, day: date, run: str) -> dict[str, str | None]:
    return {
        **dict.fromkeys(registry.complete_through_tags([kind.name for kind in cfg.task_kinds]).values()),
        registry.CUT_OVER_AT: None,
        registry.SLOT: slot,
        registry.FILL_DAY: day.isoformat(),
        registry.FILLED_BY: run,
        registry.FILL_SEEN_AT: now().isoformat(),
        registry.STATE: FILLING,
    }
