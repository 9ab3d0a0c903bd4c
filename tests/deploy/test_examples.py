"""helm/examples: values that their charts know, and that fit together; the page that installs them names what there is."""

import json
import re

import pytest
import yaml

from limaml.config import load
from tests.deploy.charts import CHART, ROOT, find, render

EXAMPLES = ROOT / "helm" / "examples"
OTHERS = ROOT / "tests" / "deploy" / "others"
PAGE = (EXAMPLES / "README.md").read_text()
NAMES = sorted(path.name.removesuffix("-values.yaml") for path in EXAMPLES.glob("*-values.yaml"))
# Neither its values nor their schema were at hand whole.
NOT_AT_HAND = {"airflow"}


def values_of(name):
    return yaml.safe_load((EXAMPLES / f"{name}-values.yaml").read_text())


def unknown(ours, theirs, above=""):
    """Keys of ours that the chart does not have; where it has nothing, any may be."""
    for key, value in ours.items():
        if key not in theirs:
            yield f"{above}{key}"
        elif isinstance(value, dict) and theirs[key]:
            yield from unknown(value, theirs[key], f"{above}{key}.")


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_AT_HAND - {"limaml"}))
def test_every_value_is_one_that_the_chart_knows(name):
    theirs = json.loads((OTHERS / f"{name}.json").read_text())
    assert not list(unknown(values_of(name), theirs))
    assert list(unknown({"imagez": {}} | values_of(name), theirs)) == ["imagez"]


def objects():
    return render("--namespace", "limaml", "--values", EXAMPLES / "limaml-values.yaml")


def test_ours_is_rendered_and_finds_the_others(tmp_path):
    path = tmp_path / "limaml.toml"
    path.write_text(find(objects(), "ConfigMap", "limaml")["data"]["limaml.toml"])
    cfg = load(path)
    postgres, mlflow, pushgateway = (values_of(name)["fullnameOverride"] for name in ("postgres", "mlflow", "pushgateway"))
    database = values_of("postgres")["cluster"]["initdb"]
    for url in (cfg.feast.registry, cfg.embeddings.lease_url):
        assert url.startswith(f"postgresql+psycopg://{database['owner']}:${{")
        assert url.endswith(f"@{postgres}-rw:5432/{database['database']}")
    assert cfg.registry.tracking_uri == f"http://{mlflow}:{values_of('mlflow')['server']['value_options']['port']}"
    assert f"{mlflow}:5000" in values_of("mlflow")["server"]["value_options"]["allowed_hosts"].split(",")
    assert cfg.registry.artifact_root == values_of("mlflow")["mlflow"]["defaultArtifactRoot"]
    assert cfg.monitoring.pushgateway == f"{pushgateway}:9091"
    assert cfg.feast.online_connection == "valkey:6379"
    assert re.search(r"^    helm install valkey valkey/valkey ", PAGE, re.MULTILINE)


def test_the_chart_s_default_configuration_goes_to_the_same_places(tmp_path):
    default = tmp_path / "default.toml"
    default.write_text(yaml.safe_load((CHART / "values.yaml").read_text())["config"])
    example = tmp_path / "example.toml"
    example.write_text(values_of("limaml")["config"])
    theirs, ours = load(default), load(example)
    for section in ("storage", "registry", "feast", "embeddings", "training"):
        assert getattr(theirs, section) == getattr(ours, section), section


def test_airflow_mounts_the_pod_that_ours_makes():
    airflow, (volume,) = values_of("airflow"), values_of("airflow")["volumes"]
    (mount,) = airflow["volumeMounts"]
    made = find(objects(), "ConfigMap", volume["configMap"]["name"])
    (path,) = [one["value"] for one in airflow["env"] if one["name"] == "AIRFLOW__LIMAML__POD_TEMPLATE"]
    assert path.removeprefix(mount["mountPath"] + "/") in made["data"]


def named_secrets(one, key=""):
    """Names under keys that refer to a Secret, at any depth."""
    if isinstance(one, dict):
        refers = key in ("secretKeyRef", "passwordSecret", "token") or ("name" in one and "key" in one)
        if refers and one.get("name"):
            yield one["name"]
        for below, value in one.items():
            yield from named_secrets(value, below)
    elif isinstance(one, list):
        for below in one:
            yield from named_secrets(below)
    elif isinstance(one, str) and re.search(r"(SecretName|existingSecret|usersExistingSecret)$", key):
        yield one


def test_every_secret_is_made_on_the_page_with_the_keys_that_are_read():
    made = dict(re.findall(r"create secret generic (\S+)((?:.*\\\n)*.*)", PAGE))
    used = {name for file in NAMES for name in named_secrets(values_of(file))}
    used |= set(named_secrets(yaml.safe_load((CHART / "values.yaml").read_text())))
    # This one is the operator's.
    assert used == set(made) | {"limaml-db-app"}
    for name, options in made.items():
        assert "--from-literal=" in options, name
    for key in ("jwt-secret", "api-secret-key", "fernet-key"):
        assert f"--from-literal={key}=" in made["limaml-airflow-keys"]


def test_the_page_installs_every_file_at_the_version_of_its_table():
    table = {
        cells[0]: cells[1:]
        for line in PAGE.splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 6
    }
    installs = re.findall(
        r"^    helm install (\S+) (\S+)(?: --version (\S+))? -n (\S+)(?:.* --values (\S+))?", PAGE, re.MULTILINE
    )
    assert {file for *_, file in installs if file} == {f"{name}-values.yaml" for name in NAMES}
    assert [release for release, *_ in installs] == [release for release in table if release != "release"]
    for release, chart, version, namespace, file in installs:
        in_namespace, of_chart, at_version, with_file, _ = table[release]
        assert namespace == in_namespace
        assert chart.removeprefix("../") == of_chart.removeprefix("helm/")
        assert version in (at_version, "")
        assert with_file.strip("`") == (file or "none")


def test_whatever_prometheus_chooses_by_label_has_it():
    """The stack takes up monitors with the label of its release, and no others, without a word."""
    (release,) = [line.split()[2] for line in PAGE.splitlines() if "kube-prometheus-stack --version" in line]
    assert find(objects(), "ServiceMonitor")["metadata"]["labels"]["release"] == release
    assert values_of("valkey")["metrics"]["serviceMonitor"]["additionalLabels"] == {"release": release}
    assert values_of("kuberay")["metrics"]["serviceMonitor"]["additionalLabels"] == {"release": release}
    assert values_of("pushgateway")["serviceMonitor"]["additionalLabels"] == {"release": release}
    assert values_of("postgres")["cluster"]["monitoring"]["podMonitor"]["labels"] == {"release": release}
    sidecar = values_of("monitoring")["grafana"]["sidecar"]["dashboards"]
    boards = [one for one in objects() if one["metadata"]["labels"].get(sidecar["label"]) == sidecar["labelValue"]]
    assert len(boards) == 3
    assert all(sidecar["folderAnnotation"] in board["metadata"]["annotations"] for board in boards)
