"""Adapters add a low-rank product to chosen weights; written, the folder holds the sum and computes the same vectors."""

import json

import numpy as np
import pytest
import torch

from limaml.errors import ConfigError
from limaml.transfer.adapters import adapted, new_adapters, write_adapted
from limaml.transfer.bert import BertEncoder
from limaml.transfer.static import StaticEncoder, distil

TEXTS = ["Toy story", "heat of war.", "comedy"]


@pytest.fixture
def encoder(tiny_bert):
    return BertEncoder(tiny_bert)


@pytest.fixture
def adapters(encoder):
    """Of the second layer, with an up that is not zero."""
    made = new_adapters(encoder, [1], 2, torch.Generator().manual_seed(0))
    for _, up in made.values():
        torch.nn.init.normal_(up, generator=torch.Generator().manual_seed(1))
    return made


def test_new_ones_change_nothing_and_are_of_the_named_layers(encoder):
    made = new_adapters(encoder, [0, 1], 2, torch.Generator().manual_seed(0))
    assert {name.split(".")[2] for name in made} == {"0", "1"}
    vectors = encoder.vectors_by(adapted(encoder, made), encoder.tokens_of(TEXTS)).detach().numpy()
    assert np.allclose(vectors, encoder.encode(TEXTS), atol=1e-6)


def test_the_written_folder_is_an_encoder_of_the_merged_weights(encoder, adapters, tmp_path):
    origin = write_adapted(encoder, adapters, tmp_path / "made" / "tuned", {"tuned": {"rank": 2}})
    read = BertEncoder(tmp_path / "made" / "tuned")
    expected = encoder.vectors_by(adapted(encoder, adapters), encoder.tokens_of(TEXTS)).detach().numpy()
    assert np.allclose(read.encode(TEXTS), expected, atol=1e-6)
    assert np.abs(read.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-3
    assert (origin.name, origin.licence, origin.width) == ("tiny-tuned", "mit", 12)
    assert origin.version == origin.digest[:12] != encoder.origin.digest[:12]
    assert origin.attribution == f"adapted from {encoder.origin.label}"
    assert json.loads((read.folder / "encoder.json").read_text())["tuned"] == {"rank": 2}
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["tuned"]


def test_a_static_encoder_is_distilled_from_it(encoder, adapters, tmp_path):
    write_adapted(encoder, adapters, tmp_path / "tuned", {})
    origin = distil(BertEncoder(tmp_path / "tuned"), tmp_path / "static")
    assert origin.name == "tiny-tuned-static"
    distil(encoder, tmp_path / "plain")
    ours, theirs = (StaticEncoder(tmp_path / name).encode(TEXTS) for name in ("static", "plain"))
    assert np.abs(ours @ ours.T - theirs @ theirs.T).max() > 1e-3


def test_a_write_that_fails_leaves_what_was_there(encoder, adapters, tmp_path):
    write_adapted(encoder, adapters, tmp_path / "tuned", {})
    before = BertEncoder(tmp_path / "tuned").origin
    with pytest.raises(TypeError):
        write_adapted(encoder, adapters, tmp_path / "tuned", {"tuned": object()})
    assert BertEncoder(tmp_path / "tuned").origin == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tuned"]


def test_a_rank_as_wide_as_the_weights_is_refused(encoder):
    with pytest.raises(ConfigError, match="rank must be less than the encoder's width, 12, got 12; lower it"):
        new_adapters(encoder, [0], 12, torch.Generator())
