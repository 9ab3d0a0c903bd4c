"""The encoder of sentences equals torch's own layers, text by text, and a text's vector does not depend on its batch."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from limaml.errors import ConfigError
from limaml.transfer.bert import BertEncoder, minilm

TEXTS = ["Toy Story. Animation, Comedy", "Heat", "", "The war of the worlds, told at length. Drama, War", "漢字 🦊"]
TOLERANCE = 1e-6
"""float32: what its sums lose in another order, several times over."""


def plain(encoder, text):
    """(H,) of one text by `nn.TransformerEncoderLayer`, without padding."""
    weights, settings = encoder.weights, encoder._settings
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    ids = torch.tensor(encoder._tokenizer.encode(text).ids)
    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    norm = [weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")]
    x = nn.functional.layer_norm(x, (width,), *norm, settings["layer_norm_eps"])[None]
    for number in range(settings["num_hidden_layers"]):
        name = f"encoder.layer.{number}"
        inner = len(weights[f"{name}.intermediate.dense.bias"])
        layer = nn.TransformerEncoderLayer(
            width, heads, inner, 0.0, "gelu", settings["layer_norm_eps"], batch_first=True
        ).eval()
        parts = {
            "self_attn.out_proj": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "linear1": "intermediate.dense",
            "linear2": "output.dense",
            "norm2": "output.LayerNorm",
        }
        state = {
            f"{ours}.{part}": weights[f"{name}.{theirs}.{part}"]
            for ours, theirs in parts.items()
            for part in ("weight", "bias")
        }
        for part in ("weight", "bias"):
            each = [weights[f"{name}.attention.self.{which}.{part}"] for which in ("query", "key", "value")]
            state[f"self_attn.in_proj_{part}"] = torch.cat(each)
        layer.load_state_dict(state)
        x = layer(x)
    return x[0].detach()


@pytest.fixture(scope="module")
def packaged():
    return minilm()


def test_the_packaged_encoder_equals_torchs_own_layers_text_by_text(packaged):
    found = packaged.encode(TEXTS)
    assert found.shape == (5, 384)
    assert found.dtype == np.float32
    for row, text in zip(found, TEXTS, strict=True):
        wanted = nn.functional.normalize(plain(packaged, text).mean(0), dim=0).numpy()
        assert np.abs(row - wanted).max() < TOLERANCE, text


def test_a_vector_does_not_depend_on_its_batch_and_comes_again(packaged):
    together = packaged.encode(TEXTS)
    assert packaged.encode(TEXTS).tobytes() == together.tobytes()
    alone = np.concatenate([packaged.encode([text]) for text in TEXTS])
    assert np.abs(together - alone).max() < TOLERANCE
    assert np.abs(together[0] - together[1]).max() > 1000 * TOLERANCE


def test_the_packaged_encoder_says_what_it_is(packaged):
    origin = packaged.origin
    assert (origin.label, origin.width, origin.licence) == ("all-MiniLM-L6-v2 0.1.0", 384, "apache-2.0")
    assert re.fullmatch("[0-9a-f]{64}", origin.digest)
    assert "Reimers" in origin.attribution


@pytest.mark.parametrize("first", [False, True])
def test_a_folder_pools_as_it_says(tiny_bert, change, first):
    change("1_Pooling/config.json", pooling_mode_mean_tokens=not first, pooling_mode_cls_token=first)
    (tiny_bert / "modules.json").unlink()  # Then nothing is normalised.
    encoder = BertEncoder(tiny_bert)
    texts = ["toy story", "heat", "the war of the heat. drama, comedy"]
    for row, text in zip(encoder.encode(texts), texts, strict=True):
        states = plain(encoder, text)
        assert np.abs(row - (states[0] if first else states.mean(0)).numpy()).max() < 10 * TOLERANCE, text


def test_dropout_falls_on_the_embeddings_and_on_what_each_sublayer_adds(tiny_bert):
    encoder, dropped = BertEncoder(tiny_bert), []

    def drop(x):
        dropped.append(x.shape)
        return x * 0.5

    tokens = encoder.tokens_of(["toy story", "heat"])
    halved = encoder.vectors_by(encoder.weights, tokens, drop)
    assert dropped == [(2, 4, 12)] * (1 + 2 * encoder.num_layers)
    assert not torch.allclose(halved, encoder.vectors_by(encoder.weights, tokens), atol=0.01)


def test_a_text_is_cut_where_the_folder_says(tiny_bert):
    encoder = BertEncoder(tiny_bert)
    assert np.array_equal(encoder.encode(["toy " * 14]), encoder.encode(["toy " * 50]))  # 16 positions, two of them marks.
    (tiny_bert / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    encoder = BertEncoder(tiny_bert)
    assert np.array_equal(encoder.encode(["toy story heat"]), encoder.encode(["toy story heat drama"]))


def test_a_folder_says_what_it_is(tiny_bert, change):
    origin = BertEncoder(tiny_bert).origin
    assert (origin.name, origin.version, origin.licence, origin.width) == ("tiny", origin.digest[:12], "mit", 12)
    (tiny_bert / "encoder.json").write_text('{"name": "films", "version": "3", "licence": "CC-BY-4.0", "attribution": "us"}')
    told = BertEncoder(tiny_bert).origin
    assert (told.label, told.licence, told.attribution, told.digest) == ("films 3", "CC-BY-4.0", "us", origin.digest)
    change("config.json", pad_token_id=1)
    assert BertEncoder(tiny_bert).origin.digest != origin.digest


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"model_type": "mpnet"}, r"model_type must be one of \['bert'\], got 'mpnet'; choose another model"),
        ("config.json", {"hidden_act": "relu"}, r"hidden_act must be one of \['gelu'\], got 'relu'"),
        ("config.json", {"position_embedding_type": "relative_key"}, "got 'relative_key'"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True},
            r"mode must be one of .*got \['pooling_mode_mean_tokens', ",
        ),
    ],
)
def test_a_network_that_is_not_computed_here_is_refused(tiny_bert, change, name, values, message):
    change(name, **values)
    with pytest.raises(ConfigError, match=message):
        BertEncoder(tiny_bert)


def test_a_layer_after_the_pooling_is_refused(tiny_bert):
    (tiny_bert / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(ConfigError, match=r"module 0 must be one of .* got 'Dense'"):
        BertEncoder(tiny_bert)


def test_a_folder_without_its_files_is_refused(tiny_bert):
    (tiny_bert / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tiny without tokenizer\.json; copy the whole folder"):
        BertEncoder(tiny_bert)
    (tiny_bert / "model.safetensors").rename(tiny_bert / "model.onnx")
    with pytest.raises(ConfigError, match=r'got an ONNX model in .*tiny; use provider = "onnx"'):
        BertEncoder(tiny_bert)
    (tiny_bert / "config.json").write_text("{")
    (tiny_bert / "model.onnx").rename(tiny_bert / "model.safetensors")
    (tiny_bert / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json must be JSON"):
        BertEncoder(tiny_bert)
