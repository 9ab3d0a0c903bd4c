"""What a verb leaves for Prometheus: the text file, what it keeps of earlier runs, and a gateway that is pushed to."""

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from limaml import cli, telemetry
from limaml.config import MonitoringConfig
from limaml.errors import GateError, NothingToDo
from limaml.monitoring.export import GAUGES, Gauges, export

ROOT = Path(__file__).parents[3]


def samples(text):
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def sample(name, **labels):
    return name, tuple(sorted(labels.items()))


def drifted(**features):
    gauges = Gauges()
    for feature, value in features.items():
        gauges.set(telemetry.FEATURE_DRIFT_PSI, value, feature=feature)
    return gauges


@pytest.fixture
def cfg(tmp_path):
    return MonitoringConfig(textfile_dir=str(tmp_path / "metrics"))


def written(cfg, verb="drift"):
    return samples((Path(cfg.textfile_dir) / f"limaml_{verb}.prom").read_text())


def test_a_verb_leaves_one_file_with_its_gauges_and_its_end(cfg):
    export(cfg, "drift", "ok", 1.5, 1000.0, drifted(year=0.25))
    assert written(cfg) == {
        sample(telemetry.FEATURE_DRIFT_PSI, feature="year"): 0.25,
        sample(telemetry.VERB_SECONDS, verb="drift"): 1.5,
        sample(telemetry.VERB_FINISHED_SECONDS, verb="drift", status="ok"): 1000.0,
    }
    assert [path.name for path in Path(cfg.textfile_dir).iterdir()] == ["limaml_drift.prom"]


def test_a_good_run_replaces_what_was_there_and_a_failed_one_keeps_it(cfg):
    measured = drifted(year=0.25, hour=0.5)
    measured.set(telemetry.SCORE_DRIFT_PSI, 0.125)
    export(cfg, "drift", "ok", 1.0, 1000.0, measured)
    export(cfg, "drift", "failed", 2.0, 2000.0, Gauges())
    kept = written(cfg)
    assert kept[sample(telemetry.FEATURE_DRIFT_PSI, feature="hour")] == 0.5
    assert kept[sample(telemetry.SCORE_DRIFT_PSI)] == 0.125
    assert kept[sample(telemetry.VERB_SECONDS, verb="drift")] == 2.0
    assert kept[sample(telemetry.VERB_FINISHED_SECONDS, verb="drift", status="ok")] == 1000.0
    assert kept[sample(telemetry.VERB_FINISHED_SECONDS, verb="drift", status="failed")] == 2000.0
    export(cfg, "drift", "ok", 1.0, 3000.0, drifted(year=0.75))
    assert written(cfg) == {
        sample(telemetry.FEATURE_DRIFT_PSI, feature="year"): 0.75,
        sample(telemetry.VERB_SECONDS, verb="drift"): 1.0,
        sample(telemetry.VERB_FINISHED_SECONDS, verb="drift", status="ok"): 3000.0,
        sample(telemetry.VERB_FINISHED_SECONDS, verb="drift", status="failed"): 2000.0,
    }


@pytest.mark.services
def test_promtool_has_nothing_to_say_of_the_file(cfg):
    program = shutil.which("promtool")
    assert program, "promtool is needed: apt-get install prometheus"
    gauges = Gauges()
    for name, (labels, _) in GAUGES.items():
        gauges.set(name, 0.25, **dict.fromkeys(labels, 'a "name"\nof two\\lines'))
    export(cfg, "drift", "ok", 1.5, 1000.0, gauges)
    text = (Path(cfg.textfile_dir) / "limaml_drift.prom").read_text()
    done = subprocess.run([program, "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_not_known_is_left_out_and_labels_are_the_declared_ones(cfg):
    export(cfg, "drift", "ok", 1.0, 1000.0, drifted(year=float("nan")))
    assert sample(telemetry.FEATURE_DRIFT_PSI, feature="year") not in written(cfg)
    with pytest.raises(AssertionError, match="has the labels"):
        Gauges().set(telemetry.FEATURE_DRIFT_PSI, 1.0, user_id="u1")


@pytest.fixture
def gateway():
    """An HTTP server in a Pushgateway's place; yields its address and what it was sent: (method, path, text)."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def take(self):
            sent.append((self.command, self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        do_PUT = do_POST = take

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", sent
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_good_run_replaces_its_group_and_a_failed_one_adds_to_it(gateway):
    address, sent = gateway
    cfg = MonitoringConfig(textfile_dir="", pushgateway=address)
    export(cfg, "drift", "ok", 1.0, 1000.0, drifted(year=0.25))
    export(cfg, "drift", "failed", 1.0, 2000.0, Gauges())
    assert [(method, path) for method, path, _ in sent] == [
        ("PUT", "/metrics/job/limaml/verb/drift"),
        ("PUT", "/metrics/job/limaml/status/ok/verb/drift"),
        ("POST", "/metrics/job/limaml/verb/drift"),
        ("PUT", "/metrics/job/limaml/status/failed/verb/drift"),
    ]
    assert samples(sent[0][2])[sample(telemetry.FEATURE_DRIFT_PSI, feature="year")] == 0.25
    assert samples(sent[1][2]) == {sample(telemetry.VERB_FINISHED_SECONDS, verb="drift", status="ok"): 1000.0}


def run(tmp_path, body, gauges, *overrides, verb="drift"):
    settings = [f"monitoring.textfile_dir={tmp_path}/metrics", *overrides]
    return cli._run(verb, body, ROOT / "configs" / "movielens.toml", settings, tmp_path / "result.json", False, gauges)


def test_a_gateway_that_is_not_there_does_not_fail_the_verb(tmp_path, free_ports, capsys):
    [port] = free_ports(1)
    gauges = drifted(year=0.25)
    assert run(tmp_path, lambda cfg: {}, gauges, f"monitoring.pushgateway=127.0.0.1:{port}") == 0
    assert "metrics_not_exported" in capsys.readouterr().err
    assert (tmp_path / "metrics" / "limaml_drift.prom").exists()


def test_a_folder_that_cannot_be_written_does_not_fail_the_verb(tmp_path, capsys):
    (tmp_path / "metrics").write_text("a file")
    assert run(tmp_path, lambda cfg: {}, Gauges()) == 0
    assert "metrics_not_exported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "error", "status"),
    [
        ("drift", GateError("too far", ["x"]), "failed"),
        ("drift", RuntimeError("bug"), "failed"),
        ("drift", NothingToDo("done"), "unchanged"),
        ("evaluate", NothingToDo("worse"), "refused"),
    ],
)
def test_every_outcome_is_exported_with_what_the_body_had_set(tmp_path, verb, error, status):
    gauges = Gauges()

    def body(cfg):
        gauges.set(telemetry.SCORE_DRIFT_PSI, 0.5)
        raise error

    assert run(tmp_path, body, gauges, verb=verb) != 0
    shown = written(MonitoringConfig(textfile_dir=str(tmp_path / "metrics")), verb)
    assert shown[sample(telemetry.SCORE_DRIFT_PSI)] == 0.5
    assert sample(telemetry.VERB_FINISHED_SECONDS, verb=verb, status=status) in shown


def test_a_verb_of_one_machine_exports_nothing(tmp_path):
    assert run(tmp_path, lambda cfg: {}, None) == 0
    assert not (tmp_path / "metrics").exists()
