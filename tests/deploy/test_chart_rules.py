"""The rules of a rendered PrometheusRule, read by Prometheus' own checker."""

import shutil
import subprocess

import pytest
import yaml

from tests.deploy.charts import find, rendered

pytestmark = pytest.mark.services


def checked(spec, folder):
    program = shutil.which("promtool")
    assert program, "promtool must be installed for this test: apt-get install prometheus"
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(spec))
    return subprocess.run([program, "check", "rules", path], capture_output=True, text=True, timeout=60)


def test_prometheus_reads_the_rendered_rules_and_not_broken_ones(tmp_path):
    spec = find(rendered("production"), "PrometheusRule")["spec"]
    rules = sum(len(group["rules"]) for group in spec["groups"])
    done = checked(spec, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rules} rules found" in done.stdout
    spec["groups"][0]["rules"][0]["expr"] = "sum(rate(limaml_rank_requests_total)"
    assert checked(spec, tmp_path).returncode != 0
