"""Bundles: what is written is what is read, byte for byte repeatable, and every kind of damage is named."""

import hashlib
import json

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from limaml import schema
from limaml.config import Config, FeatureConfig
from limaml.errors import BundleError
from limaml.features.columns import CategoryEncoder, CycleEncoder, NumberEncoder, VectorEncoder
from limaml.features.encoder import Encoder
from limaml.models import bundle as bundles
from limaml.models.network import build_network
from tests import declared

CONFIG = Config.model_validate({"features": declared.FEATURES, "source": {"kind": "synthetic"}, "model": {"embedding_dim": 4}})
FILES = {
    "manifest.json",
    "config.json",
    "metrics.json",
    "card.json",
    "prior.safetensors",
    "refit.safetensors",
    "refit.encoder.json",
    "twin.safetensors",
    "twin.encoder.json",
}


def _encoder(num_items):
    items = tuple(f"i{number}" for number in range(num_items))
    texts = {"age_band": declared.AGE_BANDS, "gender": ("F", "M"), "occupation": ("artist",), "genres": ("drama",)}
    columns = {name: CategoryEncoder(values) for name, values in texts.items()} | {"hour": CycleEncoder(24)}
    for feature in declared.FEATURES:
        if feature.type == "number":
            columns[feature.name] = NumberEncoder("plain", 0.1, 2.5)
    return Encoder(declared.FEATURES, items, ("u1", "u2"), columns)


def _model(num_items, seed):
    encoder = _encoder(num_items)
    network = build_network(CONFIG, encoder.dims, seed)
    with torch.no_grad():
        network.block("user").vector.normal_(generator=torch.Generator().manual_seed(seed))
    return bundles.Model(network, encoder)


@pytest.fixture
def bundle():
    metrics, lineage = {"first_k": {"20": {"auc": 0.75}}}, {"days": {"2026-01-01": 1}, "code": "abc"}
    return bundles.Bundle(CONFIG, _model(5, 1), _model(3, 2), metrics, lineage, {"use": "research"})


@pytest.fixture
def folder(bundle, tmp_path):
    bundles.save(bundle, tmp_path / "v1")
    return tmp_path / "v1"


def _rewrite(folder, name, data):
    """Replace a file and its checksum, as somebody who made a wrong bundle would have."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _change_tensor(folder, name, change, file="refit.safetensors"):
    tensors = load_file(folder / file)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / file)
    _rewrite(folder, file, (folder / file).read_bytes())


def test_a_loaded_bundle_equals_the_saved_one(bundle, folder):
    again = bundles.load(folder)
    assert again.config == bundle.config
    assert again.metrics == bundle.metrics
    assert again.lineage == bundle.lineage
    assert again.card == bundle.card == {"use": "research"}
    for mine, read in ((bundle.refit, again.refit), (bundle.twin, again.twin)):
        assert read.encoder == mine.encoder
        expected, state = mine.network.state_dict(), read.network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(again.prior["user"], bundle.network.priors()["user"])
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_bundle_from_before_pools_is_read_as_one_without(bundle, folder):
    values = json.loads((folder / "config.json").read_text())
    del values["model"]["pool_half_life_days"], values["model"]["content_factors"]
    _rewrite(folder, "config.json", json.dumps(values).encode())
    again = bundles.load(folder)
    assert again.config == bundle.config
    assert again.network.block("user").pool_weights is None
    assert torch.equal(again.network.block("user").vector, bundle.network.block("user").vector)


def test_the_same_bundle_gives_the_same_bytes(bundle, folder, tmp_path):
    bundles.save(bundle, tmp_path / "v2")
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "v2" / name).read_bytes(), name


def test_a_server_loads_the_refit_alone(folder):
    (folder / "twin.safetensors").unlink()
    loaded = bundles.load(folder, parts=("refit",))
    assert loaded.twin is None
    assert loaded.encoder == _encoder(5)
    with pytest.raises(BundleError, match="must be saved with its twin"):
        bundles.save(loaded, folder)


def test_saving_again_replaces_the_folder_whole(bundle, folder):
    (folder / "stray").write_text("left over")
    bundles.save(bundle.with_metrics({"auc": 1}), folder)
    assert bundles.load(folder).metrics == {"auc": 1}
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["v1"]


@pytest.mark.fault("a save of a bundle that dies", after="the folder before it is still whole")
def test_an_interrupted_save_leaves_the_old_folder(bundle, folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("limaml.io.atomic.os.rename", fail)
    with pytest.raises(OSError, match="disk full"):
        bundles.save(bundle.with_metrics({}), folder)
    monkeypatch.undo()
    assert bundles.load(folder).metrics == bundle.metrics
    assert [path.name for path in folder.parent.iterdir()] == ["v1"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"must hold {name}, which is missing; download the version again"):
        bundles.load(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"none must hold manifest\.json"):
        bundles.load(tmp_path / "none")


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
@pytest.mark.fault("a flipped byte in any file of a bundle", after="the bundle is refused, and the file named")
def test_a_corrupt_file_is_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} must have its manifest's SHA-256 [0-9a-f]{{64}}, got [0-9a-f]{{64}}"):
        bundles.load(folder)


def test_a_manifest_that_is_not_one_is_named(folder):
    for text, message in (("{", "manifest.json must be JSON"), ("[]", "must hold format_version and sha256")):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(BundleError, match=message):
            bundles.load(folder)


@pytest.mark.parametrize(("found", "remedy"), [(1, "train a new version with this limaml"), (5, "update limaml to read it")])
def test_another_format_is_refused_before_anything_else_is_read(folder, found, remedy):
    (folder / "manifest.json").write_text(json.dumps({"format_version": found, "sha256": {}}))
    with pytest.raises(BundleError, match=rf"format_version must be one of \[2, 3, 4\], got {found}; {remedy}"):
        bundles.load(folder)


def test_a_wrong_width_is_named(folder):
    _change_tensor(folder, "meta_blocks.user.vector", lambda t: t[:3].clone())
    with pytest.raises(
        BundleError, match=r"meta_blocks\.user\.vector must have shape \(4,\) by its configuration and encoder, got \(3,\)"
    ):
        bundles.load(folder)


def test_weights_that_are_not_finite_are_named(folder):
    _change_tensor(folder, "global_block.items.item", lambda t: t.index_fill(0, torch.tensor([2]), float("nan")))
    with pytest.raises(BundleError, match=r"global_block\.items\.item must be finite, got 3 of 18 values"):
        bundles.load(folder)


def test_a_bad_prior_is_named(folder):
    _change_tensor(folder, "user", lambda t: t * float("inf"), "prior.safetensors")
    with pytest.raises(BundleError, match=r"prior\.safetensors: user must be finite"):
        bundles.load(folder)
    _change_tensor(folder, "user", lambda t: t[:2].clone(), "prior.safetensors")
    with pytest.raises(BundleError, match=r"prior\.safetensors: user must have shape \(4,\), got \(2,\)"):
        bundles.load(folder)


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / "refit.safetensors")
    del tensors["inner_steps.user.log_rates.factors"]
    save_file(tensors, folder / "refit.safetensors")
    _rewrite(folder, "refit.safetensors", (folder / "refit.safetensors").read_bytes())
    with pytest.raises(BundleError, match=r"missing \['inner_steps.user.log_rates.factors'\], unexpected \[\]"):
        bundles.load(folder)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("refit.safetensors", b"\x80\x04not tensors", "refit.safetensors must be a safetensors file"),
        ("refit.encoder.json", b"{}", "refit.encoder.json is not an encoder"),
        (
            "config.json",
            b'{"source": {"kind": "synthetic"}, "extra": 1}',
            "config.json is not a valid configuration",
        ),
        ("metrics.json", b"{", "metrics.json must be JSON"),
    ],
)
def test_a_file_that_matches_its_checksum_but_is_not_what_it_should_be(folder, name, data, message):
    _rewrite(folder, name, data)
    with pytest.raises(BundleError, match=message):
        bundles.load(folder)


def test_a_network_that_is_not_finite_is_not_saved(bundle, tmp_path):
    with torch.no_grad():
        bundle.network.block("user").vector[0] = float("nan")
    with pytest.raises(BundleError, match=r"refit to be saved: meta_blocks\.user\.vector must be finite, got 1 of 4"):
        bundles.save(bundle, tmp_path / "v1")
    assert list(tmp_path.iterdir()) == []


def test_vectors_of_items_are_no_part_of_a_version(tmp_path):
    """The encoder's constants are, and what a pool of them counts for; the table comes from where the bundle is used."""
    vector = FeatureConfig(entity="item", name="text", type="vector", width=2, encoder="hashes-1", licence="MIT")
    model = CONFIG.model.model_copy(update={"pool_half_life_days": 7.0, "content_factors": 1})
    cfg = CONFIG.model_copy(update={"features": (*declared.FEATURES, vector), "model": model})
    plain = _encoder(3)
    encoder = Encoder(cfg.features, plain.items, plain.entities, {**plain.columns, "text": VectorEncoder((0.5, -1.0), 2.0)})
    items = pa.table({"item_id": ["i1"], "text": [[2.5, 3.0]]}, schema=schema.tables(cfg.features).item_vectors.arrow)
    model = bundles.Model(build_network(cfg, encoder.dims, 1), encoder)
    with torch.no_grad():
        model.network.block("user").pool_weights.normal_(generator=torch.Generator().manual_seed(1))
    bundles.save(bundles.Bundle(cfg, model, model).with_items(items), tmp_path / "with")
    bundles.save(bundles.Bundle(cfg, model, model), tmp_path / "without")
    for name in FILES:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    loaded = bundles.load(tmp_path / "with")
    assert loaded.encoder == encoder
    assert loaded.config == cfg
    for name in ("pool_weights", "vector"):
        assert torch.equal(getattr(loaded.network.block("user"), name), getattr(model.network.block("user"), name))
    assert loaded.encoder.item_table is None
    for part in (loaded.with_items(items).refit, loaded.with_items(items).twin):
        assert part.encoder.item_table.encoded.tolist() == [[0.0, 0.0, 0.0], [1.0, 2.0, 1.0]]
    assert bundles.load(tmp_path / "with", parts=("refit",)).with_items(items).twin is None
