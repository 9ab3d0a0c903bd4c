"""What an encoder says of itself against what a feature declares, and what is not on this machine."""

from dataclasses import replace

import pytest

from limaml.config import FeatureConfig, TransferConfig
from limaml.errors import ConfigError
from limaml.transfer.encoders import Origin, require_declared
from limaml.transfer.providers import open_provider

ORIGIN = Origin("tiny", "1", "0" * 64, 12, "MIT", "")
FEATURE = FeatureConfig(entity="item", name="meaning", type="vector", width=12, encoder="tiny 1", licence="mit")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"width": 13}, "width of meaning must be its encoder's, 12, got 13; declare it so if that is what you mean"),
        ({"encoder": "tiny 2"}, "encoder of meaning must be its encoder's, 'tiny 1', got 'tiny 2'"),
        ({"licence": "Apache-2.0"}, "licence of meaning must be its encoder's, 'MIT', got 'Apache-2.0'"),
    ],
)
def test_an_encoder_must_be_what_is_declared(declared, message):
    require_declared(FEATURE, ORIGIN)
    with pytest.raises(ConfigError, match=message):
        require_declared(FEATURE.model_copy(update=declared), ORIGIN)


def test_an_encoder_without_a_licence_is_refused():
    with pytest.raises(ConfigError, match="the licence of tiny 1 must be declared before it is used, got none; write it into"):
        require_declared(FEATURE, replace(ORIGIN, licence=""))


@pytest.mark.parametrize("provider", ["folder", "onnx", "static", "graph"])
def test_a_hub_id_is_refused_because_nothing_is_fetched(provider):
    template = "" if provider == "graph" else "{title}"
    cfg = TransferConfig(feature="meaning", provider=provider, path="sentence-transformers/all-MiniLM-L6-v2", template=template)
    with pytest.raises(ConfigError, match="nothing is fetched at run time, got 'sentence-transformers/all"):
        open_provider(cfg, FEATURE)
