"""The rules of a rendered PrometheusRule, and KEDA's query, read and reckoned by Prometheus' own checker."""

import shutil
import subprocess

import pytest
import yaml

from tests.deploy.charts import find, rendered

pytestmark = pytest.mark.services


def promtool(verb, content, folder):
    program = shutil.which("promtool")
    assert program, "promtool must be installed for this test: apt-get install prometheus"
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(content))
    return subprocess.run([program, verb, "rules", path], capture_output=True, text=True, timeout=60)


def checked(spec, folder):
    return promtool("check", spec, folder)


def test_prometheus_reads_the_rendered_rules_and_not_broken_ones(tmp_path):
    spec = find(rendered("production"), "PrometheusRule")["spec"]
    rules = sum(len(group["rules"]) for group in spec["groups"])
    done = checked(spec, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rules} rules found" in done.stdout
    spec["groups"][0]["rules"][0]["expr"] = "sum(rate(limaml_rank_requests_total)"
    assert checked(spec, tmp_path).returncode != 0


def test_keda_s_query_is_the_number_of_requests_in_flight(tmp_path):
    """Two pods, 40 requests a second of 50 ms and 10 of 200 ms: 2 + 2 in flight; neither stages nor others count."""
    (trigger,) = find(rendered("keda"), "ScaledObject")["spec"]["triggers"]

    def series(a_second, **labels):
        labels = {"stage": "total", "namespace": "ranking", "service": "limaml"} | labels
        text = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return {"series": f"limaml_rank_seconds_sum{{{text}}}", "values": f"0+{15 * a_second}x20"}

    given = [
        series(40 * 0.05, pod="a"),
        series(10 * 0.2, pod="b"),
        series(1, pod="a", stage="score"),
        series(7, pod="c", service="another"),
        series(7, pod="d", namespace="staging"),
    ]
    expected = {"expr": trigger["metadata"]["query"], "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": 4}]}
    test = {"interval": "15s", "input_series": given, "promql_expr_test": [expected]}
    done = promtool("test", {"rule_files": [], "tests": [test]}, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    expected["exp_samples"][0]["value"] = 5
    assert promtool("test", {"rule_files": [], "tests": [test]}, tmp_path).returncode != 0
