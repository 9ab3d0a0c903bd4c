"""Weights and settings as format 2 wrote them, read into the network that they were trained in."""

import json

import pytest
import torch
from safetensors.torch import save

from limaml.config import Config
from limaml.errors import BundleError
from limaml.models import bundle as bundles
from limaml.models import older_bundles
from limaml.models.network import build_network
from tests.unit.models.test_bundle import CONFIG, _encoder, _rewrite

ITEMS = {"item": (6, 3), "content": (1, 3), "unknown_item": (3,)}
FORMAT_2 = {
    # The names that release 0.1 gave, and what each is called now: (name, rows of it).
    "task_vector": {
        "meta.vector": [("meta_blocks.user.vector", slice(None))],
        "meta.item_scale": [("meta_blocks.user.item_scale", slice(None))],
        "log_rates.vector": [
            ("inner_steps.user.log_rates.factors", slice(0, 3)),
            ("inner_steps.user.log_rates.level", slice(3, 4)),
        ],
        "log_damping.vector": [
            ("inner_steps.user.log_damping.factors", slice(0, 3)),
            ("inner_steps.user.log_damping.level", slice(3, 4)),
        ],
        "global_block.item": [("global_block.items.item", slice(None))],
        "global_block.content": [("global_block.items.content", slice(None))],
        "global_block.unknown_item": [("global_block.items.unknown_item", slice(None))],
    },
    "row_mlp": {
        **{f"meta.{name}": [(f"meta_blocks.user.{name}", slice(None))] for name in ("mlp.weight0", "mlp.bias0", "empty")},
        **{f"meta.mlp.{name}": [(f"meta_blocks.user.mlp.{name}", slice(None))] for name in ("weight1", "bias1")},
        **{
            f"{part}.{name}": [(f"inner_steps.user.{part}.{name}", slice(None))]
            for part in ("log_rates", "log_damping")
            for name in ("weight0", "bias0", "weight1", "bias1")
        },
        # A table that nothing read, since the item's vector is no input where embeddings are.
        **{f"global_block.{name}": [] for name in ITEMS},
    },
}
MODELS = {
    "task_vector": {"meta_block": "task_vector", "start": "items"},
    "row_mlp": {"meta_block": "row_mlp", "interaction": "concat"},
}


def config(block):
    model, meta = CONFIG.model.model_copy(update=MODELS[block]), CONFIG.meta.model_copy(update={"inner_step": "gradient"})
    return CONFIG.model_copy(update={"model": model, "meta": meta})


def old_weights(block, network):
    """Format 2's weights of a network of random numbers, by the table above."""
    names = FORMAT_2[block]
    layers = {name for name in network.state_dict() if name.startswith("global_block.mlp.")}
    names = names | {name.replace("mlp.", ""): [(name, slice(None))] for name in layers}
    state, weights = network.state_dict(), {}
    for old, parts in names.items():
        found = [state[new] for new, _ in parts]
        weights[old] = torch.cat(found) if found else torch.ones(ITEMS[old.rpartition(".")[2]])
    return weights


def randomised(block):
    network, generator = build_network(config(block), _encoder(5).dims), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("block", FORMAT_2)
def test_weights_find_their_places(block):
    network = randomised(block)
    found = older_bundles.weights_of(2, old_weights(block, network), config(block))
    assert found.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(found[name], value), name


def test_up_to_format_3_the_prior_counted_as_no_rows():
    network = randomised("task_vector")
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith("prior_rows")}
    found = older_bundles.weights_of(3, weights, config("task_vector"))
    assert found.keys() == network.state_dict().keys()
    assert not found["prior_rows_user"].any()


def test_the_inner_step_was_the_gradients():
    values = {"meta": {"inner_steps": 4}, "model": {"embedding_dim": 4}}
    found = older_bundles.config_of_format_2(values)
    assert found == {"meta": {"inner_steps": 4, "inner_step": "gradient"}, "model": {"embedding_dim": 4}}
    assert values["meta"] == {"inner_steps": 4}


@pytest.mark.parametrize("block", FORMAT_2)
def test_a_folder_of_format_2_is_read_and_saved_as_what_is_written_now(block, tmp_path):
    network = randomised(block)
    model = bundles.Model(network, _encoder(5))
    bundles.save(bundles.Bundle(config(block), model, model), tmp_path / "old")
    values = json.loads((tmp_path / "old" / "config.json").read_text())
    del values["meta"]["inner_step"], values["meta"]["prior_std"]
    _rewrite(tmp_path / "old", "config.json", json.dumps(values).encode())
    for part in ("refit", "twin"):
        _rewrite(tmp_path / "old", f"{part}.safetensors", save(old_weights(block, network)))
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text()) | {"format_version": 2}
    del manifest["sha256"]["card.json"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "old" / "card.json").unlink()
    read = bundles.load(tmp_path / "old")
    assert read.card == {}
    assert read.config == Config.model_validate(config(block).model_dump())
    bundles.save(read, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["format_version"] == bundles.FORMAT_VERSION
    for name, value in bundles.load(tmp_path / "new").network.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name
    # A tensor of format 2 that is missing is named as the network of today has it.
    _rewrite(tmp_path / "old", "refit.safetensors", save({"global_block.layers.0.bias": torch.zeros(64)}))
    with pytest.raises(BundleError, match=r"missing \['global_block.*'meta_blocks\.user\."):
        bundles.load(tmp_path / "old")
