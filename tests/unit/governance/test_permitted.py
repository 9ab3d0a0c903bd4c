"""What data and encoders may be used for: what is undeclared, or permits less than is intended, is refused with the remedy."""

from pathlib import Path
from typing import Any

import pytest

from limaml.config import Config, load, require_features, require_permitted, require_permitted_version
from limaml.config.governance import terms_of
from limaml.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))
OWN = {"kind": "parquet", "path": "/delivered"}
VECTOR = {"entity": "item", "name": "text", "type": "vector", "width": 3, "encoder": "hashes-1", "licence": "MIT"}


def config(use: str = "research", source: dict[str, Any] = OWN, **feature: Any) -> Config:
    features = [{"entity": "item", "name": "events", "type": "number", "aggregate": "count"}]
    features += [VECTOR | feature] if feature else []
    return Config.model_validate({"source": source, "features": features, "governance": {"intended_use": use}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_declares_terms_that_permit_its_use(path: Path) -> None:
    cfg = load(path)
    require_permitted(cfg)
    source = next(terms_of(cfg))
    assert source.are_declared
    assert source.attribution or cfg.source.kind == "synthetic"


def test_recorded_data_is_refused_for_a_product() -> None:
    """Its terms come with the source: nobody need know of them to be held to them."""
    for name, permitted in (("movielens", "research"), ("completejourney", "education")):
        with pytest.raises(ConfigError, match=rf"by the source {name}, which permits {permitted} .*got any; use other"):
            require_permitted(config("any", {"kind": name}))
    require_permitted(config("any", {"kind": "synthetic"}))


@pytest.mark.parametrize("licence", ["", " ", "unknown"])
def test_a_licence_that_is_not_declared_is_refused(licence: str) -> None:
    with pytest.raises(ConfigError, match=r"source\.licence must say under which licence the source parquet may be used"):
        require_permitted(config(source=OWN | {"licence": licence}))
    with pytest.raises(ConfigError, match=r"features\.text\.licence must say .* the vector text of hashes-1 may be used"):
        require_permitted(config(source=OWN | {"licence": "CC0-1.0"}, licence="unknown"))


@pytest.mark.parametrize(
    ("permitted", "refused"),
    [
        ("any", []),
        ("non_commercial", ["any"]),
        ("research", ["any", "non_commercial", "education"]),
        ("education", ["any", "non_commercial", "research"]),
    ],
)
def test_what_is_permitted_covers_what_is_narrower(permitted: str, refused: list[str]) -> None:
    source = OWN | {"licence": "ours", "permitted_use": "any"}
    for use in ("any", "non_commercial", "research", "education"):
        cfgs = [config(use, source | {"permitted_use": permitted}), config(use, source, permitted_use=permitted)]
        for cfg, key in zip(cfgs, ("source", r"features\.text"), strict=True):
            if use in refused:
                with pytest.raises(ConfigError, match=rf"permits {permitted} .*got {use}; .*correct {key}\.permitted_use"):
                    require_permitted(cfg)
            else:
                require_permitted(cfg)


def test_a_version_is_held_to_what_is_declared_now_of_the_same_data() -> None:
    """One of a release without terms serves once they are declared; one of other data is held to that data's."""
    silent, declared = config(), config("any", OWN | {"licence": "ours", "permitted_use": "any"})
    with pytest.raises(ConfigError, match=r"source\.licence must say"):
        require_permitted_version(silent, silent)
    require_permitted_version(silent, declared)
    require_permitted_version(config(source=OWN | {"licence": "ours"}), declared)
    with pytest.raises(ConfigError, match="permitted by the source movielens"):
        require_permitted_version(config(source={"kind": "movielens"}), declared)


def test_what_is_said_of_a_feature_calls_for_no_other_model() -> None:
    before = config(licence="MIT")
    said = {"attribution": "me", "purpose": "likeness", "consent": "public", "licence": "MIT", "permitted_use": "any"}
    after = config(**said)
    assert before.features != after.features
    assert before.fingerprint("features") == after.fingerprint("features")
    require_features(before, after, "1")
    with pytest.raises(ConfigError, match="text changed"):
        require_features(before, config(**said, encoder="hashes-2"), "1")
