"""Feast's Redis online store with a bulk path. Feast loads it by its class path; keys, hashes and reads are Feast's own."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from feast import FeatureView, RepoConfig
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, _versioned_fv_name
from google.protobuf.timestamp_pb2 import Timestamp
from redis.backoff import NoBackoff
from redis.retry import Retry

from limaml.data.online.rows import EntityReader, OnlineRow, Stored


class BulkRedisOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc]
    """Feast's own settings under another class path."""

    type: Literal["limaml.data.online.redis.BulkRedisOnlineStore"] = "limaml.data.online.redis.BulkRedisOnlineStore"


class BulkRedisOnlineStore(RedisOnlineStore):  # type: ignore[misc]
    """Rows are fields of one hash an entity, which its views share; one command reads or sets all fields of a row."""

    def read_rows(
        self, config: RepoConfig, view: FeatureView, names: Sequence[str], keys: Sequence[bytes]
    ) -> list[Stored | None]:
        """What is stored for each key; an entity that only other views have has no timestamp of this one."""
        fields, project = self._fields(config, view, names), config.project.encode()
        found = self._read_hash_fields(config, [(key + project, fields) for key in keys])
        return [None if stamp is None else (_microseconds(stamp), tuple(values)) for *values, stamp in found]

    def write_rows(
        self, config: RepoConfig, view: FeatureView, names: Sequence[str], keys: Sequence[bytes], rows: Sequence[OnlineRow]
    ) -> None:
        """Write rows in one pipeline, each by one command."""
        fields, project = self._fields(config, view, names), config.project.encode()
        with self._get_client(config.online_store).pipeline(transaction=False) as pipe:
            for key, row in zip(keys, rows, strict=True):
                values = (*row.values, _timestamp(row.timestamp_us))
                pipe.hset(key + project, mapping=dict(zip(fields, values, strict=True)))
            pipe.execute()

    def entity_reader(self, config: RepoConfig, wanted: Sequence[tuple[FeatureView, Sequence[str]]]) -> EntityReader:
        """One HMGET: an entity's views share a hash. How long it may take is the connection string's to say."""
        client, project = self._get_client(config.online_store), config.project.encode()
        # redis-py tries three times more, with pauses of seconds, which would hold the thread while the answer has no use.
        client.set_retry(Retry(NoBackoff(), 0))
        parts = [self._fields(config, view, names) for view, names in wanted]
        fields = [field for part in parts for field in part]

        def read(key: bytes) -> list[Stored | None]:
            values = iter(client.hmget(key + project, fields))
            rows: list[Stored | None] = []
            for part in parts:
                *row, stamp = (next(values) for _ in part)
                rows.append(None if stamp is None else (_microseconds(stamp), tuple(row)))
            return rows

        return read

    def _fields(self, config: RepoConfig, view: FeatureView, names: Sequence[str]) -> list[Any]:
        """Hash fields of the named features, then of the view's timestamp."""
        name = _versioned_fv_name(view, config)
        fields: list[Any] = self._generate_hset_keys_for_features(view, list(names), fv_name_override=name)[1]
        return fields


# Cached: the rows of a batch have one instant, or a few.
@lru_cache(maxsize=1024)
def _timestamp(microseconds: int) -> bytes:
    stamp = Timestamp()
    stamp.FromMicroseconds(microseconds)
    serialised: bytes = stamp.SerializeToString()
    return serialised


@lru_cache(maxsize=1024)
def _microseconds(stamp: bytes) -> int:
    microseconds: int = Timestamp.FromString(stamp).ToMicroseconds()
    return microseconds
