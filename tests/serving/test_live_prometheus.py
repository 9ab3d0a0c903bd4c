"""The dashboards and the alert rules against a live Prometheus that scrapes the real service, through good and bad states.

The service reads its embeddings from a Redis of its own; a node exporter shows the text files of the batch verbs. One
Prometheus takes everything in, with the rules' windows made short (`quick`). In every state the alert that names it fires, and
no other does.
"""

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path

import httpx
import pytest
import yaml

from limaml import registry, telemetry
from tests.polling import wait_for

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
FILES = ROOT / "helm" / "limaml" / "files"
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
VECTOR = [2.0, -1.0, 0.5, 1.5]
DEADLINE_S = 60.0
# Of the rules' own length are windows of minutes here of seconds.
WINDOW_S = 10
EVALUATIONS = 8
REQUESTS_PER_S = 25.0
# One person in ten has no embedding.
PEOPLE = ["much", "old", "old", "much", "old", "nobody", "much", "old", "much", "old"]
ALIKE = {"salt": "live", "arms": [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.5}]}
"""An A/A test, so that panels by arm have something to show."""
WATCHDOG = {"name": "watchdog", "rules": [{"alert": "Watchdog", "expr": "vector(1)"}]}


def quick(rules):
    """The rule file with windows of 10 s (the week: 10 minutes) and alerts that wait for 4 s.

    Instants and shares stay as they are. The bound on latency is raised to 2 s: a machine that runs other tests beside this one
    is slow, and that is not what is looked at here. `Watchdog` always fires and so counts the evaluations.
    """
    rules = yaml.safe_load(rules)
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[\d+m\]", f"[{WINDOW_S}s]", rule["expr"]).replace("[1w]", "[10m]")
            rule["for"] = "4s"
            if rule["alert"] == "LimamlLatencyHigh":
                rule["expr"] = rule["expr"].replace("> 0.1", "> 2")
    rules["groups"].append(WATCHDOG)
    return yaml.safe_dump(rules)


def panels():
    for path in sorted((FILES / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield pytest.param(target, id=f"{path.stem}-{panel['title']}-{target['refId']}".replace(" ", "_"))


def start_program(name, package, arguments, log):
    program = shutil.which(name)
    if program is None:
        pytest.fail(f"{name} must be installed for this test: apt-get install {package}")
    with log.open("ab") as output:
        return subprocess.Popen([program, *arguments], stdout=output, stderr=output)


class Redis:
    """A Redis server of this test's own, because it is killed."""

    def __init__(self, port, folder):
        self.port, self.folder = port, folder
        self.process = None

    def start(self):
        options = [
            "--bind",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(self.folder),
        ]
        self.process = start_program("redis-server", "redis-server", options, self.folder / "redis.log")
        wait_for(self._answers, "redis-server's PONG")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def _answers(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
        except OSError:
            return False


class Prometheus:
    """A server that scrapes the given ports once a second and evaluates the quick rules as often."""

    def __init__(self, port, folder, scraped):
        rules, config = folder / "rules.yaml", folder / "prometheus.yaml"
        rules.write_text(quick((FILES / "rules" / "limaml.yaml").read_text()))
        jobs = [{"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{at}"]}]} for name, at in scraped.items()]
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config.write_text(yaml.safe_dump({"global": every, "rule_files": [str(rules)], "scrape_configs": jobs}))
        options = [
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "prometheus.log"
        self.process = start_program("prometheus", "prometheus", options, self.log)
        self.client = httpx.Client(base_url=self.url, timeout=10.0, trust_env=False)

    def ready(self):
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return self.client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expr):
        """Series of an instant query: (labels, value)."""
        answer = self.client.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", answer
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def firing(self):
        alerts = self.client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"} - {"Watchdog"}

    def fired_for(self, alert, seconds):
        """In how many evaluations of the last seconds it fired."""
        found = self.query(f'max(count_over_time(ALERTS{{alertname="{alert}",alertstate="firing"}}[{seconds}s]))')
        return found[0][1] if found else 0


class Traffic:
    """Ranking requests at a steady rate until it is stopped; `failed` holds every answer that is not 200."""

    def __init__(self, port):
        self.failed = []
        self._stopping = threading.Event()
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0, trust_env=False)
        self._thread = threading.Thread(target=self._drive, daemon=True)
        self._thread.start()

    def _drive(self):
        for person in cycle(PEOPLE):
            if self._stopping.wait(1 / REQUESTS_PER_S):
                return
            body = {"user_id": person, "item_ids": ["i1", "i2", "i3"], "context": {"hour": 12}}
            response = self._client.post("/rank", json=body)
            if response.status_code != 200:
                self.failed.append(response.text)

    def stop(self):
        self._stopping.set()
        self._thread.join()
        self._client.close()


class Live:
    """The service, its stores and who watches it; methods bring it from one state to another."""

    def __init__(self, world, cfg, redis, server, prometheus):
        self.world, self.cfg, self.redis, self.server, self.prometheus = world, cfg, redis, server, prometheus
        self.version = world.register(seed=1, slot="blue", complete_through=NOW - DAY)
        self.writes, self.started_s = 0, time.time()
        self.publish(self.version)
        world.registry.set_champion(self.version)
        server.wait_until("/readyz", 200)

    def publish(self, version):
        """Everybody's rows, each time a little newer: Redis keeps a row that is not older."""
        self.writes += 1
        as_of = NOW - 60 * DAY + timedelta(hours=self.writes)
        self.world.publish("blue", version, {"much": VECTOR, "old": VECTOR}, as_of=as_of)

    def complete_through(self, instant):
        self.world.registry.set_tags(self.version, {registry.COMPLETE_THROUGH: instant.isoformat()})

    def restart_redis(self):
        self.redis.start()
        self.world.publish_features()
        self.publish(self.version)

    def settle(self):
        """Wait until, some evaluations later, no alert fires or is about to: at the very start nothing was evaluated yet."""
        started = time.monotonic()

        def silent():
            evaluated = self.prometheus.fired_for("Watchdog", math.ceil(time.monotonic() - started))
            return evaluated >= EVALUATIONS and not self.prometheus.query('ALERTS{alertname!="Watchdog"}')

        wait_for(silent, f"silence (firing: {self.prometheus.firing()})", DEADLINE_S)

    def check_alone(self, alert):
        """Wait for `alert` (None: for nothing) to fire, and see that for some evaluations on nothing else does."""
        started = time.monotonic()
        if alert:
            wait_for(lambda: alert in self.prometheus.firing(), f"{alert} (fires: {self.prometheus.firing()})", DEADLINE_S)

        def long_enough():
            seconds = math.ceil(time.monotonic() - started)
            others = self.prometheus.firing() - {alert}
            assert not others, f"beside {alert} fires {others}"
            return self.prometheus.fired_for(alert or "Watchdog", seconds) >= EVALUATIONS

        wait_for(long_enough, f"{EVALUATIONS} evaluations with {alert}", DEADLINE_S)
        seconds = math.ceil(time.monotonic() - started)
        seen = self.prometheus.query(f'count by (alertname) (count_over_time(ALERTS{{alertstate="firing"}}[{seconds}s]))')
        assert {labels["alertname"] for labels, _ in seen} - {"Watchdog"} == ({alert} if alert else set())


def export_batch_metrics(cfg, published_ago_s=0.0, mismatch=0.0, score_psi=0.03, energy=0.02):
    """What verbs that ended well just now leave for the node exporter."""
    from limaml.monitoring.export import Gauges, export

    now_s = time.time()
    publish, consistency, drift = Gauges(), Gauges(), Gauges()
    publish.set(telemetry.LAST_PUBLISHED_SECONDS, now_s - published_ago_s, kind="user")
    for state, count in zip(telemetry.ENTITY_STATES, (40, 120, 300, 480), strict=True):
        publish.set(telemetry.PUBLISHED_ENTITIES, count, kind="user", state=state)
    for name in (telemetry.MISMATCH_RATIO, telemetry.MISSING_RATIO, telemetry.MAX_DIFFERENCE):
        for view in ("user_features", "item_features", "user_embedding"):
            consistency.set(name, mismatch if name == telemetry.MISMATCH_RATIO else 0.0, view=view)
    consistency.set(telemetry.CONSISTENCY_REQUESTS, 250)
    for feature, psi in (("user_events", 0.04), ("item_positive_rate", 0.02)):
        drift.set(telemetry.FEATURE_DRIFT_PSI, psi, feature=feature)
    drift.set(telemetry.SCORE_DRIFT_PSI, score_psi)
    drift.set(telemetry.VECTOR_DRIFT, energy, feature="text")
    for verb, seconds, gauges in (("publish", 12.0, publish), ("consistency", 4.0, consistency), ("drift", 6.0, drift)):
        export(cfg.monitoring, verb, "ok", seconds, now_s, gauges)


@pytest.fixture(scope="module")
def live(tmp_path_factory, make_world, start_server, free_ports):
    folder = tmp_path_factory.mktemp("live")
    redis_port, exporter_port, prometheus_port = free_ports(3)
    redis = Redis(redis_port, folder)
    redis.start()
    programs, traffic, prometheus = [], None, None
    try:
        world = make_world(folder, redis=f"127.0.0.1:{redis_port}")
        monitoring = world.cfg.monitoring.model_copy(update={"textfile_dir": str(folder / "textfiles")})
        serving = world.cfg.serving.model_copy(update={"log_share": 1.0, "log_path": str(folder / "requests")})
        experiment = world.cfg.experiment.model_validate(ALIKE)
        cfg = world.cfg.model_copy(update={"monitoring": monitoring, "serving": serving, "experiment": experiment})
        export_batch_metrics(cfg)
        assert world.registry.champion() is None  # creates the registry's tables
        server = start_server(cfg, folder)
        options = [
            "--collector.disable-defaults",
            "--collector.textfile",
            f"--collector.textfile.directory={folder / 'textfiles'}",
            f"--web.listen-address=127.0.0.1:{exporter_port}",
        ]
        exporter = start_program("prometheus-node-exporter", "prometheus-node-exporter", options, folder / "exporter.log")
        programs.append(exporter)
        world.build()
        server.wait_until("/livez", 200)
        prometheus = Prometheus(prometheus_port, folder, {"limaml": server.port, "batch": exporter_port})
        programs.append(prometheus.process)
        wait_for(prometheus.ready, "Prometheus's start")
        live = Live(world, cfg, redis, server, prometheus)
        traffic = Traffic(server.port)
        live.settle()
        yield live
        assert not traffic.failed, f"{len(traffic.failed)} requests failed: {traffic.failed[:3]}"
    finally:
        if traffic:
            traffic.stop()
        if prometheus:
            prometheus.client.close()
        for program in programs:
            program.terminate()
            program.wait(20)
        redis.kill()


def test_while_all_is_well_no_alert_fires(live):
    live.check_alone(None)


@pytest.mark.parametrize("target", list(panels()))
def test_every_panel_has_data_with_the_labels_of_its_legend(live, target):
    expr = target["expr"].replace("$__rate_interval", f"{WINDOW_S}s")
    series = wait_for(
        lambda: [found for found in live.prometheus.query(expr) if math.isfinite(found[1])], f"data of {expr}", 20.0
    )
    for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
        assert all(labels.get(label) for labels, _ in series), f"{label} is missing in {series}"


def test_stale_embeddings_fire_their_alert_alone(live):
    live.complete_through(NOW - 5 * DAY)
    try:
        live.check_alone("LimamlEmbeddingsStale")
        assert live.server.ranked("old")["embeddings"]["user"]["fallback"] == "stale"
    finally:
        live.complete_through(NOW - DAY)
    live.settle()


@pytest.mark.fault("kill -9 of Redis while serving", after="requests are answered, its alert fires alone and ends with it")
def test_a_store_that_is_down_fires_its_alert_alone(live):
    live.redis.kill()
    try:
        live.check_alone("LimamlOnlineStoreDown")
        assert live.server.ranked("old")["embeddings"]["user"]["fallback"] == "store_error"
    finally:
        live.restart_redis()
    live.settle()


def test_rows_of_another_version_fire_their_alert_alone(live):
    live.publish("999")
    try:
        live.check_alone("LimamlVersionMismatch")
        assert live.server.ranked("old")["embeddings"]["user"]["fallback"] == "version_mismatch"
    finally:
        live.publish(live.version)
    live.settle()


def test_a_champion_that_cannot_be_loaded_fires_its_alert_alone(live):
    broken = live.world.register(seed=2, slot="purple", complete_through=NOW - DAY)
    live.world.registry.set_champion(broken)
    try:
        live.check_alone("LimamlChampionLoadFailed")
        assert live.server.ranked("old")["model_version"] == live.version
    finally:
        live.world.registry.set_champion(live.version)
    live.settle()


@pytest.mark.parametrize(
    ("alert", "exported"),
    [
        ("LimamlPublishingStopped", {"published_ago_s": 27 * 3600.0}),
        ("LimamlOfflineOnlineMismatch", {"mismatch": 0.01}),
        ("LimamlScoreDrift", {"score_psi": 0.4}),
        ("LimamlVectorDrift", {"energy": 0.3}),
    ],
)
def test_what_a_batch_verb_found_fires_its_alert_alone(live, alert, exported):
    export_batch_metrics(live.cfg, **exported)
    try:
        live.check_alone(alert)
    finally:
        export_batch_metrics(live.cfg)
    live.settle()


def test_every_state_is_over_when_its_cause_is(live):
    live.check_alone(None)


def test_the_dashboards_can_be_drawn_from_what_was_seen(live, tmp_path):
    minutes = (time.time() - live.started_s) / 60
    options = [live.prometheus.url, str(tmp_path), "--minutes", str(minutes), "--window", f"{WINDOW_S}s"]
    subprocess.run([sys.executable, "-m", "helm.dashboards.draw", *options], cwd=ROOT, check=True)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["freshness", "pipeline", "serving"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
