"""The feature repository, as `limaml apply` and as Feast's own command line see it."""

import os
from pathlib import Path

import pytest
from feast.infra.online_stores.redis import RedisOnlineStore
from sqlalchemy import make_url

from limaml import schema
from limaml.config import Config, FeastConfig, TaskKindConfig
from limaml.errors import BusyError, ConfigError, StoreError
from limaml.features import feature_store
from limaml.features.feature_store import apply, open_store, repo_config
from tests import declared

ROOT = Path(__file__).parents[3]


def configuration(folder, **feast):
    return Config.model_validate(
        {
            "features": declared.FEATURES,
            "source": {"kind": "synthetic"},
            "storage": {"root": str(folder / "data")},
            "feast": {
                "repo_path": str(ROOT / "feature_repo"),
                "registry": str(folder / "feast" / "registry.db"),
                "online_connection": str(folder / "feast" / "online.db"),
            }
            | feast,
        }
    )


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    cfg = configuration(tmp_path_factory.mktemp("applied"))
    return cfg, apply(cfg)


def test_file_for_feasts_own_command_line_equals_the_embedded_default(monkeypatch):
    """`feature_store.yaml` names paths from its own folder, the configuration from the project's root."""
    from feast.repo_config import load_repo_config

    monkeypatch.chdir(ROOT)
    folder = ROOT / "feature_repo"
    built, written = repo_config(FeastConfig()), load_repo_config(folder, folder / "feature_store.yaml")
    for name in ("project", "provider", "entity_key_serialization_version"):
        assert getattr(written, name) == getattr(built, name)
    assert type(written.offline_store) is type(built.offline_store)
    assert written.registry.registry_type == built.registry.registry_type
    assert os.path.normpath(folder / written.registry.path) == built.registry.path
    # Ours is Feast's store with a bulk path for publishing: same tables, same reads.
    assert isinstance(built.online_store, type(written.online_store))
    assert os.path.normpath(folder / written.online_store.path) == built.online_store.path


def test_apply_registers_every_view_and_service_by_the_schemas_names(applied):
    cfg, result = applied
    slots = [schema.embedding_view("user", slot) for slot in schema.SLOTS]
    assert result["status"] == "applied"
    assert result["views"] == sorted(["user_features", "item_features", *slots])
    assert result["services"] == sorted(["training", "ranking_blue", "ranking_green"])

    store = open_store(cfg)
    for table in (declared.USER_FEATURES, declared.ITEM_FEATURES):
        view = store.get_feature_view(table.name)
        assert view.join_keys == [table.key]
        assert [feature.name for feature in view.features] == [
            n for n in table.names if n not in (table.key, "event_timestamp")
        ]
        assert view.ttl.total_seconds() == 0
    for slot, view_name in zip(schema.SLOTS, slots, strict=True):
        features = store.get_feature_view(view_name).features
        assert [feature.name for feature in features] == list(schema.EMBEDDING_FEATURE_NAMES)
        assert [str(feature.dtype) for feature in features] == ["Array(Float32)", "String", "Int64", "UnixTimestamp"]
        service = store.get_feature_service(schema.ranking_service(slot))
        assert [p.name for p in service.feature_view_projections] == ["user_features", "item_features", view_name]


def test_apply_again_leaves_the_registry_as_it_is_and_the_process_where_it_was(applied):
    cfg, _ = applied
    before, folder = Path(cfg.feast.registry).read_bytes(), Path.cwd()
    assert apply(cfg)["status"] == "unchanged"
    assert Path(cfg.feast.registry).read_bytes() == before
    assert Path.cwd() == folder
    assert feature_store.CONFIG_VARIABLE not in os.environ


def test_online_tables_are_written_ahead_logged(applied):
    import sqlite3

    connection = sqlite3.connect(applied[0].feast.online_connection)
    try:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    finally:
        connection.close()


def test_another_task_kind_gets_its_own_views_and_a_removed_one_loses_them(tmp_path):
    kinds = (TaskKindConfig(), TaskKindConfig(name="item", entity_column="item_id"))
    cfg = configuration(tmp_path)
    both = apply(cfg.model_copy(update={"task_kinds": kinds}))
    assert {"meta_embedding_item_blue", "meta_embedding_item_green"} <= set(both["views"])
    one = apply(cfg)
    assert one["status"] == "applied"
    left = {view.name for view in open_store(cfg).list_feature_views()}
    assert left == {"user_features", "item_features", "meta_embedding_user_blue", "meta_embedding_user_green"}


def test_store_before_apply_names_the_remedy(tmp_path):
    with pytest.raises(StoreError, match=r"registry\.db must exist; create it with limaml apply"):
        open_store(configuration(tmp_path))


def test_wrong_repository_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"feast\.repo_path must be the feature repository's folder, got .*nowhere"):
        apply(configuration(tmp_path, repo_path=str(tmp_path / "nowhere")))


def test_redis_password_comes_from_the_environment(monkeypatch):
    feast = FeastConfig(online_store="redis", online_connection="cache:6379,ssl=true", online_password="${CACHE_PASSWORD}")
    monkeypatch.delenv("CACHE_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match=r"online_password refers to \$\{CACHE_PASSWORD\}, which is not in the environment"):
        repo_config(feast)
    for password in ("secret", "p,ss", "p=ss", "db=3", "12345", "true", '"quoted"', "p@ss:w/rd#1%", "пароль", " p\\ss "):
        monkeypatch.setenv("CACHE_PASSWORD", password)
        online = repo_config(feast).online_store
        hosts, settings = RedisOnlineStore._parse_connection_string(online.connection_string)
        assert hosts == [{"host": "cache", "port": "6379"}]
        assert settings == {"ssl": True, "password": password, "socket_timeout": 10, "socket_connect_timeout": 10}
        assert online.skip_dedup


def test_a_password_in_a_url_is_percent_encoded(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "p@ss:w/rd#1%, ok")
    url = repo_config(FeastConfig(registry_type="sql", registry="postgresql://me:${DB_PASSWORD}@host/db")).registry.path
    assert make_url(url).password == "p@ss:w/rd#1%, ok"
    assert make_url(url).host == "host"


def test_sql_registry_is_named_by_its_url():
    registry = repo_config(FeastConfig(registry_type="sql", registry="sqlite:///registry.db")).registry
    assert (registry.registry_type, registry.path) == ("sql", "sqlite:///registry.db")


def test_a_second_apply_waits_for_the_first(tmp_path, monkeypatch):
    import filelock

    cfg = configuration(tmp_path)
    monkeypatch.setattr(feature_store, "_APPLY_WAIT_S", 0.05)
    (tmp_path / "data").mkdir()
    with (
        filelock.FileLock(tmp_path / "data" / "feast-apply.lock"),
        pytest.raises(BusyError, match=r"busy: another feast-apply has held .*feast-apply\.lock for over 0\.05 s"),
    ):
        apply(cfg)
