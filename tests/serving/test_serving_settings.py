"""Settings the service refuses, before it listens."""

import subprocess
import sys
from pathlib import Path

import pytest

from limaml.config import Config
from limaml.errors import ConfigError
from serving.champion import Champion

ROOT = Path(__file__).parents[2]


def settings(**sections):
    return Config.model_validate({"source": {"kind": "synthetic"}, **sections})


def test_the_store_must_give_up_before_the_request_does():
    with pytest.raises(ValueError, match=r"store_timeout_s must be < timeout_s \(2\), got 2"):
        settings(serving={"timeout_s": 2.0, "store_timeout_s": 2.0})


def test_only_users_are_looked_up():
    cfg = settings(task_kinds=[{"name": "item", "entity_column": "item_id"}])
    with pytest.raises(ConfigError, match="item must hang on user_id to be served, got item_id"):
        Champion(cfg, on_switch=lambda loaded: None)


def started(*command):
    """Run a start that must fail; returns the ended process."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_configuration_that_is_not_there_ends_the_start():
    ended = started("-m", "serving.run", "--config", "missing.toml")
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "error: configuration missing.toml does not exist; name one with --config, e.g. configs/movielens.toml\n"
    )


def test_an_unknown_setting_ends_the_start(tmp_path):
    (tmp_path / "wrong.toml").write_text("[source]\nkind = 'synthetic'\n[serving]\nprot = 1\n")
    ended = started("-m", "serving.run", "--config", str(tmp_path / "wrong.toml"))
    assert ended.returncode == 2
    assert "serving.prot is not a known key (value 1)" in ended.stderr


def test_without_the_variable_bentoml_says_what_is_missing():
    ended = started("-c", "import serving.service")
    assert ended.returncode != 0
    assert "LIMAML_CONFIG must name the configuration file" in ended.stderr
