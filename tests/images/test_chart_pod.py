"""The serving Deployment as the chart renders it, really run as a pod with podman: ready, ranks, and drains when told to end.

The world lies on a volume at the path it has here, so that registry and stores find their files. Taken out is what podman has
no kubelet for: probes (asked here), ports (the network is the machine's), spreading over nodes.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy.charts import ROOT, find, render
from tests.polling import wait_for
from tests.serving.conftest import World

pytestmark = pytest.mark.images

IMAGE = os.environ.get("IMAGE_PREFIX", "localhost/limaml") + "-serve"
# Of this run alone: what a run that was killed left is in nobody's way.
RELEASE = f"limaml-{os.getpid()}"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TOKEN = "a-token-of-this-test"
# Torch, Feast and MLflow are imported from an image that nobody has read yet, with one thread.
START_DEADLINE_S = 180.0
VECTOR = [0.5, -0.5, 0.25, 1.0]
BODY = {"user_id": "much", "item_ids": ["i1", "i3", "i5"], "context": {"hour": 12}}
CLIENTS, PAUSE_S = 4, 0.02


def podman(*arguments, check=True, **more):
    assert shutil.which("podman"), "podman must be installed for this test: apt-get install podman"
    done = subprocess.run(["podman", *map(str, arguments)], capture_output=True, text=True, timeout=300, **more)
    assert not check or done.returncode == 0, f"podman {arguments}: {done.stdout}\n{done.stderr}"
    return done


def toml(value):
    """A value as TOML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def configuration(cfg, port):
    """The world's configuration as the chart is given it."""
    given = cfg.model_dump(mode="json", exclude_defaults=True)
    given["serving"] |= {"host": "0.0.0.0", "port": port, "workers": 1, "token_file": "/run/secrets/limaml/token"}
    given["source"] = {"kind": "synthetic"}
    return "\n".join(f"{name} = {toml(section)}" for name, section in given.items()) + "\n"


def for_podman(objects, folder):
    """What of the release a pod needs, without what only a kubelet does; and the Secret, which is somebody else's."""
    deployment = find(objects, "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    for key in ("startupProbe", "readinessProbe", "livenessProbe", "ports"):
        del container[key]
    del spec["topologySpreadConstraints"]
    for volume in spec["volumes"]:
        if "secret" in volume:  # podman 4.3 reads it without looking whether it is set, and ends
            volume["secret"]["optional"] = False
    token = base64.b64encode(TOKEN.encode()).decode()
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": RELEASE}, "data": {"token": token}}
    path = folder / "pod.yaml"
    path.write_text(yaml.safe_dump_all([secret, find(objects, "ConfigMap", RELEASE), deployment]))
    return path, spec["terminationGracePeriodSeconds"]


@pytest.fixture(scope="module")
def world():
    """Users with embeddings of one version, which is the champion. Not in /tmp, which in a pod is the pod's own."""
    folder = Path(tempfile.mkdtemp(prefix="limaml-pod-", dir="/var/tmp"))
    made = World(folder)
    assert made.registry.champion() is None
    made.build()
    now = datetime.now(UTC).replace(microsecond=0)
    made.version = made.register(seed=1, slot="blue", complete_through=now)
    made.publish("blue", made.version, {"much": VECTOR}, as_of=now - timedelta(hours=1))
    made.registry.set_champion(made.version)
    for path in (folder, *folder.rglob("*")):  # fsGroup gives a pod its volumes in a cluster; podman leaves them as they are
        path.chmod(0o777 if path.is_dir() else 0o666)
    yield made
    shutil.rmtree(folder, ignore_errors=True)


class Pod:
    """The release, played by podman on the machine's network."""

    def __init__(self, world, port):
        self.port = port
        values = {
            "allowLocalStores": True,
            "config": configuration(world.cfg, port),
            "images": {"serve": {"repository": IMAGE}},
            "secrets": {"env": None, "token": {"name": RELEASE}},
            "serving": {
                "replicas": 1,
                "extraVolumes": [{"name": "world", "hostPath": {"path": str(world.folder), "type": "Directory"}}],
                "extraVolumeMounts": [{"name": "world", "mountPath": str(world.folder)}],
            },
        }
        path = world.folder / "values.json"
        path.write_text(json.dumps(values))
        self.release = render("--values", path, "--set-json", f"test.body={json.dumps(BODY)}", name=RELEASE)
        self.path, self.grace_s = for_podman(self.release, world.folder)
        podman("play", "kube", "--network", "host", self.path)
        names = podman("ps", "--all", "--format", "{{.Names}}").stdout.split()
        (self.name,) = (name for name in names if name.startswith(f"{RELEASE}-pod-") and name.endswith("-serve"))

    def get(self, path):
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False, timeout=10)

    def rank(self, token=None):
        headers = {"authorization": f"Bearer {token or self.token}"}
        return httpx.post(f"http://127.0.0.1:{self.port}/rank", json=BODY, headers=headers, trust_env=False, timeout=20)

    def wait_until_ready(self):
        def ready():
            state = self.state()
            assert state["Running"], f"the pod ended with {state['ExitCode']}:\n{self.log()}"
            try:
                return self.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_for(ready, "/readyz 200", START_DEADLINE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def read_token(self):
        """What lies where the configuration says; podman 4.3 mounts a Secret without decoding it."""
        found = podman("exec", self.name, "cat", "/run/secrets/limaml/token").stdout
        assert found in (TOKEN, base64.b64encode(TOKEN.encode()).decode())
        return found

    def state(self):
        return json.loads(podman("inspect", self.name).stdout)[0]["State"]

    def log(self):
        done = podman("logs", "--tail", 60, self.name, check=False)
        return done.stdout + done.stderr

    def remove(self):
        podman("play", "kube", "--down", self.path, check=False)
        podman("secret", "rm", RELEASE, check=False)
        podman("volume", "rm", RELEASE, check=False)  # into which podman 4.3 copies a Secret


@pytest.fixture(scope="module")
def pod(world, free_ports):
    assert podman("image", "exists", f"{IMAGE}:{VERSION}", check=False).returncode == 0, (
        f"{IMAGE}:{VERSION} must be built for this test; run make images, or name yours with IMAGE_PREFIX"
    )
    (port,) = free_ports(1)
    pod = Pod(world, port)
    try:
        pod.wait_until_ready()
        pod.token = pod.read_token()
        yield pod
    finally:
        pod.remove()


class Clients:
    """Ask as fast as they may, on a new connection each time, until none is taken any more."""

    def __init__(self, pod):
        self.pod = pod
        self.seen, self.wrong = [], []
        self.threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _ask(self):
        while True:
            try:
                self.seen.append(self.pod.rank().status_code)
            except httpx.ConnectError:
                return
            except httpx.TransportError as error:
                self.wrong.append(repr(error))
                return
            time.sleep(PAUSE_S)

    def join(self):
        for thread in self.threads:
            thread.join(60)


def test_the_rendered_pod_ranks_what_is_computed_here(pod, world):
    assert pod.get("/livez").status_code == 200
    assert pod.rank(token="another").status_code == 401
    answer = pod.rank()
    assert answer.status_code == 200, answer.text
    ranked = answer.json()
    assert ranked["model_version"] == world.version
    assert ranked["embeddings"]["user"]["fallback"] is None
    expected = world.expected(world.version, "much", BODY["item_ids"], VECTOR)
    assert {item["item_id"]: item["score"] for item in ranked["items"]} == pytest.approx(expected, abs=1e-5)  # contract 7
    assert 'limaml_model_info{slot="blue",version="1"} 1.0' in pod.get("/metrics").text


def test_it_runs_as_the_chart_says(pod):
    """Asked of the container, not of the manifest: a read-only root, a numeric user, no capability."""
    found = json.loads(podman("inspect", pod.name).stdout)[0]
    assert found["HostConfig"]["ReadonlyRootfs"] is True
    assert found["Config"]["User"].partition(":")[0] == "10001"
    status = podman("exec", pod.name, "cat", "/proc/1/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    assert podman("exec", pod.name, "touch", "/opt/limaml/written", check=False).returncode != 0


def test_the_chart_s_own_test_passes_and_says_why_it_does_not(pod):
    """What `helm test` starts, in the image it starts it in."""
    (container,) = find(pod.release, "Pod")["spec"]["containers"]
    body = next(one["value"] for one in container["env"] if one["name"] == "BODY")

    def ranked(token):
        given = {"URL": f"http://127.0.0.1:{pod.port}/rank", "BODY": body, "TOKEN": token}
        options = [f"--env={name}={value}" for name, value in given.items()]
        return podman("exec", *options, pod.name, *container["command"], check=False)

    done = ranked(pod.token)
    assert done.returncode == 0, done.stderr
    assert {item["item_id"] for item in json.loads(done.stdout)["items"]} == set(BODY["item_ids"])
    refused = ranked("another")
    assert refused.returncode == 1
    assert "answered 401" in refused.stderr


def test_told_to_end_it_answers_what_it_took_and_ends_in_time(pod):
    """Last, since it ends the pod."""
    clients = Clients(pod)
    wait_for(lambda: len(clients.seen) > 100, "requests under way")
    started = time.monotonic()
    podman("stop", "--time", pod.grace_s, pod.name)
    took_s = time.monotonic() - started
    clients.join()
    assert not clients.wrong
    assert set(clients.seen) == {200}
    assert pod.state()["ExitCode"] == 0, pod.log()
    assert took_s < pod.grace_s / 2
    print(f"ended in {took_s:.1f} s, {len(clients.seen)} requests answered")
