"""Where events come from: one protocol, the sources that there are, and the calendar on which recorded data is replayed."""

from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Protocol, Self

import pyarrow as pa

from limaml.config import Config, SourceConfig
from limaml.config.names import SOURCE_KINDS
from limaml.errors import DataError
from limaml.io.storage import Storage

SOURCE_MANIFEST = "source.json"


class Source(Protocol):
    """Days of events and the catalogue of known users and items. What a day holds is the gate's business, not the source's."""

    name: str

    @property
    def left_out(self) -> Sequence[str]:
        """What lies where days are delivered and is no day, each with the rule it breaks and the remedy."""
        ...

    def catalogue(self, through: date | None = None) -> tuple[pa.Table, pa.Table]:
        """Known users and items: `user_id`, `item_id` and what else is known of them; features are declared of its columns.

        `through` is the last day that counts where the events name who is known; None: all.
        """
        ...

    def days(self) -> list[date]:
        """Every calendar day from the first to the last one delivered that is over, days without data included."""
        ...

    def read_day(self, day: date) -> pa.Table | None:
        """One day as delivered. None: the source has no such day; an empty table: an empty file was delivered.

        Raises UnreadableDayError, with the bytes, if what was delivered cannot be read.
        """
        ...

    def unread(self, day: date) -> Sequence[str]:
        """Names of what lies with a day's files and is not read."""
        ...


class Replayable(Source, Protocol):
    """A source of recorded or generated days that can be moved in time by whole weeks."""

    def moved(self, shift: timedelta) -> Self:
        """The same source with every timestamp moved by `shift`."""
        ...


Open = Callable[[Config, date], Source]
"""`today` (UTC) is not over, so it is no day of a source yet."""


def open_source(cfg: Config, today: date) -> Source:
    """Open the configured source; `today` (UTC) places a replayed one, the first time only (contract 9).

    Raises ConfigError if its files are not there, DataError if the storage already holds another source's data.
    """
    return SOURCES[cfg.source.kind](cfg, today)


def replayed(make: Callable[[SourceConfig], Replayable]) -> Open:
    """Opens recorded or generated days where they were moved to."""

    def open_moved(cfg: Config, today: date) -> Source:
        source = make(cfg.source)
        return source.moved(_recorded_shift(Storage(cfg.storage.root), source, today))

    return open_moved


def register(kind: str, open_it: Open) -> None:
    """Let `source.kind` name another source, in this process. Raises ConfigError if there is one of that name."""
    SOURCE_KINDS.add(kind)
    SOURCES[kind] = open_it


def _parquet(cfg: Config, today: date) -> Source:
    from limaml.events.parquet_source import ParquetSource

    return ParquetSource(cfg.source, today)


def _table(cfg: Config, today: date) -> Source:
    from limaml.events.table_source import TableSource

    return TableSource(cfg.source, today)


def _movielens(cfg: SourceConfig) -> Replayable:
    from limaml.events.movielens import MovieLensSource

    return MovieLensSource(cfg.path)


def _completejourney(cfg: SourceConfig) -> Replayable:
    from limaml.events.completejourney import CompleteJourneySource

    return CompleteJourneySource(cfg.path, cfg.completejourney_share)


def _synthetic(cfg: SourceConfig) -> Replayable:
    from limaml.events.synthetic import SyntheticSource

    return SyntheticSource(cfg)


SOURCES: dict[str, Open] = {
    "parquet": _parquet,
    "table": _table,
    "movielens": replayed(_movielens),
    "completejourney": replayed(_completejourney),
    "synthetic": replayed(_synthetic),
}
"""Another source is one more line here, and its name in `limaml.config.names.SOURCE_KINDS` (docs/extend.md)."""


def week_shift(last_day: date, today: date) -> timedelta:
    """The largest whole number of weeks that leaves `last_day` no later than yesterday; keeps weekdays as they were."""
    return timedelta(weeks=((today - timedelta(days=1)) - last_day).days // 7)


def _recorded_shift(storage: Storage, source: Source, today: date) -> timedelta:
    """Read the shift from the manifest beside the partitions, or compute it once and write it there."""
    if storage.exists(SOURCE_MANIFEST):
        manifest = storage.read_json(SOURCE_MANIFEST)
        if manifest["source"] != source.name:
            raise DataError(
                f"{storage.path(SOURCE_MANIFEST)}: source must be {source.name!r} as configured, "
                f"got {manifest['source']!r}; give this configuration its own storage.root"
            )
        return timedelta(days=manifest["shift_days"])
    days = source.days()
    shift = week_shift(days[-1], today)
    manifest = {
        "source": source.name,
        "shift_days": shift.days,
        "first_day": (days[0] + shift).isoformat(),
        "last_day": (days[-1] + shift).isoformat(),
    }
    storage.write_json(SOURCE_MANIFEST, manifest)
    return shift
