"""The screen of `limaml status`, from a real registry and a real store of days."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from limaml import registry
from limaml.config import Config, load
from limaml.events.day_store import DayManifest, EventStore
from limaml.io.storage import Storage
from limaml.local.screen import screen
from limaml.local.status import Status
from limaml.registry import ModelVersion, Registry

DAY = date(2026, 1, 31)
NOW = datetime(2026, 2, 1, 6, tzinfo=UTC)
THROUGH = {registry.COMPLETE_THROUGH: "2026-02-01T00:00:00+00:00"}


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return load(
        "configs/synthetic.toml",
        [
            f"registry.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
            f"registry.artifact_root={tmp_path}/artifacts",
            f"storage.root={tmp_path}/data",
        ],
    )


def status_of(champion: ModelVersion | str | None, *, pending: tuple[date, ...] = ()) -> Status:
    version = champion.version if isinstance(champion, ModelVersion) else champion
    return Status(version, True, DAY - timedelta(days=2), DAY, None, pending, None)


def register(cfg: Config, tmp_path: Path, *versions: dict[str, str]) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    found = Registry(cfg.registry)
    run = found.start_run("train")
    for tags in versions:
        found.register(tmp_path / "bundle", run, tags)


def test_nothing_yet_says_what_to_do(cfg: Config) -> None:
    lines = screen(cfg, status_of(None), NOW)
    assert lines == [
        "  Model      none serves; 0 registered; trigger limaml_train, or run `make run`",
        "  Slots      both empty",
        "  Days       none stored; the source's last is 2026-01-31",
        "             all online",
        "  Gates      0 days passed, 0 with warnings, 0 without data",
        "  Entities   none published",
    ]


def test_slots_gates_and_quarantined_days_are_named(cfg: Config, tmp_path: Path) -> None:
    register(
        cfg,
        tmp_path,
        {registry.STATE: "retired"},
        {registry.STATE: "ready", registry.SLOT: "green", registry.COMPLETE_THROUGH: "2026-01-31T00:00:00+00:00"},
        {registry.STATE: "ready", registry.SLOT: "blue", **THROUGH},
        {registry.DECISION: "refused"},
    )
    days = EventStore(Storage(cfg.storage.root))
    for n in range(7, 0, -1):
        days.commit(DayManifest(DAY - timedelta(days=n), "passed", 1, 10))
    days.commit(DayManifest(DAY, "quarantined", 2, 10, failed=("rows_ratio", "label_rate")))
    lines = screen(cfg, status_of("3", pending=tuple(DAY + timedelta(days=n) for n in range(6))), NOW)
    assert lines[:9] == [
        "  Model      version 3 serves, trained on the data, configuration and code of now",
        "             version 4 is the newest: refused, in no slot",
        "  Slots      blue   version 3 serves, complete through 2026-02-01 00:00 UTC, lag 6.0 h",
        "             green  version 2 ready to roll back to, complete through 2026-01-31 00:00 UTC, lag 30.0 h",
        "  Days       7 stored, 2026-01-24 to 2026-01-30; the source's last is 2026-01-31",
        "             not online yet: 2026-01-31, 2026-02-01, 2026-02-02, 2026-02-03, 2026-02-04 and 1 more",
        "  Gates      7 days passed, 0 with warnings, 0 without data",
        "             quarantined: 2026-01-31, attempt 2: rows_ratio, label_rate",
        "  Entities   user: 0 with an embedding; newest event: 0 within 1d, 0 within 7d, 0 within 30d, 0 older",
    ]


def test_the_screen_stays_one_screen(cfg: Config) -> None:
    days = EventStore(Storage(cfg.storage.root))
    for n in range(40):
        days.quarantine(DAY - timedelta(days=n), pa.table({"n": [n]}), ("rows_ratio",), {}, "")
    lines = screen(cfg, status_of(None), NOW)
    assert len(lines) < 24
    assert lines[-2].endswith("and 35 more quarantined days")
