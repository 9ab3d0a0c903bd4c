"""Which columns there are: those that every data set has, and those that the declared features make."""

from limaml.schema.affinities import Affinity
from limaml.schema.columns import (
    AFFINITY_VIEW,
    EMBEDDING_FEATURE_NAMES,
    EVENT_ORDER,
    EVENTS,
    FETCHED_EMBEDDING,
    ITEM_VIEW,
    SLOTS,
    TIMESTAMP,
    TRAINING_SERVICE,
    USER_VIEW,
    Column,
    Table,
    day_end,
    day_start,
    embedding_view,
    embeddings,
    ranking_service,
)
from limaml.schema.declared import Tables, arrow_type, clock_value, rate_feature, tables

__all__ = [
    "AFFINITY_VIEW",
    "EMBEDDING_FEATURE_NAMES",
    "EVENTS",
    "EVENT_ORDER",
    "FETCHED_EMBEDDING",
    "ITEM_VIEW",
    "SLOTS",
    "TIMESTAMP",
    "TRAINING_SERVICE",
    "USER_VIEW",
    "Affinity",
    "Column",
    "Table",
    "Tables",
    "arrow_type",
    "clock_value",
    "day_end",
    "day_start",
    "embedding_view",
    "embeddings",
    "ranking_service",
    "rate_feature",
    "tables",
]
