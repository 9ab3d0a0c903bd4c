"""The dashboards of `make run`: this machine's Prometheus scrapes what the verbs left, and serves the page drawn from it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from limaml.config import Config
from limaml.local import stack, watch
from tests.e2e.installed import installed
from tests.polling import wait_for

pytestmark = pytest.mark.services


@pytest.fixture
def cfg(tmp_path: Path, free_ports: Callable[[int], list[int]]) -> Iterator[Config]:
    *ports, prometheus, exporter = free_ports(5)
    cfg = installed(tmp_path / "run", ports, local_prometheus_port=prometheus, local_exporter_port=exporter)
    yield cfg
    stack.stop(cfg)


def test_the_page_shows_every_dashboard_from_a_live_prometheus(cfg: Config, tmp_path: Path) -> None:
    assert watch.missing() == [], f"must be installed for this test: {watch.INSTALL}"
    running = stack.new_stack(cfg, tmp_path / "config.json")
    url = watch.start(running, cfg)
    (Path(cfg.monitoring.textfile_dir) / "limaml_publish.prom").write_text(
        'limaml_published_entities{kind="user",state="older"} 7\n'
    )
    wait_for(lambda: stack.answers(url), "the page", 120.0)
    page = httpx.get(url, trust_env=False).text
    assert re.findall(r'alt="LiMAML / (\w+)"', page) == ["freshness", "pipeline", "serving"]
    assert "Grafana itself does not run here" in page
    api = url.removesuffix("/consoles/index.html") + "/api/v1"

    def asked(path: str, **parameters: str) -> dict:
        return httpx.get(f"{api}/{path}", params=parameters, trust_env=False).json()["data"]

    wait_for(lambda: asked("query", query="limaml_published_entities")["result"], "the verbs' metrics", 60.0)
    assert {group["name"] for group in asked("rules")["groups"]} >= {"limaml-freshness"}
    assert {target["labels"]["job"] for target in asked("targets")["activeTargets"]} == {"limaml-service", "limaml-verbs"}
    assert httpx.get(f"{api.removesuffix('/api/v1')}/classic/alerts", trust_env=False).status_code == httpx.codes.OK


def test_a_taken_port_is_named(cfg: Config, tmp_path: Path) -> None:
    running = stack.new_stack(cfg, tmp_path / "config.json")
    watch.start(running, cfg)
    wait_for(lambda: not stack._is_free(cfg.local.prometheus_port), "Prometheus' port", 60.0)
    with pytest.raises(Exception, match=r"for Prometheus\) is taken by .*local.prometheus_port=PORT"):
        stack.new_stack(cfg, tmp_path / "config.json")
