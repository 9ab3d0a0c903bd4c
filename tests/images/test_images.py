"""The three images, really run (make test-images): read-only, as users that no image knows.

`train` makes a small world by its verbs against MLflow's server, which it is as well, and a cluster of Ray of two containers;
`serve` then answers a request from it; `airflow` lists the DAGs. The limits of their sizes stand in docker/README.md.
"""

import json
import os
import random
import re
import shutil
import subprocess
import time
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from limaml import config
from limaml.events.sources import week_shift
from limaml.events.synthetic import SyntheticSource
from limaml.io.ray_compat import start_limits
from tests.polling import wait_for

pytestmark = pytest.mark.images

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PREFIX = os.environ.get("IMAGE_PREFIX", "localhost/limaml")
IMAGES = ("airflow", "train", "serve")
SYNTHETIC = config.load(ROOT / "configs" / "synthetic.toml")
# The generated world ends in the days before today (contract 9); two of its days are kept for daily runs.
_LAST = SyntheticSource(SYNTHETIC.source).days()[-1]
_LAST += week_shift(_LAST, datetime.now(UTC).date())
THROUGH, DAY_AFTER = (str(_LAST - timedelta(days=n)) for n in (2, 1))
# A start compiles nothing and imports for ten seconds; on a loaded machine several times that.
START_DEADLINE_S = 180
TOKEN = "a-token-of-this-test"
# Nobody: neither in the image's passwd, nor in its group 0.
STRANGER = str(random.SystemRandom().randrange(20_000, 60_000))


def engine():
    for program in ("podman", "docker"):
        if shutil.which(program):
            return program
    pytest.fail("podman or docker must be installed for this test: apt-get install podman")


def call(*arguments, check=True):
    done = subprocess.run([engine(), *arguments], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def tag(image):
    name = f"{PREFIX}-{image}:{VERSION}"
    if call("image", "inspect", name, check=False).returncode != 0:
        pytest.fail(f"{name} must be built for this test, it is not: make images BASE=…")
    return name


def hardened(user):
    return ["--read-only", "--tmpfs=/tmp", f"--user={user}", "--cap-drop=ALL", "--security-opt=no-new-privileges",
            "--network=host"]  # fmt: skip


class Containers:
    """Started in the background, stopped at the end; with their logs where one fails."""

    def __init__(self):
        self.names = []

    def start(self, image, *command, user="10001:0", options=()):
        name = f"limaml-test-{os.getpid()}-{len(self.names)}"
        call("run", "--detach", f"--name={name}", *hardened(user), *options, tag(image), *command)
        self.names.append(name)
        return name

    def wait(self, name, condition, what):
        def ready():
            running = call("ps", "--quiet", f"--filter=name=^{name}$").stdout.strip()
            assert running, f"{name} has ended before {what}:\n{self.log(name)}"
            return condition()

        try:
            return wait_for(ready, what, START_DEADLINE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(name)}") from None

    def log(self, name):
        done = call("logs", name, check=False)
        return (done.stdout + done.stderr)[-4000:]

    def stop(self):
        for name in reversed(self.names):
            call("stop", "--time=20", name, check=False)
            call("rm", "--force", name, check=False)


@pytest.fixture(scope="module")
def containers():
    started = Containers()
    yield started
    started.stop()


def answers(url):
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


class World:
    """The configuration of a small world in a folder that every container sees, and the verbs on it."""

    def __init__(self, folder, redis, mlflow_port, service_port):
        self.folder = folder
        mlflow = f"http://127.0.0.1:{mlflow_port}"
        settings = {
            "storage.root": f"{folder}/data",
            "registry.tracking_uri": mlflow,
            "registry.artifact_root": f"{folder}/artifacts",
            "feast.repo_path": "/opt/limaml/feature_repo",
            "feast.registry": f"{folder}/registry.db",
            "feast.online_store": "redis",
            "feast.online_connection": redis,
            "embeddings.lease_url": f"sqlite:///{folder}/lease.db",
            "training.storage_path": f"{folder}/ray",
            "serving.token_file": f"{folder}/token",
            "monitoring.textfile_dir": f"{folder}/metrics",
            "local.run_root": f"{folder}/run",
        }
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        cfg = config.load(ROOT / "configs" / "synthetic.toml", [*overrides, f"serving.port={service_port}"])
        (folder / "config.json").write_text(json.dumps(cfg.model_dump(mode="json")))
        (folder / "token").write_text(TOKEN)
        folder.chmod(0o777)
        self.mount = [f"--volume={folder}:{folder}", f"--env=LIMAML_CONFIG={folder}/config.json"]
        self.environment = []
        self.ray_log = lambda: ""

    def verb(self, *arguments):
        """Run one in a container of its own; returns its result."""
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        command = ["python", "-m", "limaml.cli", *arguments, f"--result={result}"]
        options = [*self.mount, *self.environment]
        done = call("run", "--rm", *hardened("10001:0"), *options, tag("train"), *command, check=False)
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stderr[-3000:]}\n{self.ray_log()}"
        return json.loads(result.read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory, containers, redis_server, free_ports):
    """Trained on a cluster of Ray, registered, filled and cut over."""
    mlflow_port, service_port, ray_port, client_port, *agents = free_ports(6)
    folder = tmp_path_factory.mktemp("world")
    for path in (folder, *folder.parents[:3]):  # pytest's folders are their owner's alone
        path.chmod(0o755)
    made = World(folder, redis_server, mlflow_port, service_port)
    mlflow = containers.start(
        "train", "mlflow", "server", "--host=127.0.0.1", f"--port={mlflow_port}", "--workers=1",
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--default-artifact-root={folder}/artifacts", options=made.mount,
    )  # fmt: skip
    token = ["--env=RAY_AUTH_MODE=token", "--env=RAY_AUTH_TOKEN=" + "ab" * 32]
    # The network is the machine's, where another Ray may run: a port is one that is free, and a node has an address of its own.
    shared = ["--block", "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={128 * 2**20}"]
    limits = [f"--env={name}={value}" for name, value in start_limits(START_DEADLINE_S).items()]
    limits += [f"--env=RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S={START_DEADLINE_S}", "--shm-size=256m"]

    def node(number, *own):
        places = [f"--node-ip-address=127.0.0.{number + 2}", f"--dashboard-agent-listen-port={agents[number]}"]
        return containers.start("train", "ray", "start", *own, *places, *shared, options=[*made.mount, *token, *limits])

    ports = [f"--port={ray_port}", f"--ray-client-server-port={client_port}"]
    head = node(0, "--head", *ports, "--num-cpus=0", "--include-dashboard=false")
    containers.wait(head, lambda: call("exec", head, "ray", "health-check", check=False).returncode == 0, "the head's health")
    worker = node(1, f"--address=127.0.0.2:{ray_port}", "--num-cpus=2")
    containers.wait(mlflow, lambda: answers(f"http://127.0.0.1:{mlflow_port}/health"), "MLflow's health")
    containers.wait(worker, lambda: "Ray runtime started" in containers.log(worker), "the worker's start")
    logs = ["sh", "-c", "tail -n 40 /tmp/ray/session_latest/logs/*client_server*"]
    made.ray_log = lambda: call("exec", head, *logs, check=False).stdout
    made.environment = [*token, f"--env=RAY_ADDRESS=ray://127.0.0.2:{client_port}"]
    made.verb("apply")
    made.verb("ingest", f"--through={THROUGH}")
    candidate = made.verb("train", f"--through={THROUGH}")["candidate"]
    version = made.verb("evaluate", f"--candidate={candidate}")["version"]
    for shard in made.verb("plan-fill", f"--version={version}", f"--through={THROUGH}")["shards"]:
        made.verb("fill", f"--version={version}", f"--shard={shard}")
    made.verb("cut-over", f"--version={version}")
    made.version = version
    return made


def test_serve_scores_a_request_read_only_as_a_stranger(world, containers):
    """Neither the image's user nor in group 0; all that can be written to is an empty /tmp."""
    port = json.loads((world.folder / "config.json").read_text())["serving"]["port"]
    options = [f"--volume={world.folder}:{world.folder}:ro"]
    command = ["--config", f"{world.folder}/config.json"]
    started = time.monotonic()
    name = containers.start("serve", *command, user=f"{STRANGER}:{STRANGER}", options=options)
    containers.wait(name, lambda: answers(f"http://127.0.0.1:{port}/readyz"), "the service's readiness")
    print(f"serve: ready after {time.monotonic() - started:.1f} s")
    body = {"user_id": "u1", "item_ids": ["i1", "i2"], "context": {"hour": 12}}
    url, signed = f"http://127.0.0.1:{port}/rank", {"authorization": f"Bearer {TOKEN}"}
    assert httpx.post(url, json=body, trust_env=False).status_code == 401
    answer = httpx.post(url, json=body, headers=signed, trust_env=False, timeout=10)
    assert answer.status_code == 200, answer.text
    ranked = answer.json()
    assert ranked["model_version"] == world.version
    assert sorted(item["item_id"] for item in ranked["items"]) == ["i1", "i2"]
    assert all(0 < item["score"] < 1 for item in ranked["items"])
    started = time.monotonic()
    call("stop", "--time=60", name)
    assert time.monotonic() - started < 30, "it ends when it is told to"


@pytest.fixture
def environment_of_train():
    """The volume that compose.yaml names so: the environment of `train`, copied when it is first used."""
    name = f"limaml-test-{os.getpid()}-environment"
    volume = f"--volume={name}:/opt/limaml"
    call("run", "--rm", volume, tag("train"), "python", "-c", "import limaml")
    yield f"{volume}:ro"
    call("volume", "rm", name)


def test_a_dag_of_airflow_runs_its_verbs_in_the_environment_of_train(world, environment_of_train):
    """As compose.yaml has the scheduler do it: the daily DAG, read-only, one day after the one that is cut over."""
    day = json.dumps({"day": DAY_AFTER})
    script = f"airflow db migrate >&2 && airflow dags reserialize >&2 && airflow dags test limaml_daily --conf='{day}'"
    options = [
        "--tmpfs=/var/lib/airflow:mode=1777",
        environment_of_train,
        *world.mount,
        *world.environment,
        "--env=AIRFLOW__LIMAML__PYTHON=/opt/limaml/bin/python",
    ]
    # A run that failed ends with another exit code than 0.
    call("run", "--rm", *hardened("10001:0"), *options, tag("airflow"), "sh", "-c", script)
    published = (world.folder / "metrics" / "limaml_publish.prom").read_text()
    assert 'limaml_last_published_timestamp_seconds{kind="user"}' in published


def test_a_verb_says_in_its_exit_code_what_is_wrong():
    done = call(
        "run", "--rm", *hardened(f"{STRANGER}:0"), tag("train"), "limaml", "check", "--config=/nowhere.toml", check=False
    )
    assert done.returncode == 2
    assert "configuration /nowhere.toml does not exist" in done.stderr


def test_train_has_its_configurations():
    code = "import os; print(*os.listdir('/opt/limaml/configs'))"
    found = call("run", "--rm", *hardened(STRANGER), tag("train"), "python", "-c", code).stdout.split()
    assert {"synthetic.toml", "production.toml"} <= set(found)


def test_train_opens_every_kind_of_table():
    """Their packages are loaded by name and bring libraries of their own: each gets as far as finding no table there."""
    code = """
from limaml.errors import LimamlError
from limaml.events.table_scans import find
for location in ("postgresql://nobody@127.0.0.1:1/shop?table=events", "delta:/tmp/none", "iceberg:/tmp/none"):
    try:
        find("source.events", location)
    except LimamlError as error:
        print(error)
"""
    said = call("run", "--rm", *hardened(STRANGER), tag("train"), "python", "-c", code).stdout.splitlines()
    for line, reached in zip(said, ("Failed to connect", "does not exist", "version-hint.text"), strict=True):
        assert reached in line


def test_airflow_lists_the_dags_without_an_import_error():
    steps = "db migrate >&2", "dags reserialize >&2", "dags list-import-errors -o json", "dags list -o json"
    script = " && ".join(f"airflow {step}" for step in steps)
    options = ["--tmpfs=/var/lib/airflow:mode=1777"]
    done = call("run", "--rm", *hardened(f"{STRANGER}:0"), *options, tag("airflow"), "sh", "-c", script)
    errors, dags = [json.loads(found) for found in re.findall(r"^\[.*?\]$|^No data found$", done.stdout, re.M | re.S)] or [
        None,
        None,
    ]
    assert errors == [], done.stdout
    assert {"limaml_train", "limaml_daily"} <= {dag["dag_id"] for dag in dags}


@pytest.mark.parametrize(
    ("image", "absent"), [("airflow", "torch ray feast bentoml limaml numpy"), ("serve", "ray airflow pip")]
)
def test_an_image_lacks_what_it_is_not_for(image, absent):
    code = "import importlib.util as u, sys; print(' '.join(name for name in sys.argv[1:] if u.find_spec(name)))"
    done = call("run", "--rm", *hardened(STRANGER), "--entrypoint=python", tag(image), "-c", code, *absent.split())
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_no_compiler_and_no_cache(image):
    programs = "for p in gcc cc c++ pip pip3; do command -v $p; done"
    script = f"{programs}; find / -xdev '(' -name .cache -o -name '*.whl' ')' -not -path '/proc/*' 2>/dev/null"
    done = call("run", "--rm", *hardened("0"), "--entrypoint=sh", tag(image), "-c", script, check=False)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_says_what_it_is(image):
    (found,) = json.loads(call("image", "inspect", tag(image)).stdout)
    labels = found.get("Labels") or found["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == VERSION
    assert re.fullmatch(r"[0-9a-f]{40}", labels["org.opencontainers.image.revision"])
    assert (
        labels["org.opencontainers.image.base.name"].startswith("localhost/")
        or "@sha256:" in labels["org.opencontainers.image.base.name"]
    )
    assert re.fullmatch(r"\d+:\d+", found["Config"]["User"])
    assert (found.get("Healthcheck") or found["Config"]["Healthcheck"])["Test"]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_lists_what_is_in_it(image):
    """Its CycloneDX list has what its requirements say, in those versions."""
    script = ["--entrypoint=cat", tag(image), "/usr/share/sbom/limaml.cdx.json"]
    listed = json.loads(call("run", "--rm", *hardened(STRANGER), *script).stdout)
    assert listed["bomFormat"] == "CycloneDX"
    have = {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in listed["components"]}
    lines = (ROOT / "docker" / image / "requirements.txt").read_text().splitlines()
    wanted = dict(line.split("==") for line in lines if "==" in line)
    assert not {
        name: version
        for name, version in wanted.items()
        if have.get(re.sub(r"[-_.]+", "-", name).lower(), "").partition("+")[0] != version
    }


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_no_larger_than_its_limit(image):
    (found,) = json.loads(call("image", "inspect", tag(image)).stdout)
    mib = found["Size"] / 2**20
    table = (ROOT / "docker" / "README.md").read_text()
    (limit,) = re.findall(rf"^\| {image} \|.*\| ([\d,]+) \|$", table, re.MULTILINE)
    print(f"{image}: {mib:,.0f} MiB of {limit}")
    assert mib <= int(limit.replace(",", ""))
