"""The registry against a real MLflow store (SQLite) in a temporary folder."""

from pathlib import Path

import pytest

from limaml import registry
from limaml.config import RegistryConfig
from limaml.errors import BundleError, StoreError
from limaml.registry import Registry


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    root = tmp_path_factory.mktemp("registry")
    return Registry(
        RegistryConfig(
            tracking_uri=f"sqlite:///{root}/new/folder/mlflow.db", artifact_root=str(root / "artifacts"), model_name="m"
        )
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle" / "twin").mkdir(parents=True)
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "bundle" / "twin" / "weights").write_bytes(b"\x01\x02")
    return tmp_path / "bundle"


def test_nothing_is_champion_before_the_first_version(store: Registry) -> None:
    empty = Registry(store._cfg.model_copy(update={"model_name": "empty"}))
    assert empty.champion() is None
    assert empty.versions() == []
    assert empty.find(registry.FINGERPRINT, "abc") == []


def test_a_registered_bundle_is_found_by_tag_and_comes_back_byte_for_byte(
    store: Registry, bundle: Path, tmp_path: Path
) -> None:
    run = store.start_run("train", {"meta.inner_steps": 3}, {"limaml.through": "2026-01-01"})
    version = store.register(bundle, run, {registry.FINGERPRINT: "abc"})
    store.end_run(run)

    assert [found.version for found in store.find(registry.FINGERPRINT, "abc")] == [version]
    assert store.get(version).run_id == run
    copy = store.download(version, tmp_path / "copy")
    files = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert files == {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def test_versions_are_listed_newest_first(store: Registry, bundle: Path) -> None:
    versions = [store.register(bundle, store.start_run("train"), {registry.FINGERPRINT: "same"}) for _ in range(3)]
    assert [found.version for found in store.find(registry.FINGERPRINT, "same")] == versions[::-1]


def test_versions_of_another_model_are_not_found(store: Registry, bundle: Path) -> None:
    other = Registry(store._cfg.model_copy(update={"model_name": "other"}))
    store.register(bundle, store.start_run("train"), {})
    version = other.register(bundle, other.start_run("train"), {registry.FINGERPRINT: "of another model"})
    assert store.find(registry.FINGERPRINT, "of another model") == []
    assert other.find(registry.FINGERPRINT, "of another model") == other.versions() == [other.get(version)]
    assert other.champion() is None


def test_versions_are_found_on_every_page_of_the_answer(store: Registry, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [store.register(bundle, store.start_run("train"), {registry.FINGERPRINT: "pages"}) for _ in range(3)]
    search = store._client.search_model_versions
    monkeypatch.setattr(store._client, "search_model_versions", lambda *query, **more: search(*query, max_results=2, **more))
    assert [found.version for found in store.find(registry.FINGERPRINT, "pages")] == versions[::-1]


def test_tags_are_written_in_the_order_given(store: Registry, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = store.register(bundle, store.start_run("train"), {})
    written, write = [], store._client.set_model_version_tag
    monkeypatch.setattr(store._client, "set_model_version_tag", lambda *tag: written.append(tag[2]) or write(*tag))
    store.set_tags(version, {registry.STATE: "filling", registry.SLOT: "blue", registry.FILL_DAY: "2026-01-05"})
    assert written == [registry.STATE, registry.SLOT, registry.FILL_DAY]


def test_the_alias_moves_and_brings_the_tags(store: Registry, bundle: Path) -> None:
    first, second = (store.register(bundle, store.start_run("train"), {}) for _ in range(2))
    store.set_champion(first)
    store.set_tags(first, {registry.SLOT: "blue", registry.STATE: "ready"})
    champion = store.champion()
    assert champion is not None
    assert (champion.version, champion.tags) == (first, {registry.SLOT: "blue", registry.STATE: "ready"})
    store.set_champion(second)
    assert Registry(store._cfg).champion() == store.get(second)


def test_a_tag_of_none_is_removed_and_removing_twice_is_the_same(store: Registry, bundle: Path) -> None:
    version = store.register(bundle, store.start_run("train"), {registry.SLOT: "blue", "other": "1"})
    for _ in range(2):
        store.set_tags(version, {registry.SLOT: None})
        assert store.get(version).tags == {"other": "1"}


def test_metrics_of_many_steps_are_all_kept(store: Registry) -> None:
    run = store.start_run("train")
    store.log_history(run, ((step, {"loss": float(step), "auc": 0.5}) for step in range(700)))
    store.log_metrics(run, {"final": 2.0})
    values = [metric.value for metric in store._client.get_metric_history(run, "loss")]
    assert sorted(values) == [float(step) for step in range(700)]
    assert store._client.get_run(run).data.metrics == {"loss": 699.0, "auc": 0.5, "final": 2.0}


def test_parameters_of_a_long_configuration_are_all_kept_and_a_long_value_is_cut(store: Registry) -> None:
    """MLflow takes 100 a call and 6,000 characters a value."""
    run = store.start_run("train", {f"section.key{number}": number for number in range(250)} | {"long": "x" * 7000})
    kept = store._client.get_run(run).data.params
    assert kept == {f"section.key{number}": str(number) for number in range(250)} | {"long": "x" * 6000}


def test_a_run_says_how_it_ended(store: Registry) -> None:
    good, bad = store.start_run("train"), store.start_run("train")
    store.end_run(good)
    store.end_run(bad, failed=True)
    assert [store._client.get_run(run).info.status for run in (good, bad)] == ["FINISHED", "FAILED"]


def test_what_is_not_there_is_named(store: Registry, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="model m has no version '99'"):
        store.get("99")
    with pytest.raises(StoreError, match="model m has no version '99'"):
        store.download("99", tmp_path)
    with pytest.raises(StoreError, match=r"^model registry at sqlite:///.* failed: .*not found"):
        store.set_champion("99")
    with pytest.raises(BundleError, match=r"bundle folder .*absent does not exist"):
        store.register(tmp_path / "absent", store.start_run("train"), {})


def test_a_bundle_whose_files_are_gone_is_a_bundle_error(store: Registry, bundle: Path, tmp_path: Path) -> None:
    version = store.register(bundle, store.start_run("train"), {})
    source = Path(store._client.get_model_version("m", version).source)
    source.rename(source.with_name("moved"))
    with pytest.raises(BundleError, match=f"bundle of version {version} must be at {source}"):
        store.download(version, tmp_path / "copy")


def test_a_registry_that_does_not_answer_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database" * 100)
    broken = Registry(RegistryConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))
    with pytest.raises(StoreError, match=r"model registry at sqlite:///.* failed"):
        broken.champion()


def test_a_registry_that_stops_answering_is_not_one_without_the_version(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    breaking = Registry(RegistryConfig(tracking_uri=f"sqlite:///{database}"))
    with pytest.raises(StoreError, match="has no version '1'; `limaml status` lists"):
        breaking.get("1")
    database.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreError, match=r"^model registry at sqlite:///.* failed"):
        breaking.get("1")


def test_the_registry_is_named_without_its_password() -> None:
    cfg = RegistryConfig(tracking_uri="postgresql://limaml:secret@db:5432/mlflow")
    assert str(Registry(cfg)._store_error(OSError("away"))) == (
        "model registry at db:5432/mlflow failed: away; is it running and reachable?"
    )


@pytest.mark.parametrize("root", ["s3://bucket/mlflow", "mlflow-artifacts:/limaml", "file:///data/mlflow"])
def test_an_artifact_root_that_is_a_url_stays_one(store: Registry, root: str) -> None:
    cfg = store._cfg.model_copy(update={"artifact_root": root, "experiment": root})
    run = Registry(cfg).start_run("train")
    assert store._client.get_run(run).info.artifact_uri.startswith(root)


def test_an_artifact_root_that_is_a_folder_is_one_from_everywhere(store: Registry) -> None:
    cfg = store._cfg.model_copy(update={"artifact_root": "some/folder", "experiment": "relative"})
    run = Registry(cfg).start_run("train")
    assert store._client.get_run(run).info.artifact_uri.startswith(str(Path("some/folder").absolute()))
