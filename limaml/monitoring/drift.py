"""Drift of the model's input features and of its scores on one day, against the champion's training window.

The window's histograms are computed once a version, from the logged events of its lineage's days, and kept. Scores of both
sides are as a service refreshed daily gives them (`limaml.evaluation.daily_replay`); those of the window are of its last days,
up to 5,000 rows. The network was trained on the window's rows and not on the day's, so a small score drift is there from the
start. Both sides are read for a sample of users, chosen by a hash, where there are more rows than are needed.

Vectors of items have no bins: the items of a sample of the window's rows are kept, and a statistic of two samples compares
their vectors with those of the day's rows (`limaml.monitoring.vector_drift`).

A day with fewer than `monitoring.min_drift_rows` rows is not measured, and its gauges are absent.

    drift/version=V/reference.json   the window's histograms, items  drift/dt=D/drift.json   what a day gave
"""

import math
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema, telemetry
from limaml.config import Config
from limaml.embeddings.context import EmbeddingContext
from limaml.errors import DataError, NothingToDo
from limaml.events.catalogue import item_vectors
from limaml.events.day_store import EventStore, partition, partition_files
from limaml.events.logged import read_logged
from limaml.events.recent import logged_rows, shard_of
from limaml.io.storage import Storage
from limaml.monitoring.export import Gauges
from limaml.monitoring.histograms import Histogram
from limaml.monitoring.vector_drift import sampled, vector_drift

if TYPE_CHECKING:
    from limaml.models.bundle import Bundle

_log = telemetry.get_logger(__name__)

MAX_ROWS = 50_000
"""Rows of a side, about: chance then gives an index of 0.0004 in ten bins."""
MAX_SCORED_ROWS = 5_000
MAX_SCORED_DAYS = 28


def measure_day(cfg: Config, day: date, gauges: Gauges) -> dict[str, Any]:
    """Measure the day's drift for the champion and set its gauges; a day that is too small is said to be, in the result.

    Raises NothingToDo without a champion, DataError if the day was not ingested.
    """
    context = EmbeddingContext.of(cfg)
    champion = context.registry.champion()
    if champion is None:
        raise NothingToDo("there is no champion whose training window a day could be compared with")
    manifest = EventStore(context.storage).manifest(day)
    if manifest is None or manifest.status == "quarantined":
        raise DataError(f"day {day} must have passed its gate before its drift is measured, but has not; ingest it (again)")
    result: dict[str, Any] = {"version": champion.version, "day": day.isoformat(), "rows": manifest.rows}
    if manifest.rows < cfg.monitoring.min_drift_rows:
        reason = f"fewer rows than monitoring.min_drift_rows = {cfg.monitoring.min_drift_rows}"
        _log.info("drift_not_measured", model_version=champion.version, day=day.isoformat(), rows=manifest.rows, reason=reason)
        return {**result, "measured": False, "reason": reason}
    bundle = context.bundle(champion.version)
    reference = _reference(context.storage, bundle, champion.version)
    logged = _logged(context.storage, bundle, day, day)
    rows = bundle.encoder.values(logged)
    features = {name: histogram.drift(pa.chunked_array([rows[name]])) for name, histogram in reference.features.items()}
    score = reference.scores.drift(_scores(context.storage, bundle, day, day))
    vectors = _vectors(context.storage, bundle, reference.items, sampled(logged["item_id"]))
    for name, value in features.items():
        gauges.set(telemetry.FEATURE_DRIFT_PSI, value, feature=name)
    for name, value in vectors.items():
        gauges.set(telemetry.VECTOR_DRIFT, value, feature=name)
    gauges.set(telemetry.SCORE_DRIFT_PSI, score)
    path = f"drift/{partition(day)}/drift.json"
    # A feature without any value has no index, and JSON no NaN.
    known, apart = (
        {name: None if math.isnan(value) else value for name, value in found.items()} for found in (features, vectors)
    )
    result |= {"measured": True, "score_psi": score, "feature_psi": known, "vector_energy": apart}
    context.storage.write_json(path, result)
    _log.info("drift_measured", model_version=champion.version, **{key: result[key] for key in ("day", "rows", "score_psi")})
    # A result holds 4 KiB, and there may be hundreds of features: they are in the file.
    del result["feature_psi"], result["vector_energy"]
    return {**result, "path": context.storage.path(path)}


@dataclass(frozen=True)
class _Reference:
    """What a version's days are compared with."""

    features: dict[str, Histogram]
    scores: Histogram
    items: list[str]
    """Of a sample of the window's rows."""


def _reference(storage: Storage, bundle: "Bundle", version: str) -> _Reference:
    """Of the version's training window, computed at the first call."""
    path = f"drift/version={version}/reference.json"
    if not storage.exists(path) or "items" not in storage.read_json(path):
        days = sorted(date.fromisoformat(day) for day in bundle.lineage.get("days", {}))
        if not days:
            raise DataError(f"version {version} must name the days it was trained on in its lineage, got none; train it again")
        logged = _logged(storage, bundle, days[0], days[-1])
        scores = Histogram.fit(_scores(storage, bundle, _scored_from(storage, days), days[-1]))
        values = bundle.encoder.values(logged).items()
        fitted = {name: Histogram.fit(pa.chunked_array([column])).to_dict() for name, column in values}
        found = {"features": fitted, "scores": scores.to_dict(), "items": sampled(logged["item_id"])}
        storage.write_json(path, {"through": days[-1].isoformat(), **found})
    value = storage.read_json(path)
    features = {name: Histogram.from_dict(histogram) for name, histogram in value["features"].items()}
    return _Reference(features, Histogram.from_dict(value["scores"]), value["items"])


def _vectors(storage: Storage, bundle: "Bundle", before: list[str], now: list[str]) -> dict[str, float]:
    """Every declared vector with its statistic."""
    tables = schema.tables(bundle.config.features)
    items = item_vectors(storage, tables)
    return {} if items is None else {each.name: vector_drift(each.name, items, before, now) for each in tables.vectors}


def _scored_from(storage: Storage, days: list[date]) -> date:
    """First of the last days that together have `MAX_SCORED_ROWS` rows, at most `MAX_SCORED_DAYS` of them."""
    manifests, rows = EventStore(storage).manifests(), 0
    for day in reversed(days[-MAX_SCORED_DAYS:]):
        rows += manifests[day].rows
        if rows >= MAX_SCORED_ROWS:
            return day
    return days[-MAX_SCORED_DAYS:][0]


def _scores(storage: Storage, bundle: "Bundle", first: date, through: date) -> pa.ChunkedArray:
    """Scores as served of the rows from `first` to `through`, each day with embeddings as of its start."""
    from limaml.evaluation.daily_replay import score_as_served

    kind, found = bundle.config.task_kind, []
    tables = schema.tables(bundle.config.features)
    encoder = bundle.encoder.with_items(item_vectors(storage, tables))
    asked = _sampled(storage, tables, first=first, through=through, limit=MAX_SCORED_ROWS)
    entities = pc.unique(asked[kind.entity_column]).to_pylist()
    known = read_logged(storage, tables, through=through, entities=(kind.entity_column, entities))
    for other in bundle.config.task_kinds[1:]:
        wanted, num_rows = pc.unique(asked[other.entity_column].drop_null()), bundle.config.support_rows_of(other.name)
        beside = _last_rows(storage, tables, other.entity_column, wanted, num_rows, first, through)
        known = pa.concat_tables([known, beside.filter(pc.invert(pc.is_in(beside["event_id"], value_set=known["event_id"])))])
    day = first
    while day <= through:
        start, end = (pa.scalar(instant, schema.TIMESTAMP) for instant in (schema.day_start(day), schema.day_end(day)))
        rows = asked.filter(pc.and_(pc.greater_equal(asked["timestamp"], start), pc.less(asked["timestamp"], end)))
        if rows.num_rows:
            history = known.filter(pc.less(known["timestamp"], start))
            found.append(score_as_served(bundle.network, encoder, rows, history, day=day, cfg=bundle.config))
        day += timedelta(days=1)
    return pa.chunked_array([pa.array(np.concatenate(found) if found else np.zeros(0))])


def _last_rows(
    storage: Storage, tables: schema.Tables, column: str, entities: pa.Array, num_rows: int, first: date, through: date
) -> pa.Table:
    """Logged rows of the entities of a column: those of the span, and the last ones before it, `num_rows` of each."""
    files, columns = partition_files(storage, "logged", through=through), tables.logged_events.arrow
    query = (
        f"SELECT logged.* FROM logged JOIN wanted USING ({column})"  # noqa: S608  names of the schema
        f" QUALIFY timestamp >= $first OR row_number() OVER"
        f" (PARTITION BY {column}, timestamp >= $first ORDER BY timestamp DESC, event_id DESC) <= $num_rows"
    )
    with logged_rows(storage, files, columns) as connection:
        connection.register("wanted", pa.table({column: entities}))
        found = connection.sql(query, params={"first": schema.day_start(first), "num_rows": num_rows}).to_arrow_table()
    return found.select(columns.names).cast(columns)


def _sampled(storage: Storage, tables: schema.Tables, *, first: date, through: date, limit: int) -> pa.Table:
    """Logged rows of a span: all, or those of a share of users, always the same ones, that have about `limit` rows."""
    manifests = EventStore(storage).manifests()
    num_rows = sum(manifest.rows for day, manifest in manifests.items() if first <= day <= through)
    one_in = -(-num_rows // limit)
    if one_in <= 1:
        return read_logged(storage, tables, first=first, through=through)
    users: set[str] = set()
    dataset = storage.dataset(partition_files(storage, "logged", first=first, through=through), tables.logged_events.arrow)
    for batch in dataset.to_batches(columns=["user_id"]):
        users.update(pc.unique(batch["user_id"]).to_pylist())
    chosen = sorted(user for user in users if shard_of(user, one_in) == 0)
    return read_logged(storage, tables, first=first, through=through, entities=("user_id", chosen))


def _logged(storage: Storage, bundle: "Bundle", first: date, through: date) -> pa.Table:
    """Rows of a span, about `MAX_ROWS` at most."""
    tables = schema.tables(bundle.config.features)
    return _sampled(storage, tables, first=first, through=through, limit=MAX_ROWS)
