"""One day's changed entities: adapt them, publish them, then say that the day is complete (contracts 3 and 5).

The day after the champion's `complete_through` moves it, once every changed entity was published and read back. A day that is
covered already and unchanged changes nothing. A corrected one re-adapts exactly the entities whose rows differ, as of
`complete_through`, which stays. Publishing the previous version too, while it is `ready`, belongs beside `publish_day`.
"""

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa

from limaml import registry, schema
from limaml.config import Config, TaskKindConfig
from limaml.data import snapshots
from limaml.data.events import DayManifest, EventStore
from limaml.embeddings.partition import Adapted, Partition, read_covered, read_partition, write_covered, write_partition
from limaml.embeddings.publish import OnlineView, publish, require_published
from limaml.embeddings.slots import Places, complete_through, publish_features
from limaml.errors import DataError, NothingToDo
from limaml.registry import ModelVersion
from limaml.telemetry import get_logger

_log = get_logger(__name__)
_ONE_DAY = timedelta(days=1)


@dataclass(frozen=True)
class DayPlan:
    """What a day changes online for one version."""

    version: ModelVersion
    day: date
    as_of: datetime
    revision: int
    """Of the day's events; 0 if the source has no such day."""
    covered: int
    """Revision that the version's online rows hold; 0 for a day that is not complete yet, whatever was written of it."""

    @property
    def is_new(self) -> bool:
        """Whether the day moves `complete_through`."""
        return self.as_of == schema.day_end(self.day) and self.as_of > complete_through(self.version)

    def partition(self, kind: TaskKindConfig) -> Partition:
        # A correction gets a file of its own: the one of the day's first publication, or of the fill, stays what it was.
        stem = "shard-000" if self.is_new else f"shard-000-r{self.revision:04d}"
        return Partition(kind, self.version.version, self.day, stem)

    @property
    def inputs(self) -> dict[str, str | int]:
        return {"revision": self.revision}


def adapt_day(cfg: Config, day: date) -> dict[str, Any]:
    """Write the champion's embeddings of the entities that `day` changed; nothing online changes.

    Raises NothingToDo without a champion or if the day is covered and unchanged, DataError if a day before it is missing.
    """
    places = Places.of(cfg)
    plan = _plan_day(places, day)
    done, paths = Adapted(), []
    for kind in cfg.task_kinds:
        changed = _changed(places, plan, kind.entity_column)
        if changed:
            bundle = places.bundle(plan.version.version)
            where = plan.partition(kind)
            done += write_partition(cfg, places.storage, bundle, where, changed, plan.as_of, plan.inputs)
            paths.append(places.storage.path(where.path))
    _log.info("day_adapted", model_version=plan.version.version, day=day.isoformat(), **done.figures)
    return {**_result(plan), **done.figures, "paths": paths}


def publish_day(cfg: Config, day: date, run: str) -> dict[str, Any]:
    """Publish the day's snapshots, then the champion's embeddings of its entities, read them back, and mark the day complete.

    Raises NothingToDo without a champion or if the day is covered and unchanged; DataError if a day before it is missing or
    the embeddings were not adapted for this champion and `complete_through`.
    """
    places, settings = Places.of(cfg), cfg.embeddings
    with places.writing("publish", run) as held:
        plan = _plan_day(places, day)
        tables = {kind.name: _adapted(places, plan, kind) for kind in cfg.task_kinds}
        store = places.store()
        features = publish_features(places, store, _day_features(places, plan), held)
        written = 0
        for kind in cfg.task_kinds:
            view = OnlineView(store, schema.embedding_view(kind.name, plan.version.tags[registry.SLOT]))
            written += publish(view, tables[kind.name], held, settings.write_batch_rows).num_rows
            require_published(view, tables[kind.name], settings.write_batch_rows)
            covered = read_covered(places.storage, kind, plan.version.version)
            write_covered(places.storage, kind, plan.version.version, covered | {day.isoformat(): plan.revision})
        held.check()
        if plan.is_new:
            places.registry.set_tags(plan.version.version, {registry.COMPLETE_THROUGH: plan.as_of.isoformat()})
    entities = sum(table.num_rows for table in tables.values())
    _log.info("day_published", model_version=plan.version.version, day=day.isoformat(), written=written, features=features)
    return {**_result(plan), "entities": entities, "written": written, "features_written": features}


def _plan_day(places: Places, day: date) -> DayPlan:
    champion = places.registry.champion()
    if champion is None:
        raise NothingToDo("there is no champion to publish for; limaml_train makes the first one")
    manifest = _manifest(places, day)
    revision = manifest.revision if manifest.status == "passed" else 0
    covered = min(
        read_covered(places.storage, kind, champion.version).get(day.isoformat(), 0) for kind in places.cfg.task_kinds
    )
    through = complete_through(champion)
    if schema.day_start(day) < through:
        if revision == covered:
            raise NothingToDo(f"day {day} is online for version {champion.version} already, and unchanged")
        return DayPlan(champion, day, through, revision, covered)
    _refuse_gap(places, champion, day)
    return DayPlan(champion, day, schema.day_end(day), revision, covered=0)


def _manifest(places: Places, day: date) -> DayManifest:
    manifest = EventStore(places.storage).manifest(day)
    if manifest is None or manifest.status == "quarantined":
        state = f"is in quarantine ({', '.join(manifest.failed)})" if manifest else "was not ingested"
        raise DataError(f"day {day} must have passed its gate before it is published, but it {state}; ingest it (again)")
    return manifest


def _refuse_gap(places: Places, champion: ModelVersion, day: date) -> None:
    """Every day between `complete_through` and `day` must be known to have no data."""
    events, before = EventStore(places.storage), complete_through(champion).date()
    while before < day:
        manifest = events.manifest(before)
        if manifest is None or manifest.status != "no_data":
            raise DataError(
                f"day {day} must follow without a gap: version {champion.version} is complete through {before - _ONE_DAY}, and "
                f"{before} is not online; run limaml_daily for {before} first"
            )
        before += _ONE_DAY


def _changed(places: Places, plan: DayPlan, column: str) -> list[str]:
    """Entities whose rows of the day differ from what the version's online rows hold."""
    if plan.revision == 0:
        return []
    return EventStore(places.storage).changed_entities(plan.day, column, since=plan.covered)


def _adapted(places: Places, plan: DayPlan, kind: TaskKindConfig) -> pa.Table:
    changed = _changed(places, plan, kind.entity_column)
    if not changed:
        return schema.embeddings(kind.entity_column, places.cfg.model.embedding_dim).arrow.empty_table()
    return read_partition(places.storage, plan.partition(kind), plan.as_of, plan.inputs)


def _day_features(places: Places, plan: DayPlan) -> dict[str, pa.Table]:
    """Snapshots stamped with the day's end; of a corrected day, the newest of every entity it changed."""
    if plan.is_new:
        return {kind: snapshots.changed(places.storage, kind, plan.day) for kind in ("user", "item")}
    last = plan.as_of.date() - _ONE_DAY
    changed = {kind: _changed(places, plan, f"{kind}_id") for kind in ("user", "item")}
    return {kind: snapshots.latest(places.storage, kind, last, entities) for kind, entities in changed.items()}


def _result(plan: DayPlan) -> dict[str, Any]:
    return {
        "version": plan.version.version,
        "day": plan.day.isoformat(),
        "as_of": plan.as_of.isoformat(),
        "revision": plan.revision,
        "corrected": not plan.is_new,
    }
