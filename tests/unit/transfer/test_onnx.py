"""An ONNX file gives what the same weights give in plain torch, however the folder pools; what is no such model is refused."""

import json
import re

import numpy as np
import pytest

from limaml.config import FeatureConfig, TransferConfig
from limaml.errors import ConfigError
from limaml.transfer.bert import BertEncoder
from limaml.transfer.onnx import OnnxEncoder
from limaml.transfer.providers import open_provider
from tests.unit.transfer.onnx_file import Graph, bert_as_onnx

TEXTS = ["Toy Story. Comedy", "Heat", "", "The war of the story. Drama, war", "漢字"]
TOLERANCE = 2e-6
"""float32: what sums lose in another order."""


@pytest.fixture
def plain(tiny_bert):
    return BertEncoder(tiny_bert)


@pytest.fixture
def onnx_file(plain):
    """Writes the same network into its folder, without the safetensors."""

    def write(name="model.onnx", **form):
        assert plain.weights
        settings = json.loads((plain.folder / "config.json").read_text())
        (plain.folder / "model.safetensors").unlink(missing_ok=True)
        path = plain.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bert_as_onnx(plain.weights, settings, **form))
        return path

    return write


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("form", [{"name": "onnx/model.onnx"}, {"kinds": False, "output": "token_embeddings"}])
def test_it_equals_the_same_weights_in_torch(tiny_bert, change, onnx_file, form, first, normalised):
    change("1_Pooling/config.json", pooling_mode_mean_tokens=not first, pooling_mode_cls_token=first)
    if not normalised:
        (tiny_bert / "modules.json").unlink()
    wanted = BertEncoder(tiny_bert).encode(TEXTS)
    onnx_file(**form)
    found = OnnxEncoder(tiny_bert).encode(TEXTS)
    assert (found.dtype, found.shape) == (np.float32, (5, 12))
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()


def test_a_vector_does_not_depend_on_its_batch_and_comes_again(tiny_bert, onnx_file):
    onnx_file()
    encoder = OnnxEncoder(tiny_bert)
    together = encoder.encode(TEXTS)
    assert OnnxEncoder(tiny_bert).encode(TEXTS).tobytes() == together.tobytes()
    assert np.abs(together - np.concatenate([encoder.encode([text]) for text in TEXTS])).max() < TOLERANCE
    assert encoder.encode([]).shape == (0, 12)


def test_the_provider_opens_it_and_its_folder_says_what_it_is(tiny_bert, onnx_file):
    path = onnx_file()
    cfg = TransferConfig(feature="meaning", provider="onnx", path=str(tiny_bert), template="{title}")
    feature = FeatureConfig(entity="item", name="meaning", type="vector", width=12, encoder="tiny 1", licence="mit")
    origin = open_provider(cfg, feature).origin
    assert (origin.name, origin.version, origin.licence, origin.width) == ("tiny", origin.digest[:12], "mit", 12)
    (tiny_bert / "model.onnx_data").write_bytes(b"weights beside it")
    beside = open_provider(cfg, feature).origin.digest
    path.write_bytes(path.read_bytes()[:-1])
    assert len({origin.digest, beside, open_provider(cfg, feature).origin.digest}) == 3


def other_model(inputs, outputs):
    graph = Graph()
    shape = graph.node("Shape", inputs[0])
    for name in outputs:
        graph.node("ConstantOfShape", shape, output=name)
    return graph.model(inputs, {name: ["N", "L"] for name in outputs})


IDS, MASK = "input_ids", "attention_mask"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"no model", r"must be a model that onnxruntime computes: .*; copy its folder again"),
        (other_model([IDS], ["states"]), r"inputs must be one of \[\['attention_mask', 'input_ids'\], .*, got \['input_ids'\]"),
        (other_model([IDS, MASK], ["a", "b"]), r"outputs must be one of .*'last_hidden_state'.*, got \['a', 'b'\]"),
        (other_model([IDS, MASK], ["pooled"]), r"shape of pooled must be one of \[\(1, 3, 12\)\], got \(1, 3\)"),
    ],
)
def test_a_file_that_is_no_encoder_of_tokens_is_refused(tiny_bert, onnx_file, model, message):
    onnx_file().write_bytes(model)
    with pytest.raises(ConfigError, match=message):
        OnnxEncoder(tiny_bert).encode(["heat"])


def test_a_text_that_is_longer_than_the_model_takes_is_refused(tiny_bert, change, onnx_file):
    onnx_file()
    change("config.json", max_position_embeddings=100)
    with pytest.raises(ConfigError, match=r"broadcast .* 16 by 52; .* or write how many tokens it takes"):
        OnnxEncoder(tiny_bert).encode(["toy " * 50])


def test_a_folder_without_the_file_is_refused(tiny_bert):
    wanted = 'with model.onnx or onnx/model.onnx, got .*tiny without; .* provider = "folder"'
    with pytest.raises(ConfigError, match=wanted):
        OnnxEncoder(tiny_bert)


def test_a_pooling_that_is_not_computed_here_is_refused(tiny_bert, change, onnx_file):
    onnx_file()
    change("1_Pooling/config.json", pooling_mode_max_tokens=True)
    with pytest.raises(ConfigError, match=re.escape("1_Pooling/config.json: mode must be one of")):
        OnnxEncoder(tiny_bert)
