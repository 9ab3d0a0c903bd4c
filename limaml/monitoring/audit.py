"""What is stored about users, place by place, and until when: `limaml audit`, and of one user `limaml audit --user ID`.

Read from what lies there, not from what should: files below `storage.root` and `serving.log_path`, rows of the online store,
and the users that every bundle names. What a source keeps, backups and the logs of other programs are not seen.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from limaml import registry, schema
from limaml.config import Config
from limaml.embeddings.publish import OnlineView
from limaml.errors import BundleError
from limaml.events.day_store import EventStore, partition_day
from limaml.features.encoder import Encoder
from limaml.features.feature_store import open_store
from limaml.governance.retention import quarantine_days, request_log_days
from limaml.io.storage import Storage
from limaml.models.bundle import REFIT, TWIN
from limaml.registry import Registry

_USER = "user_id"
_STAYS = "not deleted"
_FOREVER = {
    "events": "the day's rows stay; values as below",
    "logged": "the day's rows stay; values as below",
    "events_superseded": _STAYS,
    "logged_superseded": _STAYS,
    "catalogue": "as long as the source delivers them",
    "catalogue_history": "rows stay; values as below, once they are replaced",
    "snapshots": "rows stay; values as below",
    "state": "the last days, and the first of each month",
    "recent": "until newer rows take their place",
    "embeddings": _STAYS,
}
"""Folders below the storage root that hold users, and how long."""
_ONLINE_BATCH = 10_000


@dataclass(frozen=True)
class Place:
    """What one place holds; of one user if only that one was asked for."""

    name: str
    rows: int
    users: int
    oldest: date | None
    newest: date | None
    kept: str
    """Until when, in words."""
    next_deleted: date | None = None
    """Day at whose end the oldest of it is deleted, where it is."""


@dataclass(frozen=True)
class Value:
    """A feature, and the oldest day whose rows hold its values."""

    feature: str
    entity: str
    purpose: str
    consent: str
    retention_days: int
    oldest: date | None
    next_dropped: date | None


@dataclass(frozen=True)
class Audit:
    """Everything found."""

    user: str | None
    places: tuple[Place, ...]
    values: tuple[Value, ...]

    def lines(self) -> Iterator[str]:
        whose = f"user {self.user}" if self.user is not None else "users"
        yield f"Stored about {whose}"
        yield f"  {'place':<38} {'rows':>10} {'users':>8}  {'oldest':<10}  {'newest':<10}  kept"
        for place in self.places:
            until = f"{place.kept}; next at the end of {place.next_deleted}" if place.next_deleted else place.kept
            days = f"{place.oldest or '-'!s:<10}  {place.newest or '-'!s:<10}"
            yield f"  {place.name:<38} {place.rows:>10,} {place.users:>8,}  {days}  {until}"
        yield "Values of features in the rows of days"
        for value in self.values:
            kept = f"{value.retention_days} days" if value.retention_days else "as long as the rows"
            said = f"purpose: {value.purpose or 'not declared'}; basis: {value.consent or 'not declared'}; kept {kept}"
            span = f", oldest {value.oldest}" if value.oldest else ""
            end = f", dropped at the end of {value.next_dropped}" if value.next_dropped else ""
            yield f"  {value.feature} ({value.entity}): {said}{span}{end}"

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        parts = {name: [_json(asdict(one)) for one in getattr(self, name)] for name in ("places", "values")}
        return {"user": self.user, **parts}

    def summary(self) -> dict[str, Any]:
        """Rows of each place, which fit a verb's result of 4 KiB."""
        held = {place.name: place.rows for place in self.places if place.rows}
        return {"user": self.user, "places": dict(list(held.items())[:40]), "num_places": len(held)}


def audit(cfg: Config, user: str | None = None) -> Audit:
    """Look everywhere. Raises StoreError if registry or online store do not answer, or nothing was applied yet."""
    storage = Storage(cfg.storage.root)
    places = [
        *_files(storage, user),
        *_whole_days(cfg, storage, user),
        *_online(cfg, storage, user),
        *_bundles(cfg, storage, user),
    ]
    return Audit(user, tuple(place for place in places if place.rows), tuple(_values(cfg, storage)))


def _files(storage: Storage, user: str | None) -> Iterator[Place]:
    for folder, kept in _FOREVER.items():
        groups: dict[str, list[str]] = {}
        for path in storage.walk(folder):
            if path.endswith(".parquet"):
                # snapshots/user, embeddings/kind=K/version=V: what is apart has a line of its own.
                apart = [part for part in path.split("/")[:-1] if not part.startswith("dt=")]
                groups.setdefault("/".join(apart), []).append(path)
        for name, paths in groups.items():
            yield _place(name, storage, paths, user, kept)


def _whole_days(cfg: Config, storage: Storage, user: str | None) -> Iterator[Place]:
    """What is deleted a day at a time."""
    requests = Storage(cfg.serving.log_path)
    for name, root, folder, days in (
        ("request log", requests, "", request_log_days(cfg)),
        ("quarantine", storage, "quarantine", quarantine_days(cfg)),
    ):
        paths = [path for path in root.walk(folder) if path.endswith(".parquet") and "dt=" in path]
        place = _place(name, root, paths, user, f"{days} days" if days else _STAYS)
        yield Place(**(vars(place) | {"next_deleted": _after(place.oldest, days)}))
    paths = [path for path in storage.walk("consistency") if path.endswith("differences.parquet")]
    yield _place("consistency", storage, paths, user, "as the request log", key="entity", views=(schema.USER_VIEW,))


def _place(
    name: str,
    storage: Storage,
    paths: Sequence[str],
    user: str | None,
    kept: str,
    key: str = _USER,
    views: tuple[str, ...] = (),
) -> Place:
    """Count the rows, users and days of files whose rows have a user."""
    rows, users, days = 0, set[str](), set[date]()
    for path in paths:
        table = storage.read_columns(path, [key, *(["view"] if views else [])])
        if key not in table.column_names:
            continue
        if views:
            table = table.filter(pc.is_in(table["view"], value_set=pa.array(views)))
        ids = table[key].cast(pa.string())
        found = ids if user is None else ids.filter(pc.equal(ids, user))
        rows += len(found)
        users.update(pc.unique(found).to_pylist())
        day = next((partition_day(part) for part in path.split("/") if part.startswith("dt=")), None)
        if day is not None and len(found):
            days.add(day)
    return Place(name, rows, len(users), min(days, default=None), max(days, default=None), kept)


def _online(cfg: Config, storage: Storage, user: str | None) -> Iterator[Place]:
    """Rows of the online store, asked for every user that any snapshot or catalogue names."""
    known = [user] if user is not None else _known_users(storage)
    tables, store = schema.tables(cfg.features), open_store(cfg)
    views = [schema.USER_VIEW, *([schema.AFFINITY_VIEW] if tables.affinities else [])]
    kinds = [kind.name for kind in cfg.task_kinds if kind.entity_column == _USER]
    views += [schema.embedding_view(kind, slot) for kind in kinds for slot in schema.SLOTS]
    for name in views:
        view, count = OnlineView(store, name), 0
        for start in range(0, len(known), _ONLINE_BATCH):
            part = pa.table({_USER: pa.array(known[start : start + _ONLINE_BATCH], pa.string())})
            count += sum(row is not None for row in view.read(view.keys(part)))
        yield Place(f"online {name}", count, count, None, None, "until a newer row, or its slot is filled again")


def _known_users(storage: Storage) -> list[str]:
    users: set[str] = set()
    for folder in ("snapshots/user", "catalogue", "catalogue_history/user"):
        for path in storage.walk(folder):
            table = storage.read_columns(path, [_USER])
            if _USER in table.column_names:
                users.update(pc.unique(table[_USER]).to_pylist())
    return sorted(users)


def _bundles(cfg: Config, storage: Storage, user: str | None) -> Iterator[Place]:
    """Users whom the encoders of model versions and candidates name."""
    versions = Registry(cfg.registry)
    for version in versions.versions():
        state = version.tags.get(registry.STATE, "in no slot")
        kept = f"as long as the registry keeps it ({state})"
        with tempfile.TemporaryDirectory(prefix="limaml-audit-") as folder:
            try:
                found = _named(Storage(str(versions.download(version.version, folder))), "", user)
            except BundleError:
                found, kept = set(), "its bundle is gone"
        yield Place(f"model version {version.version}", len(found), len(found), None, None, kept)
    for name in storage.list("candidates"):
        found = _named(storage, f"candidates/{name}/bundle/", user)
        yield Place(f"candidate {name}", len(found), len(found), None, None, "the newest five stay")


def _named(storage: Storage, folder: str, user: str | None) -> set[str]:
    users: set[str] = set()
    for part in (REFIT, TWIN):
        path = f"{folder}{part}.encoder.json"
        if storage.exists(path):
            users.update(Encoder.from_dict(storage.read_json(path)).entities)
    return users if user is None else users & {user}


def _values(cfg: Config, storage: Storage) -> Iterator[Value]:
    tables = schema.tables(cfg.features)
    days = [manifest for manifest in EventStore(storage).manifests().values() if manifest.status == "passed"]
    held = set(tables.logged_events.names)
    for feature in cfg.features:
        oldest = next((m.day for m in days if feature.name not in m.dropped), None) if feature.name in held else None
        said = (feature.name, feature.entity, feature.purpose, feature.consent, feature.retention_days)
        yield Value(*said, oldest, _after(oldest, feature.retention_days))


def _after(oldest: date | None, days: int | None) -> date | None:
    return oldest + timedelta(days=days) if oldest and days else None


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, date) else value for name, value in values.items()}
