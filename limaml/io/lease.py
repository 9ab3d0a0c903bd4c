"""One writer at a time, on one machine or on many: a lease with a fencing number, kept in a SQL database.

The online store has one, and so has a storage root that is a URL (`locks`). The database's clock decides, so that hosts need
not agree on the time, and may be set back. A holder renews in a thread; `check` before each
write renews too and fails if somebody else has taken the lease in the meantime, so a write that follows a check has
`lease_ttl_s` to end. A holder that died is succeeded after `lease_ttl_s`, with a higher fencing number.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from limaml.config import Config, EmbeddingsConfig, FeastConfig
from limaml.config.secret import revealed_url
from limaml.errors import BusyError, ConfigError, StoreError
from limaml.telemetry import get_logger

# Seconds since 1970 by the database's own clock, fractions included.
_NOW = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "extract(epoch from clock_timestamp())::double precision",
}
_HOW_REACHED = ("password=", "username=", "ssl_", "socket_")
"""Parts of a connection that say nothing of which store it is."""
_POLL_S = 0.2
_RENEWALS_PER_TTL = 3


class Held:
    """A lease that is held; `fence` grows with every change of holder."""

    def __init__(self, table: "_LeaseTable", who: str, fence: int) -> None:
        self._table = table
        self.who = who
        self.fence = fence

    def check(self) -> None:
        """Renew the lease; call before each write. Raises BusyError if another holder has it."""
        if not self._table.renew(self.fence):
            raise BusyError(
                f"{self.who} has lost the lease of {self._table.name} (fence {self.fence}): {self._table.holder()}; "
                "it did not renew in time, so it stops before it writes; run it again"
            )


@contextmanager
def lease(cfg: Config, who: str) -> Iterator[Held]:
    """Hold the one lease of the online store in `cfg.feast` while the block runs.

    Waits up to `embeddings.lease_wait_s`, then raises BusyError 'busy: <who> since <when>'.
    """
    with lease_named(cfg.embeddings, store_identity(cfg.feast), who, cfg.embeddings.lease_wait_s) as held:
        yield held


@contextmanager
def lease_named(settings: EmbeddingsConfig, name: str, who: str, wait_s: float) -> Iterator[Held]:
    """Hold the lease `name` of the database at `embeddings.lease_url` while the block runs; waits up to `wait_s`."""
    table = _LeaseTable(revealed_url(settings.lease_url, "embeddings.lease_url"), name, settings.lease_ttl_s)
    deadline, said = time.monotonic() + wait_s, False
    while (fence := table.acquire(who)) is None:
        if not said:
            get_logger(__name__).info("lease_awaited", lease=name, holder=table.holder(), wait_s=wait_s)
            said = True
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{table.holder()}; wait until it has ended and run again (the lease of a dead holder frees itself "
                f"after embeddings.lease_ttl_s = {settings.lease_ttl_s:g})"
            )
        time.sleep(_POLL_S)
    ended = threading.Event()
    renewal = threading.Thread(target=_keep_renewing, args=(table, fence, ended), name="lease-renewal", daemon=True)
    renewal.start()
    try:
        yield Held(table, who, fence)
    finally:
        ended.set()
        renewal.join()
        table.release(fence)


def holder_name(verb: str, run: str = "") -> str:
    """Who holds a lease, for messages: the verb, its run, and where its process is."""
    return f"{verb}{f' of {run}' if run else ''} ({socket.gethostname()}, process {os.getpid()})"


def store_identity(cfg: FeastConfig) -> str:
    """Which online store, without its secrets; two configurations of one store must give the same name."""
    if cfg.online_store == "sqlite":
        place = os.path.abspath(cfg.online_connection)
    else:
        place = ",".join(part for part in cfg.online_connection.split(",") if not part.startswith(_HOW_REACHED))
    return f"{cfg.project}@{cfg.online_store}:{place}"


def _keep_renewing(table: "_LeaseTable", fence: int, ended: threading.Event) -> None:
    while not ended.wait(table.ttl_s / _RENEWALS_PER_TTL):
        try:
            if not table.renew(fence):
                return
        except StoreError as error:
            # The next round tries again; if none succeeds in time, `check` stops the holder before it writes.
            get_logger(__name__).warning("lease_renewal_failed", lease=table.name, error=str(error))


class _LeaseTable:
    """One row a lease: fence, holder, since, expires. Each change is one statement, so the database settles races."""

    def __init__(self, url: str, name: str, ttl_s: float) -> None:
        import sqlalchemy as sa

        self.name = name
        self.ttl_s = ttl_s
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            database = sa.make_url(url).get_backend_name()
        except sa.exc.ArgumentError as error:
            raise ConfigError(f"embeddings.lease_url must be an SQLAlchemy URL: {error}") from None
        if database not in _NOW:
            raise ConfigError(f"embeddings.lease_url must be of {' or '.join(_NOW)}, got {database}")
        # SQLite answers 'locked' while another process writes; wait for it as long as a holder may go without renewing.
        wait = {"timeout": ttl_s} if database == "sqlite" else {}
        self._engine = sa.create_engine(url, poolclass=sa.pool.NullPool, connect_args=wait)
        self._now: Any = sa.literal_column(_NOW[database], sa.Double)
        self._rows = sa.Table(
            "limaml_lease",
            sa.MetaData(),
            sa.Column("store", sa.String(500), primary_key=True),
            sa.Column("fence", sa.BigInteger, nullable=False),
            sa.Column("holder", sa.String(500), nullable=False),
            sa.Column("since", sa.Double, nullable=False),
            sa.Column("expires", sa.Double, nullable=False),
        )
        self._create()

    def acquire(self, who: str) -> int | None:
        """Take the lease if it is free or has expired; returns the new fencing number, or None.

        One that is held for longer than `ttl_s` from now is cut to that: it was taken or renewed before the clock was set back.
        """
        rows = self._rows
        taken = (
            rows.update()
            .where(rows.c.store == self.name, rows.c.expires <= self._now)
            .values(fence=rows.c.fence + 1, holder=who, since=self._now, expires=self._now + self.ttl_s)
            .returning(rows.c.fence)
        )
        # A database's clock that was set back would leave a dead holder's lease for as long as it went back.
        too_late = rows.update().where(rows.c.store == self.name, rows.c.expires > self._now + self.ttl_s)
        with self._transaction() as connection:
            fence = connection.execute(taken).scalar_one_or_none()
            if fence is None:
                connection.execute(too_late.values(expires=self._now + self.ttl_s))
        return None if fence is None else int(fence)

    def renew(self, fence: int) -> bool:
        """Push the expiry out; False if the lease has another fencing number by now."""
        return self._change(fence, expires=self._now + self.ttl_s)

    def release(self, fence: int) -> None:
        self._change(fence, expires=0.0)

    def holder(self) -> str:
        """'busy: <who> since <when>' of the last one who took the lease."""
        with self._transaction() as connection:
            row = connection.execute(self._rows.select().where(self._rows.c.store == self.name)).one()
        return f"busy: {row.holder} since {datetime.fromtimestamp(row.since, UTC):%Y-%m-%dT%H:%M:%SZ}"

    def _change(self, fence: int, **values: Any) -> bool:
        rows = self._rows
        with self._transaction() as connection:
            changed = connection.execute(rows.update().where(rows.c.store == self.name, rows.c.fence == fence).values(**values))
        return bool(changed.rowcount)

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """Raises StoreError if the database does not answer as it should."""
        import sqlalchemy as sa

        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            url = self._engine.url.render_as_string(hide_password=True)
            raise StoreError(f"lease database {url} failed: {error}; is it running and writable?") from error

    def _create(self) -> None:
        """Make table and row if they are not there. Several processes may try at once; who loses, of either, looks again."""
        import sqlalchemy as sa

        row = {"store": self.name, "fence": 0, "holder": "", "since": 0.0, "expires": 0.0}
        mine = sa.select(self._rows.c.fence).where(self._rows.c.store == self.name)
        for losses in range(3):
            try:
                with self._transaction() as connection:
                    self._rows.create(connection, checkfirst=True)
                with self._transaction() as connection:
                    if connection.execute(mine).first() is None:
                        connection.execute(self._rows.insert().values(row))
                return
            except StoreError:
                if losses == 2:
                    raise
