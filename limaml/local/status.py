"""How far this installation is: which model serves, whether it is the one that would be trained now, which days are pending."""

from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from tempfile import TemporaryDirectory
from typing import Any

from limaml.config import Config
from limaml.errors import BundleError, DataError, StoreError
from limaml.events.sources import open_source

_NAMED = 10
"""Days and names that a result of at most 4 KiB lists; it counts them all."""


@dataclass(frozen=True)
class Status:
    """`through` is the last day of training; `pending` the days after it that are not online yet, in order."""

    champion: str | None
    current: bool
    """Whether the champion was trained on the same data up to `through`, configuration and code."""
    through: date
    last_day: date
    complete_through: datetime | None
    pending: tuple[date, ...]
    previous: str | None
    """The version that `limaml rollback` would go to."""
    left_out: tuple[str, ...] = ()
    """What the source holds and does not count as a day, each with the reason."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "through": self.through.isoformat(),
            "last_day": self.last_day.isoformat(),
            "complete_through": self.complete_through and self.complete_through.isoformat(),
            "pending": [day.isoformat() for day in self.pending[:_NAMED]],
            "num_pending": len(self.pending),
            "left_out": list(self.left_out[:_NAMED]),
            "num_left_out": len(self.left_out),
        }


def read_status(cfg: Config, today: date) -> Status:
    """Raises DataError if the source is too short to keep `local.daily_days` days aside."""
    from limaml.embeddings.slot_state import ready_beside
    from limaml.registry import COMPLETE_THROUGH, FINGERPRINT, SLOT, Registry
    from limaml.training.candidate import fingerprint

    source = open_source(cfg, today)
    days = source.days()
    last_day = days[-1]
    through = last_day - timedelta(days=cfg.local.daily_days)
    if through <= days[0]:
        raise DataError(
            f"source must span more than local.daily_days + 1 ({cfg.local.daily_days + 1}) days, got {len(days)} "
            f"({days[0]} to {last_day}); lower local.daily_days"
        )
    registry = Registry(cfg.registry)
    champion = registry.champion()
    tags = champion.tags if champion else {}
    complete = datetime.fromisoformat(tags[COMPLETE_THROUGH]) if COMPLETE_THROUGH in tags else None
    first_pending = through + timedelta(days=1) if complete is None else complete.date()
    pending = tuple(first_pending + timedelta(days=n) for n in range((last_day - first_pending).days + 1))
    current = champion is not None and tags.get(FINGERPRINT) == fingerprint(cfg, through)
    beside = ready_beside(registry, champion) if champion and SLOT in tags else None
    previous = beside.version if beside else None
    left_out = tuple(source.left_out)
    return Status(champion.version if champion else None, current, through, last_day, complete, pending, previous, left_out)


def read_card(cfg: Config, version: str | None) -> tuple[str, dict[str, Any]]:
    """Number and card of a model version, of the champion if none is named. Raises StoreError or BundleError without one."""
    from limaml.models.bundle import REFIT, load
    from limaml.registry import Registry

    registry = Registry(cfg.registry)
    if version is None:
        champion = registry.champion()
        if champion is None:
            raise StoreError("no model version is the champion yet; name one with --version")
        version = champion.version
    with TemporaryDirectory(prefix="limaml-bundle-") as folder:
        card = load(registry.download(version, folder), parts=(REFIT,)).card
    if not card:
        raise BundleError(f"version {version} was made by a release without cards; train a new version")
    return version, card
