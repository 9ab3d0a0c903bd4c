"""Entities user and item, their snapshots as feature views, two slots of meta embeddings a task kind, and the services.

Names, columns and types come from `limaml.schema`; where the files lie and which task kinds there are, from the configuration
named by LIMAML_CONFIG (the default one if unset). Relative paths are taken from the project's root. No view has a time to
live: Feast does not hold it on online reads, and freshness is judged by the service (contract 3).
"""

import functools
import os
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
from feast import Entity, FeatureService, FeatureView, Field, FileSource
from feast.data_format import ParquetFormat
from feast.types import Array, FeastType, Float32, Float64, Int64, String, UnixTimestamp
from feast.value_type import ValueType

from limaml import config, schema
from limaml.io.storage import Storage

_ROOT = Path(__file__).parents[1]
_CONFIG = config.load(os.environ.get("LIMAML_CONFIG", _ROOT / "configs" / "movielens.toml"))
_STORAGE_ROOT = _CONFIG.storage.root
_STORAGE = Storage(_STORAGE_ROOT if "://" in _STORAGE_ROOT else str(_ROOT / _STORAGE_ROOT))

_TYPES: dict[pa.DataType, FeastType] = {
    pa.string(): String,
    pa.int64(): Int64,
    pa.float32(): Float32,
    pa.float64(): Float64,
    schema.TIMESTAMP: UnixTimestamp,
    pa.list_(pa.string()): Array(String),
    pa.list_(pa.int64()): Array(Int64),
}

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)
_ENTITIES = {"user_id": user, "item_id": item}


def _source(name: str, pattern: str, timestamp: str) -> FileSource:
    return FileSource(name=name, path=_STORAGE.path(pattern), file_format=ParquetFormat(), timestamp_field=timestamp)


# Both slots of a kind are filled from the same partitions; which model version went where is the registry's knowledge.
_EMBEDDINGS = {
    kind.name: _source(f"meta_embeddings_{kind.name}", f"embeddings/kind={kind.name}/version=*/dt=*/shard-*.parquet", "as_of")
    for kind in _CONFIG.task_kinds
}


def _snapshot_view(table: schema.Table, source: FileSource, *keys: str) -> FeatureView:
    fields = [Field(name=c.name, dtype=_TYPES[c.type]) for c in table.columns if c.name != "event_timestamp"]
    return FeatureView(name=table.name, entities=[_entity(key) for key in keys], schema=fields, source=source, ttl=timedelta(0))


@functools.cache
def _snapshots(subject: str) -> FileSource:
    return _source(f"{subject}_snapshots", f"snapshots/{subject}/dt=*/part.parquet", "event_timestamp")


def _entity(key: str) -> Entity:
    """One that is there, or of a category."""
    return _ENTITIES.setdefault(key, Entity(name=key, join_keys=[key], value_type=ValueType.STRING))


def _embedding_view(kind: config.TaskKindConfig, slot: str) -> FeatureView:
    table = schema.embeddings(kind.entity_column, _CONFIG.model.embedding_dim)
    types = {c.name: _TYPES.get(c.type, Array(Float32)) for c in table.columns}
    names = (kind.entity_column, *schema.EMBEDDING_FEATURE_NAMES)
    return FeatureView(
        name=schema.embedding_view(kind.name, slot),
        entities=[_entity(kind.entity_column)],
        schema=[Field(name=name, dtype=types[name]) for name in names],
        source=_EMBEDDINGS[kind.name],
        ttl=timedelta(0),
    )


_TABLES = schema.tables(_CONFIG.features)
user_features = _snapshot_view(_TABLES.snapshots("user"), _snapshots("user"), "user_id")
item_features = _snapshot_view(_TABLES.snapshots("item"), _snapshots("item"), "item_id")
training = FeatureService(name=schema.TRAINING_SERVICE, features=[user_features, item_features])
_features = [user_features, item_features]

# Feast finds module-level objects only, and their names here do not matter to it.
# By attributes of items: offline one row a user and key, online one a user, which is made of them.
for _affinity in _TABLES.affinities:
    globals()[_affinity.name] = _snapshot_view(_affinity.snapshots, _snapshots(_affinity.name), "user_id", _affinity.by)
    globals()[f"entity_{_affinity.by}"] = _entity(_affinity.by)
if _TABLES.affinities:
    user_affinities = _snapshot_view(_TABLES.affinity_rows, _snapshots(_TABLES.affinities[0].name), "user_id")
    _features.append(user_affinities)
for _slot in schema.SLOTS:
    _views = [_embedding_view(_kind, _slot) for _kind in _CONFIG.task_kinds]
    globals().update({_view.name: _view for _view in _views})
    globals()[schema.ranking_service(_slot)] = FeatureService(
        name=schema.ranking_service(_slot), features=[*_features, *_views]
    )
