"""One day's changed entities: adapt them, publish them, then say that the day is complete (contracts 3 and 5).

Both the champion and the version before it, while it is `ready`, are served with every day after their own `complete_through`,
up to the given one: in order, without gaps, each moving `complete_through` once its changed entities were published and read
back. A day that is covered already and unchanged changes nothing. A corrected one re-adapts exactly the entities whose rows
differ, as of `complete_through`, which stays.

A version has its steps to itself: that one is up to date does not stop the other, and the champion comes first, so that what
fails for the version before it stops nobody who is served.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from limaml import registry, schema
from limaml.config import Config, TaskKindConfig
from limaml.embeddings.context import EmbeddingContext
from limaml.embeddings.partition import Adaptation, Partition, read_covered, read_partition, write_covered, write_partition
from limaml.embeddings.publish import OnlineView, publish, publish_features, require_published
from limaml.embeddings.slot_state import complete_through, kinds_of, ready_beside
from limaml.errors import DataError, LimamlError, NothingToDo
from limaml.events import snapshots
from limaml.events.day_store import DayManifest, EventStore
from limaml.io.lease import Held
from limaml.registry import ModelVersion
from limaml.telemetry import get_logger

if TYPE_CHECKING:
    from feast import FeatureStore

Manifests = dict[date, DayManifest]
_log = get_logger(__name__)
_ONE_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Step:
    """What one day changes online for one version."""

    store: EventStore
    version: ModelVersion
    day: date
    as_of: datetime
    is_new: bool
    """Whether the day moves `complete_through`; otherwise it corrects rows as of it."""
    revision: int
    """Of the day's events; 0 if the source has no such day."""
    covered: int
    """Revision that the version's online rows hold; 0 for a day that is not complete yet, whatever was written of it."""
    categories: tuple[str, ...]
    """Categories that task kinds hang on."""
    events: str
    """Digest of the revisions of all days that the rows are made from."""

    def partition(self, kind: TaskKindConfig) -> Partition:
        # A correction gets a file of its own: the one of the day's first publication, or of the fill, stays what it was.
        stem = "shard-000" if self.is_new else f"shard-000-r{self.revision:04d}"
        return Partition(kind, self.version.version, self.day, stem)

    @property
    def inputs(self) -> dict[str, str | int]:
        return {"events": self.events, "revision": self.revision}

    @cached_property
    def changed(self) -> dict[str, pa.Array]:
        """Entities, by column, whose rows of the day differ from what the version's online rows hold; read once."""
        return self.store.changed_entities(self.day, self.revision, self.covered, self.categories)


@dataclass(frozen=True)
class Published:
    """Rows that steps published: of embeddings looked at, of them written, of features written."""

    entities: int = 0
    written: int = 0
    features: int = 0

    def __add__(self, other: "Published") -> "Published":
        return Published(self.entities + other.entities, self.written + other.written, self.features + other.features)


def adapt_day(cfg: Config, day: date) -> dict[str, Any]:
    """Write the embeddings of the entities that `day` changed, for each version that it is to be published for.

    Nothing online changes. Raises NothingToDo without a champion or if the day is covered and unchanged, DataError if a day
    before it is missing. What fails for the version before the champion is logged and left to `publish_day` to raise.
    """
    context = EmbeddingContext.of(cfg)
    manifests = _manifests(context, day)
    done = Adaptation()
    paths: list[str] = []
    results: list[dict[str, Any]] = []
    versions = _published_for(context)
    for version in versions:
        try:
            steps = _steps(context, manifests, version, day)
            adapted = _adapt(context, steps)
        except LimamlError as error:
            if not results:
                raise
            _log.error("previous_version_not_adapted", model_version=version.version, day=day.isoformat(), error=str(error))
            results.append({"version": version.version, "error": str(error)[:500]})
            continue
        if steps:
            done += adapted
            results.append(_result(steps) | {"entities": adapted.entities})
            kinds = kinds_of(version, cfg)[::-1]
            paths += [_path(context, steps[-1], kind) for kind in kinds if len(steps[-1].changed[kind.entity_column])]
            _log.info("day_adapted", model_version=version.version, day=day.isoformat(), **adapted.figures)
    _require_work(results, versions, day)
    return {"day": day.isoformat(), **done.figures, "versions": results, "paths": paths}


def publish_day(cfg: Config, day: date, run: str, published: Callable[[], object] = bool) -> dict[str, Any]:
    """Publish the day's snapshots, then the embeddings of its entities, read them back, and mark the day complete.

    For each version after another; for a version that became the champion after the day was adapted, it is adapted here first.
    `published` is called once the champion has the day and something was published, whatever fails for the version beside it.
    Raises NothingToDo without a champion or if the day is covered and unchanged; DataError if a day before it is missing or the
    embeddings were not adapted for this version, these events and `complete_through`.
    """
    context = EmbeddingContext.of(cfg)
    total, results = Published(), []
    try:
        with context.writing("publish", run) as held:
            manifests = _manifests(context, day)
            versions = _published_for(context)
            for version in versions:
                steps = _steps(context, manifests, version, day)
                if steps:
                    if version is versions[0] and _was_switched_to(context, manifests, steps[-1], versions):
                        _adapt(context, steps)
                    done = _publish(context, held, steps)
                    total += done
                    results.append(_result(steps) | {"entities": done.entities, "written": done.written})
    finally:
        if results:
            published()
    _require_work(results, versions, day)
    figures = {"entities": total.entities, "written": total.written, "features_written": total.features}
    return {"day": day.isoformat(), **figures, "versions": results}


def _was_switched_to(context: EmbeddingContext, manifests: Manifests, step: Step, versions: Sequence[ModelVersion]) -> bool:
    """Whether a cut-over came between a run's adaptation and its publication: only the version that it left has the day."""
    if _is_adapted(context, step):
        return False
    left = [_steps(context, manifests, version, step.day) for version in versions[1:]]
    return any(steps and _is_adapted(context, steps[-1]) for steps in left)


def _is_adapted(context: EmbeddingContext, step: Step) -> bool:
    changed = [kind for kind in kinds_of(step.version, context.cfg) if len(step.changed[kind.entity_column])]
    return bool(changed) and all(context.storage.exists(step.partition(kind).manifest_path) for kind in changed)


def catch_up(context: EmbeddingContext, held: Held, version: ModelVersion, through: date) -> int:
    """Adapt and publish for `version` what it lacks up to `through`; returns the number of days.

    First the corrections of days that it is complete for, then the days after them. Raises DataError for a day that is missing.
    """
    manifests = EventStore(context.storage, context.tables.events).manifests()
    steps = [*_corrections(context, manifests, version), *_new_days(context, manifests, version, through)]
    if steps:
        _adapt(context, steps)
        _publish(context, held, steps)
    return len(steps)


def _published_for(context: EmbeddingContext) -> list[ModelVersion]:
    """The champion, and the version before it while that is ready."""
    champion = context.registry.champion()
    if champion is None:
        raise NothingToDo("there is no champion to publish for; limaml_train makes the first one")
    previous = ready_beside(context.registry, champion)
    return [champion, previous] if previous else [champion]


def _require_work(results: Sequence[Any], versions: Sequence[ModelVersion], day: date) -> None:
    if not results:
        names = " and ".join(version.version for version in versions)
        raise NothingToDo(f"day {day} is online for version {names} already, and unchanged")


def _steps(context: EmbeddingContext, manifests: Manifests, version: ModelVersion, day: date) -> list[Step]:
    """What a daily run for `day` has to do for one version, in order."""
    if schema.day_start(day) < complete_through(version):
        return [step for step in _corrections(context, manifests, version) if step.day == day]
    return _new_days(context, manifests, version, day)


def _corrections(context: EmbeddingContext, manifests: Manifests, version: ModelVersion) -> list[Step]:
    """Days whose events are not those that the version's online rows hold."""
    through = complete_through(version)
    covered = [read_covered(context.storage, kind, version.version) for kind in kinds_of(version, context.cfg)]
    found = []
    for day, manifest in manifests.items():
        held = min(days.get(day.isoformat(), 0) for days in covered)
        if schema.day_start(day) < through and _revision(manifest) != held:
            found.append(_step(context, manifests, version, manifest, through, is_new=False, covered=held))
    return found


def _new_days(context: EmbeddingContext, manifests: Manifests, version: ModelVersion, through: date) -> list[Step]:
    """Every day after `complete_through`, up to `through`. Raises DataError if one of them has not passed its gate."""
    steps, day = [], complete_through(version).date()
    while day <= through:
        manifest = manifests.get(day)
        if manifest is None or manifest.status == "quarantined":
            raise DataError(
                f"day {through} must follow without a gap: version {version.version} is complete through {day - _ONE_DAY}, and "
                f"{day} {_state(manifest)}; run limaml_daily for {day} first"
            )
        steps.append(_step(context, manifests, version, manifest, schema.day_end(day), is_new=True, covered=0))
        day += _ONE_DAY
    return steps


def _step(
    context: EmbeddingContext,
    manifests: Manifests,
    version: ModelVersion,
    manifest: DayManifest,
    as_of: datetime,
    *,
    is_new: bool,
    covered: int,
) -> Step:
    revisions = {day.isoformat(): _revision(m) for day, m in manifests.items() if schema.day_start(day) < as_of}
    digest = hashlib.sha256(json.dumps(revisions, sort_keys=True).encode()).hexdigest()
    store = EventStore(context.storage, context.tables.events)
    columns = {kind.entity_column for kind in context.cfg.task_kinds} - {"user_id", "item_id"}
    return Step(store, version, manifest.day, as_of, is_new, _revision(manifest), covered, tuple(sorted(columns)), digest)


def _manifests(context: EmbeddingContext, day: date) -> Manifests:
    """What is known of every day. Raises DataError if `day` has not passed its gate."""
    manifests = EventStore(context.storage, context.tables.events).manifests()
    found = manifests.get(day)
    if found is None or found.status == "quarantined":
        raise DataError(
            f"day {day} must have passed its gate before it is published, but it {_state(found)}; ingest it (again)"
        )
    return manifests


def _revision(manifest: DayManifest) -> int:
    """Of the day's events in the store; a refused day counts its refusals, and has none."""
    return manifest.revision if manifest.status == "passed" else 0


def _state(manifest: DayManifest | None) -> str:
    return f"is in quarantine ({', '.join(manifest.failed)})" if manifest else "was not ingested"


def _adapt(context: EmbeddingContext, steps: Sequence[Step]) -> Adaptation:
    """Write the partitions of the steps, all of one version."""
    done, bundle = Adaptation(), None
    for step in steps:
        for kind in kinds_of(step.version, context.cfg):
            changed = step.changed[kind.entity_column].to_pylist()
            if changed:
                bundle = bundle or context.bundle(step.version.version)
                where = step.partition(kind)
                done += write_partition(context.cfg, context.storage, bundle, where, changed, step.as_of, step.inputs)
    return done


def _publish(context: EmbeddingContext, held: Held, steps: Sequence[Step]) -> Published:
    store, done = context.store(), Published()
    for step in steps:
        done += _publish_step(context, held, store, step)
    return done


def _publish_step(context: EmbeddingContext, held: Held, store: "FeatureStore", step: Step) -> Published:
    """Features, then embeddings, then what says that they are online. The lease is checked before each write.

    One kind after another, the first one last: what it is complete through, all of them are.
    """
    batch_rows, version = context.cfg.embeddings.write_batch_rows, step.version
    tables = [(kind, _adapted(context, step, kind)) for kind in kinds_of(version, context.cfg)]
    tags = registry.complete_through_tags([kind.name for kind in context.cfg.task_kinds])
    done = Published(features=publish_features(context, store, _day_features(context, step), held))
    for kind, table in tables:
        if table is not None:
            view = OnlineView(store, schema.embedding_view(kind.name, version.tags[registry.SLOT]))
            written = publish(view, table, held, batch_rows)
            require_published(view, table, batch_rows)
            done += Published(table.num_rows, written.num_rows)
        covered = read_covered(context.storage, kind, version.version)
        held.check()
        write_covered(context.storage, kind, version.version, covered | {step.day.isoformat(): step.revision})
        if step.is_new:
            context.tag(held, version.version, {tags[kind.name]: step.as_of.isoformat()})
    _log.info(
        "day_published",
        model_version=version.version,
        day=step.day.isoformat(),
        corrected=not step.is_new,
        written=done.written,
        features=done.features,
    )
    return done


def _adapted(context: EmbeddingContext, step: Step, kind: TaskKindConfig) -> pa.Table | None:
    """The step's rows, None if it changes no entity."""
    if not len(step.changed[kind.entity_column]):
        return None
    return read_partition(context.storage, step.partition(kind), step.as_of, step.inputs)


def _day_features(context: EmbeddingContext, step: Step) -> dict[str, pa.Table]:
    """Snapshots stamped with the day's end; of a corrected day, the newest of every entity it changed."""
    last, kinds = step.as_of.date() - _ONE_DAY, context.kinds.items()
    if step.is_new:
        rows = {name: snapshots.changed(context.storage, kind, step.day) for name, kind in kinds}
    else:
        rows = {name: snapshots.latest(context.storage, kind, last, step.changed[kind.key]) for name, kind in kinds}
    return rows | context.affinities(rows["user"], last)


def _path(context: EmbeddingContext, step: Step, kind: TaskKindConfig) -> str:
    return context.storage.path(step.partition(kind).path)


def _result(steps: Sequence[Step]) -> dict[str, Any]:
    last = steps[-1]
    return {
        "version": last.version.version,
        "days": len(steps),
        "as_of": last.as_of.isoformat(),
        "revision": last.revision,
        "corrected": not last.is_new,
    }
