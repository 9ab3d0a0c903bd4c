"""How old the newest rows of the published entities are, from the champion's partitions."""

from datetime import datetime

import duckdb
import pyarrow as pa

from limaml import registry, schema, telemetry
from limaml.config import Config
from limaml.embeddings.published import published_files
from limaml.io.storage import Storage
from limaml.monitoring.export import Gauges

_DAY_US = 86_400_000_000
_STATE_DAYS = {"within_1d": 1, "within_7d": 7, "within_30d": 30}
"""Upper ends of telemetry.ENTITY_STATES, exclusive; `older` has none."""


def record_publication(cfg: Config, gauges: Gauges, now_s: float) -> None:
    """Gauges of a publication that ended at `now_s`: when it did, and the champion's entities by age of their newest row."""
    champion = registry.Registry(cfg.registry).champion()
    if champion is None:
        return
    tags = registry.complete_through_tags([kind.name for kind in cfg.task_kinds])
    storage = Storage(cfg.storage.root)
    for kind in cfg.task_kinds:
        if tags[kind.name] not in champion.tags:
            continue
        through = datetime.fromisoformat(champion.tags[tags[kind.name]])
        gauges.set(telemetry.LAST_PUBLISHED_SECONDS, now_s, kind=kind.name)
        files = published_files(storage, kind.name, champion.version)
        for state, count in entities_by_age(storage, files, kind.entity_column, through).items():
            gauges.set(telemetry.PUBLISHED_ENTITIES, count, kind=kind.name, state=state)


def entities_by_age(storage: Storage, files: list[str], entity_column: str, through: datetime) -> dict[str, int]:
    """State -> number of entities in the partitions `files`, by age at `through` of the newest event in their newest row.

    Rows made of data from after `through` are not published yet and are left out; an entity without an event is `older`.
    """
    columns = pa.schema([(entity_column, pa.string()), ("as_of", schema.TIMESTAMP), ("last_event_at", schema.TIMESTAMP)])
    # Of rows with one as_of (a correction re-adapts as of the same instant) the one with the later event stands.
    query = f"""
        SELECT ($through - epoch_us(max_by(last_event_at, (as_of, last_event_at)))) / {_DAY_US} AS days
        FROM embeddings WHERE epoch_us(as_of) <= $through GROUP BY {entity_column}
    """  # noqa: S608  names come from the schema
    bounds = ", ".join(f"count(*) FILTER (days < {days})" for days in _STATE_DAYS.values())
    with duckdb.connect() as connection:
        connection.register("embeddings", storage.dataset(files, columns))
        values = {"through": int(through.timestamp() * 1e6)}
        [row] = connection.execute(f"WITH ages AS ({query}) SELECT {bounds}, count(*) FROM ages", values).fetchall()  # noqa: S608
    below = [0, *row]
    return {state: below[at + 1] - below[at] for at, state in enumerate(telemetry.ENTITY_STATES)}
