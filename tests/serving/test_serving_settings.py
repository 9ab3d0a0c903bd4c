"""Settings the service refuses, before it listens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from limaml.config import Config, ServingConfig
from limaml.errors import ConfigError
from serving import run
from serving.auth import read_token
from serving.champion import Champion
from serving.metrics import Metrics

ROOT = Path(__file__).parents[2]


def settings(**sections):
    return Config.model_validate({"source": {"kind": "synthetic"}, **sections})


def test_the_store_must_give_up_before_the_request_does():
    with pytest.raises(ValueError, match=r"store_timeout_s must be < timeout_s \(2\), got 2"):
        settings(serving={"timeout_s": 2.0, "store_timeout_s": 2.0})


def test_only_users_are_looked_up():
    cfg = settings(task_kinds=[{"name": "item", "entity_column": "item_id"}])
    with pytest.raises(ConfigError, match="item must hang on user_id to be served, got item_id"):
        Champion(cfg, Metrics(CollectorRegistry()))


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


def test_the_service_runs_in_utc_whatever_its_callers_zone():
    given = {"TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "4", "PATH": "/bin"}
    environment = run.environment_of("configs/movielens.toml", given)
    assert environment["TZ"] == "UTC"
    assert (environment["OMP_NUM_THREADS"], environment["PATH"]) == ("4", "/bin")
    assert environment["BENTOML_DO_NOT_TRACK"] == "True"
    assert environment["LIMAML_CONFIG"] == str(Path("configs/movielens.toml").absolute())
    assert Path(environment["BENTOML_HOME"]).is_absolute()


def test_an_unknown_setting_ends_the_start(tmp_path):
    (tmp_path / "wrong.toml").write_text("[source]\nkind = 'synthetic'\n[serving]\nprot = 1\n")
    ended = started("-m", "serving.run", "--config", str(tmp_path / "wrong.toml"))
    assert ended.returncode == 2
    assert "serving.prot is not a known key (value 1)" in ended.stderr


def test_without_the_variable_bentoml_says_what_is_missing():
    ended = started("-c", "import serving.service")
    assert ended.returncode != 0
    assert "LIMAML_CONFIG must name the configuration file" in ended.stderr


def refused(tmp_path, **serving):
    """Standard error of a start that is refused with exit code 2."""
    (tmp_path / "config.json").write_text(json.dumps({"source": {"kind": "synthetic"}, "serving": serving}))
    ended = started("-m", "serving.run", "--config", str(tmp_path / "config.json"))
    assert ended.returncode == 2
    return ended.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_strangers_are_not_served_without_a_token(tmp_path, host):
    assert f"serving.host must be loopback where no token is asked for, got {host}; name a" in refused(tmp_path, host=host)


def test_other_hosts_are_allowed_with_a_token_or_when_told_so(tmp_path):
    (tmp_path / "token").write_text("secret\n")
    for host in ("127.0.0.1", "::1", "localhost"):
        assert read_token(ServingConfig(host=host)) is None
    assert read_token(ServingConfig(host="0.0.0.0", token_file=str(tmp_path / "token"))) == b"secret"
    assert read_token(ServingConfig(host="0.0.0.0", allow_remote_without_token=True)) is None


def test_a_token_file_must_hold_a_token(tmp_path):
    assert "must be a readable file, got missing: No such file" in refused(tmp_path, token_file="missing")
    (tmp_path / "empty").write_text(" \n")
    assert f"must hold a token, got an empty file {tmp_path}/empty" in refused(tmp_path, token_file=str(tmp_path / "empty"))
