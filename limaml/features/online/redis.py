"""Feast's Redis online store with a bulk path. Feast loads it by its class path; keys, hashes and reads are Feast's own."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from feast import FeatureView, RepoConfig
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType, _versioned_fv_name
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError

from limaml.features.online.rows import OnlineRow, Stored


class BulkRedisOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc]
    """Feast's own settings under another class path."""

    type: Literal["limaml.features.online.redis.BulkRedisOnlineStore"] = "limaml.features.online.redis.BulkRedisOnlineStore"


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

    def entity_reader(self, config: RepoConfig, wanted: Sequence[tuple[FeatureView, Sequence[str]]]) -> "RedisEntityReader":
        """One HMGET: an entity's views share a hash. How long it may take is the connection string's to say."""
        project = config.project.encode()
        parts = [self._fields(config, view, names) for view, names in wanted]
        reader = ClusterEntityReader if config.online_store.redis_type == RedisType.redis_cluster else RedisEntityReader
        return reader(lambda: self._get_client_async(config.online_store), project, parts)

    def _fields(self, config: RepoConfig, view: FeatureView, names: Sequence[str]) -> list[Any]:
        """Hash fields of the named features, then of the view's timestamp."""
        name = _versioned_fv_name(view, config)
        fields: list[Any] = self._generate_hset_keys_for_features(view, list(names), fv_name_override=name)[1]
        return fields


class RedisEntityReader:
    """Reads on an event loop, over connections of its own.

    Commands go to them directly: 20 us a read with eight at once, where redis-py's own asyncio client takes 43 and its blocking
    one, in a thread, 150 (alone, without time-outs).
    """

    def __init__(self, client: Callable[[], Awaitable[Any]], key_suffix: bytes, parts: Sequence[Sequence[bytes]]) -> None:
        """`parts`: of each view the hash fields of its features, then of its timestamp."""
        self._new_client = client
        self._client: Any = None
        self._key_suffix, self._parts = key_suffix, parts
        self._fields = [field for part in parts for field in part]
        self._free: list[Any] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def read(self, key: bytes) -> list[Stored | None]:
        """A row or None a view. Raises redis.RedisError."""
        if self._client is None:
            self._loop = asyncio.get_running_loop()
            self._client = await self._new_client()
            self._prepare()
        values = iter(await self._ask(key + self._key_suffix))
        rows: list[Stored | None] = []
        for part in self._parts:
            *row, stamp = (next(values) for _ in part)
            rows.append(None if stamp is None else (_microseconds(stamp), tuple(row)))
        return rows

    def _prepare(self) -> None:
        # redis-py tries again with pauses of seconds, when the answer has no use any more.
        self._client.set_retry(Retry(NoBackoff(), 0))

    async def _ask(self, key: bytes) -> Any:
        """Values of all fields; a connection that was kept may have died with the server, which is found again by another."""
        while True:
            is_new = not self._free
            connection = self._client.connection_pool.make_connection() if is_new else self._free.pop()
            try:
                if is_new:
                    # Sending would connect by itself, but not ask the sentinels where the master is.
                    await connection.connect()
                await connection.send_command("HMGET", key, *self._fields)
                values = await connection.read_response()
            except BaseException as error:
                await connection.disconnect(nowait=True)
                if is_new or not isinstance(error, ConnectionError):
                    raise
            else:
                self._free.append(connection)
                if self._closed:
                    await self._disconnect()
                return values

    def close(self) -> None:
        """Give its connections back, those in use after their read; from any thread."""
        self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop)

    async def _disconnect(self) -> None:
        while self._free:
            await self._free.pop().disconnect(nowait=True)


class ClusterEntityReader(RedisEntityReader):
    """Reads of a cluster: redis-py's own client knows which node holds a key, and asks another one where it has moved."""

    def _prepare(self) -> None:
        pass

    async def _ask(self, key: bytes) -> Any:
        return await self._client.hmget(key, self._fields)

    async def _disconnect(self) -> None:
        if self._client is not None:
            await self._client.aclose()


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
