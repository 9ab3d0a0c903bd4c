"""Move the champion to the version in the other slot, forward or back (contract 4).

    cut_over    check that every planned entity of a fill is online, catch up, then tags, and the alias `champion` last
    rollback    the version that is ready beside the champion: catch up, then tags, and the alias last

Catching up publishes for the target what it lacks up to the champion's `complete_through`, with the daily run's own code. The
version that was left stays `ready` and is kept up to date by daily runs, until its slot is filled with another one.
"""

from datetime import date
from typing import Any

from limaml import registry, schema
from limaml.config import Config
from limaml.embeddings.context import EmbeddingContext
from limaml.embeddings.daily import catch_up
from limaml.embeddings.partition import FillPlan, read_partition, read_plan, write_covered
from limaml.embeddings.publish import OnlineView, require_published
from limaml.embeddings.slot_state import READY, complete_day, filling, idle_slot, now, ready_beside
from limaml.errors import DataError, StoreError
from limaml.io.lease import Held
from limaml.registry import ModelVersion
from limaml.telemetry import get_logger

_log = get_logger(__name__)


def cut_over(cfg: Config, version: str, run: str) -> dict[str, Any]:
    """Make `version` the champion once every planned entity is online, bit for bit, and it has the champion's days.

    A repeated call changes nothing. Raises StoreError if a planned entity is missing or differs, DataError if the version
    cannot be caught up.
    """
    context = EmbeddingContext.of(cfg)
    with context.writing("cut-over", run) as held:
        target, champion = context.registry.get(version), context.registry.champion()
        if champion is not None and champion.version == version:
            return _result(target, "unchanged")
        slot, day = filling(target, or_ready=True)
        if registry.COMPLETE_THROUGH not in target.tags:
            _accept_fill(context, held, version, slot, day)
        return _move_champion(context, held, version, champion, "cut_over")


def rollback(cfg: Config, version: str | None, run: str) -> dict[str, Any]:
    """Make the version that is ready beside the champion the champion, as fresh as the champion is.

    The one that is left stays ready, so the same call again goes forward. With `version` a repeated call changes nothing.
    Raises StoreError if there is no such version, DataError if it cannot be caught up.
    """
    context = EmbeddingContext.of(cfg)
    with context.writing("rollback", run) as held:
        champion = context.registry.champion()
        if champion is None:
            raise StoreError("roll-back needs a champion to go back from, but there is none; limaml_train makes the first one")
        if champion.version == version:
            return _result(champion, "unchanged")
        target = ready_beside(context.registry, champion)
        if target is None or version not in (None, target.version):
            raise StoreError(_no_target(context, champion, version))
        return _move_champion(context, held, target.version, champion, "rolled_back")


def _move_champion(
    context: EmbeddingContext, held: Held, version: str, champion: ModelVersion | None, status: str
) -> dict[str, Any]:
    target = context.registry.get(version)
    days = _catch_up(context, held, target, champion) if champion else 0
    context.tag(held, version, {registry.STATE: READY, registry.CUT_OVER_AT: now().isoformat()})
    held.check()
    context.registry.set_champion(version)
    result = _result(context.registry.get(version), status)
    left = champion.version if champion else None
    _log.info(status, model_version=version, previous=left, days=days, complete_through=result["complete_through"])
    return result | {"previous": left, "days_caught_up": days}


def _catch_up(context: EmbeddingContext, held: Held, target: ModelVersion, champion: ModelVersion) -> int:
    through = max(complete_day(target), complete_day(champion))
    try:
        return catch_up(context, held, target, through)
    except DataError as error:
        raise DataError(
            f"version {target.version} is complete through {complete_day(target)}, the champion {champion.version} through "
            f"{complete_day(champion)}, and what it lacks could not be published: {error}; version {champion.version} stays "
            f"the champion; once that is put right run this again, or fill version {target.version} anew with limaml plan-fill"
        ) from error


def _accept_fill(context: EmbeddingContext, held: Held, version: str, slot: str, day: date) -> None:
    """Check the fill and say what it covers. From here on its rows are replaced by newer ones, so it is checked only once."""
    store = context.store()
    for kind in context.cfg.task_kinds:
        plan = read_plan(context.storage, kind, version, day)
        _require_complete(context, plan, OnlineView(store, schema.embedding_view(kind.name, slot)))
        held.check()
        write_covered(context.storage, kind, version, plan.revisions)
    tags = registry.complete_through_tags([kind.name for kind in context.cfg.task_kinds]).values()
    context.tag(held, version, dict.fromkeys(tags, schema.day_end(day).isoformat()))


def _require_complete(context: EmbeddingContext, plan: FillPlan, view: OnlineView) -> None:
    """Every planned entity is in a partition that passed its gate, and online exactly as it is there."""
    as_of, inputs = schema.day_end(plan.day), {"plan": plan.digest}
    found: set[str] = set()
    for shard in range(plan.num_shards):
        table = read_partition(context.storage, plan.shard(shard), as_of, inputs)
        require_published(view, table, context.cfg.embeddings.write_batch_rows)
        found.update(table[plan.kind.entity_column].to_pylist())
    missing = sorted(set(plan.entities) - found)
    if missing:
        raise StoreError(
            f"fill of version {plan.version} must hold its {len(plan.entities)} planned entities, {len(missing)} are missing, "
            f"e.g. {missing[0]}; fill its shards again"
        )


def _no_target(context: EmbeddingContext, champion: ModelVersion, version: str | None) -> str:
    slot = idle_slot(champion)
    held = context.registry.find(registry.SLOT, slot)
    holder = f"holds version {held[0].version}, {held[0].tags.get(registry.STATE)}" if held else "was never filled"
    wanted = "a version" if version is None else f"version {version}"
    return (
        f"roll-back needs {wanted} that is ready beside the champion {champion.version}, but slot {slot} {holder}; to go back "
        "to any other version fill it again: limaml plan-fill, fill, cut-over"
    )


def _result(version: ModelVersion, status: str) -> dict[str, Any]:
    names = {"slot": registry.SLOT, "complete_through": registry.COMPLETE_THROUGH}
    return {"status": status, "version": version.version} | {key: version.tags[tag] for key, tag in names.items()}
