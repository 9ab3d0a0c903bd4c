"""Feast: the store built from the configuration, the one owner of its registry, and the point-in-time join.

Feast 0.67 is imported inside the functions: it takes seconds. Every process that touches it runs with TZ=UTC.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import Config, FeastConfig
from limaml.config.secret import revealed, revealed_url
from limaml.errors import ConfigError, StoreError
from limaml.io.locks import exclusive
from limaml.io.storage import absolute

if TYPE_CHECKING:
    from feast import FeatureStore, RepoConfig

CONFIG_VARIABLE = "LIMAML_CONFIG"
"""Path of the configuration that feature_repo reads, also when Feast's own command line reads it."""

_APPLY_WAIT_S = 60.0
_REDIS_TYPES = {"single": "redis", "cluster": "redis_cluster", "sentinel": "redis_sentinel"}
_REDIS_TIMEOUT_S = 10
"""A batch of 2,000 rows takes 40 ms. redis-py asks four times, and all of it ends before the lease does (60 s)."""
_ONLINE = "limaml.features.online"
"""Feast's own online stores with a bulk path; a reader may as well have Feast's plain `sqlite` or `redis`."""


def import_feast() -> None:
    """Import Feast for the first time in this process, without the run-time type checks that it wraps its classes in.

    typeguard reads and compiles the source of every class again to put them in: 3 of the 6.7 s of processor time that the
    import takes, in every verb.
    """
    if "feast" in sys.modules:
        return
    import typeguard

    decorator = typeguard.typechecked
    typeguard.typechecked = _unchecked
    try:
        import feast  # noqa: F401
    finally:
        typeguard.typechecked = decorator


def _unchecked(target: Any = None, **_: Any) -> Any:
    """`@typechecked` and `@typechecked(…)` that leave the target as it is."""
    return target if target is not None else _unchecked


def repo_config(feast: FeastConfig) -> "RepoConfig":
    """Feast's configuration: duckdb offline store, paths taken from the working directory.

    Raises ConfigError if a `${NAME}` in the registry's URL or of the online password stands for nothing.
    """
    import_feast()
    from feast import RepoConfig

    online: dict[str, Any]
    if feast.online_store == "sqlite":
        online = {"type": f"{_ONLINE}.sqlite.BulkSqliteOnlineStore", "path": str(Path(feast.online_connection).absolute())}
    else:
        # Without skip_dedup Feast drops a row whose timestamp is not newer, silently; which row wins is decided by the
        # publisher, under its lease, for every store alike (contract 5).
        online = {
            "type": f"{_ONLINE}.redis.BulkRedisOnlineStore",
            "redis_type": _REDIS_TYPES[feast.redis_mode],
            "sentinel_master": feast.sentinel_master,
            "connection_string": feast.online_connection + _redis_timeouts(feast) + _redis_password(feast),
            "skip_dedup": True,
        }
    registry = revealed_url(feast.registry, "feast.registry")
    if feast.registry_type == "file" and "://" not in registry:
        registry = str(Path(registry).absolute())
    return RepoConfig(
        project=feast.project,
        provider="local",
        registry={"registry_type": feast.registry_type, "path": registry},
        online_store=online,
        offline_store={"type": "duckdb"},
        entity_key_serialization_version=3,
    )


def _redis_timeouts(feast: FeastConfig) -> str:
    """redis-py waits for ever otherwise, where a network drops what it was sent, and its caller would keep the lease."""
    named = "socket_timeout" in feast.online_connection
    return "" if named else f",socket_timeout={_REDIS_TIMEOUT_S},socket_connect_timeout={_REDIS_TIMEOUT_S}"


def open_store(cfg: Config) -> "FeatureStore":
    """The feature store. Raises StoreError if `limaml apply` has not created its registry yet."""
    import_feast()
    from feast import FeatureStore

    settings = repo_config(cfg.feast)
    if cfg.feast.registry_type == "file" and "://" not in settings.registry.path and not Path(settings.registry.path).exists():
        raise StoreError(f"the feature registry {settings.registry.path} must exist; create it with limaml apply")
    return FeatureStore(config=settings)


def apply(cfg: Config) -> dict[str, Any]:
    """Bring registry and online tables in line with feature_repo; the only writer of the registry, under a lock.

    Returns what there is now, and whether anything had to change; the registry is rewritten only then.
    """
    with exclusive(cfg, "feast-apply", _APPLY_WAIT_S):
        return _apply(cfg)


def _apply(cfg: Config) -> dict[str, Any]:
    import_feast()
    from feast import FeatureStore, Project
    from feast.repo_operations import extract_objects_for_apply_delete

    settings = repo_config(cfg.feast)
    for path in (settings.registry.path, getattr(settings.online_store, "path", "")):
        if path and "://" not in path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    repo = _parse(cfg)
    repo.projects.append(Project(name=cfg.feast.project))
    store = FeatureStore(config=settings)
    views = sorted(view.name for view in repo.feature_views)
    services = sorted(service.name for service in repo.feature_services)
    changed = not _is_applied(store, repo)
    if changed:
        to_apply, to_delete, _, _ = extract_objects_for_apply_delete(cfg.feast.project, store.registry, repo)
        store.apply(to_apply, objects_to_delete=to_delete, partial=False)
        if cfg.feast.online_store == "sqlite":
            _use_wal(settings.online_store.path)
    return {"status": "applied" if changed else "unchanged", "views": views, "services": services}


def _is_applied(store: "FeatureStore", repo: Any) -> bool:
    """Whether the registry already holds exactly what the repository defines."""
    from feast.diff.property_diff import TransitionType

    registry_diff, _, _ = store.plan(repo)
    return all(d.transition_type == TransitionType.UNCHANGED for d in registry_diff.feast_object_diffs)


def _use_wal(path: str) -> None:
    """A reader of the online store then never waits for its writer; the mode stays with the file."""
    import sqlite3

    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def _parse(cfg: Config) -> Any:
    """Let Feast read feature_repo, which gets the resolved configuration through a file named in the environment."""
    import tempfile

    from feast.repo_operations import parse_repo

    folder = Path(cfg.feast.repo_path).absolute()
    if not folder.is_dir():
        raise ConfigError(f"feast.repo_path must be the feature repository's folder, got {folder}; run from the project's root")
    root = absolute(cfg.storage.root)
    resolved = cfg.model_dump(mode="json") | {"storage": {"root": root}}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(resolved, file)
        file.flush()
        with _inside(folder, file.name):
            return parse_repo(folder)


@contextmanager
def _inside(folder: Path, config_path: str) -> Iterator[None]:
    """Feast finds a repository's modules through the working directory and caches them; leave no trace of either."""
    before, known = Path.cwd(), set(sys.modules)
    variable = os.environ.get(CONFIG_VARIABLE)
    os.environ[CONFIG_VARIABLE] = config_path
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
        del os.environ[CONFIG_VARIABLE]
        if variable is not None:
            os.environ[CONFIG_VARIABLE] = variable


def _redis_password(feast: FeastConfig) -> str:
    """The password as a part of Feast's connection string, which is cut at commas and read as JSON: a JSON text without any."""
    if not feast.online_password:
        return ""
    return ",password=" + json.dumps(revealed(feast.online_password, "feast.online_password")).replace(",", r"\u002c")


def join_features(store: "FeatureStore", events: pa.Table, tables: schema.Tables) -> pa.Table:
    """Join each event with the newest snapshots not later than its timestamp, through Feast.

    Returns `tables.logged_events`, sorted by (user_id, timestamp, event_id). Raises StoreError if Feast lost or added a row.
    """
    logged = tables.logged_events
    if not events.num_rows:
        return logged.arrow.empty_table()
    joined = historical(store, events.select(tables.events.names), store.get_feature_service(schema.TRAINING_SERVICE))
    for affinity in tables.affinities:
        wanted = [f"{affinity.name}:{name}" for name in affinity.counts]
        joined = historical(store, joined, wanted)
    joined = joined.select(logged.names).cast(logged.arrow).sort_by(schema.EVENT_ORDER).combine_chunks()
    if not joined["event_id"].equals(events.sort_by(schema.EVENT_ORDER)["event_id"]):
        unique = len(pc.unique(joined["event_id"]))
        raise StoreError(
            f"the point-in-time join must return each of {events.num_rows} events once, got {joined.num_rows} rows "
            f"of {unique} events; look for snapshots with equal key and timestamp"
        )
    return joined


def historical(store: "FeatureStore", rows: pa.Table, features: Any) -> pa.Table:
    """Feast's own point-in-time join of rows that have a `timestamp`."""
    frame = rows.rename_columns(["event_timestamp" if name == "timestamp" else name for name in rows.column_names])
    with warnings.catch_warnings():
        # ibis 12 still calls duckdb's older name for to_arrow_table.
        warnings.filterwarnings("ignore", "fetch_arrow_table", DeprecationWarning)
        try:
            _open_backend()
            joined = store.get_historical_features(frame.to_pandas(), features).to_arrow()
        finally:
            _close_backend()
    return joined.rename_columns(["timestamp" if name == "event_timestamp" else name for name in joined.column_names])


def _open_backend() -> None:
    import ibis

    from limaml.features.offline import UrlBackend

    ibis.options.default_backend = UrlBackend().connect()


def _close_backend() -> None:
    """Close the process-wide duckdb connection that ibis opened for Feast: it would hold the join's tables until exit."""
    import ibis

    backend, ibis.options.default_backend = ibis.options.default_backend, None
    if backend is not None:
        backend.disconnect()
