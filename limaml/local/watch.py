"""The dashboards of `make run`, without Grafana: this machine's Prometheus, and a page that draws every panel from its answers.

The page is drawn by `helm.dashboards.draw` and served by Prometheus itself, as one of its console templates.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from limaml.config import Config
from limaml.local.stack import HOST, Stack

PROGRAMS = ("prometheus", "prometheus-node-exporter")
INSTALL = "apt-get install prometheus prometheus-node-exporter"
RULES = Path("helm/limaml/files/rules/limaml.yaml")
SCRAPE_S = 5
_RATES = "1m"


def missing() -> list[str]:
    """Programs that the dashboards want and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def start(stack: Stack, cfg: Config) -> str:
    """Start exporter, Prometheus and the page's painter (none is waited for); returns the page's URL."""
    folder = stack.root / "prometheus"
    consoles = folder / "consoles"
    consoles.mkdir(parents=True, exist_ok=True)
    exporter = f"{HOST}:{cfg.local.exporter_port}"
    address = f"{HOST}:{cfg.local.prometheus_port}"
    # JSON is YAML, and needs no library to be written.
    (folder / "prometheus.yml").write_text(json.dumps(_settings(stack, exporter), indent=1))
    textfiles = Path(cfg.monitoring.textfile_dir).absolute()
    textfiles.mkdir(parents=True, exist_ok=True)
    stack.start(
        "node-exporter",
        [
            _program("prometheus-node-exporter"),
            f"--web.listen-address={exporter}",
            "--collector.disable-defaults",
            "--collector.textfile",
            f"--collector.textfile.directory={textfiles}",
        ],
    )
    stack.start(
        "prometheus",
        [
            _program("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            f"--web.console.templates={consoles}",
        ],
    )
    painter = [sys.executable, "-m", "helm.dashboards.draw", f"http://{address}", str(consoles), "--page", "--window", _RATES]
    stack.start("dashboards", painter)
    return f"http://{address}/consoles/index.html"


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, name
    return found


def _settings(stack: Stack, exporter: str) -> dict[str, Any]:
    service = stack.urls["service"].removeprefix("http://")
    jobs = {"limaml-service": service, "limaml-verbs": exporter}
    return {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(RULES.absolute())],
        "scrape_configs": [{"job_name": name, "static_configs": [{"targets": [where]}]} for name, where in jobs.items()],
    }
