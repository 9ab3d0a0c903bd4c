"""The chart as Helm renders it: every variant, held to Kubernetes' schemas and to the published ones of custom resources."""

import copy
import json
import re
import tomllib

import pytest
import yaml

from limaml import telemetry
from limaml.config import load
from tests.deploy.charts import (
    CHART,
    CRDS,
    KUBERNETES,
    ROOT,
    VARIANTS,
    custom,
    find,
    pods,
    render,
    rendered,
    run_helm,
    template,
    values_of,
    wrong_built_in,
    wrong_custom,
)
from tools.chart import unexplained

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
LABELS = {f"app.kubernetes.io/{name}" for name in ("name", "instance", "version", "component", "part-of", "managed-by")}


def everything():
    return [one for variant in VARIANTS for one in rendered(variant)]


def containers(pod):
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_has_nothing_against_a_variant(variant):
    done = run_helm("lint", "--strict", CHART, "--values", values_of(variant))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_every_object_and_every_pod(version):
    objects = everything()
    built_in = [one for one in objects if not custom(one["kind"])]
    made = [pod for variant in VARIANTS for pod in pods(rendered(variant)).values()]
    for pod in made:
        pod["metadata"].setdefault("name", "made")
    assert {one["kind"] for one in built_in} >= {
        "Deployment",
        "Service",
        "ServiceAccount",
        "ConfigMap",
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "Ingress",
        "Job",
        "Pod",
        "Role",
        "RoleBinding",
    }
    assert not wrong_built_in(built_in + made, version)


def test_a_typo_in_an_object_of_kubernetes_is_refused():
    deployment = find(rendered("default"), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStopp"] = {"sleep": {"seconds": 1}}
    (wrong,) = wrong_built_in([deployment], KUBERNETES[0])
    assert "preStopp" in wrong


@pytest.mark.parametrize("kind", sorted(path.stem for path in CRDS.glob("*.yaml")))
def test_custom_resources_are_what_their_definition_says_and_a_typo_is_refused(kind):
    objects = [one for one in everything() if one["kind"] == kind] or [ray_job()]
    assert not [wrong for one in objects for wrong in wrong_custom(one)]
    spec = objects[0]["spec"]
    typo = copy.deepcopy(objects[0])
    typo["spec"] = {f"{key}s" if key == next(iter(spec)) else key: value for key, value in spec.items()}
    assert wrong_custom(typo)
    assert wrong_custom(objects[0] | {"apiVersion": "example.com/v1"})


def ray_job():
    """No variant makes one, the verbs do; made here of the cluster that the chart renders."""
    cluster = find(rendered("ray"), "RayCluster")
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "train"},
        "spec": {"entrypoint": "limaml train", "backoffLimit": 0, "rayClusterSpec": cluster["spec"]},
    }


def test_what_the_two_scalers_say_is_read_where_it_is_meant():
    """A ScaledObject's metadata is free text to its definition."""
    (trigger,) = find(rendered("keda"), "ScaledObject")["spec"]["triggers"]
    assert set(trigger["metadata"]) == {"serverAddress", "query", "threshold"}
    assert f'{telemetry.RANK_SECONDS}_sum{{stage="total",namespace="ranking",service="limaml"}}' in trigger["metadata"]["query"]
    for variant, kind in (("production", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        assert "replicas" not in find(rendered(variant), "Deployment")["spec"]
        assert '"scaleDown"' in json.dumps(find(rendered(variant), kind)), kind


def test_every_object_has_the_common_labels_and_selectors_never_change():
    extra = {"limaml-extra", "limaml"}  # of extraObjects
    for one in everything():
        labels = one["metadata"].get("labels", {})
        if one["metadata"]["name"] in extra and not labels:
            continue
        assert set(labels) >= LABELS, one["metadata"]
        assert labels["app.kubernetes.io/version"] == version_of_the_package()
    text = json.dumps([selectors(one) for one in everything()])
    assert "app.kubernetes.io/component" in text
    assert not re.search(r"helm.sh/chart|app.kubernetes.io/version", text)


def selectors(one):
    """Everything in an object by which others are chosen."""
    if isinstance(one, dict):
        keys = ("selector", "podSelector", "labelSelector", "matchLabels")
        return [one[key] for key in keys if key in one] + [selectors(below) for below in one.values()]
    return [selectors(below) for below in one] if isinstance(one, list) else []


def version_of_the_package():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_chart_is_of_this_version_and_has_no_subchart():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == version_of_the_package()
    assert "dependencies" not in chart
    assert chart["kubeVersion"] == f">={KUBERNETES[0]}.0-0"
    refused = template("--kube-version", "1.29.0")
    assert refused.returncode != 0
    assert "kubeVersion" in refused.stderr


def test_every_pod_is_restricted():
    """Kubernetes' Pod Security Standard `restricted`, a root file system that cannot be written, no token."""
    seen = 0
    for variant in VARIANTS:
        for name, pod in pods(rendered(variant)).items():
            spec, seen = pod["spec"], seen + 1
            with_token = variant == "ray" and name.endswith("/head")  # Ray's autoscaler asks for pods
            assert spec["automountServiceAccountToken"] is with_token, name
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in containers(pod):
                context = container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False, name
                assert context["readOnlyRootFilesystem"] is True, name
                assert context["capabilities"] == {"drop": ["ALL"]}, name
                assert "resources" not in container or variant in ("production", "ray")
    assert seen > 20


def test_every_image_has_a_tag_and_the_digest_that_is_given():
    for pod in pods(rendered("production")).values():
        for container in containers(pod):
            assert re.fullmatch(r"registry\.example\.com/limaml/(serve|train):0\.1\.0@sha256:[12]{64}", container["image"])
    done = template("--set-string", "images.serve.tag=7", "--set", "images.serve.digest=abc")
    assert "images/serve/digest" in done.stderr


def test_a_changed_configuration_replaces_the_pods_and_nothing_else_does(tmp_path):
    def annotation(*arguments):
        template = find(render(*arguments), "Deployment")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/config"]

    changed = tmp_path / "changed.toml"
    changed.write_text(VALUES["config"] + "poll_interval_s = 6.0\n")
    assert annotation() == annotation("--set", "serving.replicas=5")
    assert annotation() != annotation("--set-file", f"config={changed}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configuration_reaches_the_pods_as_it_was_given_and_can_be_read(variant, tmp_path):
    given = (yaml.safe_load(values_of(variant).read_text()) or {}).get("config", VALUES["config"])
    maps = [one for one in rendered(variant) if one["kind"] == "ConfigMap" and "limaml.toml" in one["data"]]
    assert len(maps) == 2  # of the release, and of the Job before it
    assert {one["data"]["limaml.toml"] for one in maps} == {given}
    path = tmp_path / "limaml.toml"
    path.write_text(given)
    cfg = load(path)
    (container,) = find(rendered(variant), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["ports"][0]["containerPort"] == cfg.serving.port
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert places["config"] == "/etc/limaml"
    assert cfg.serving.token_file in ("", f"{places.get('token')}/token")


def test_the_probes_and_the_drain_fit_the_time_there_is():
    spec = find(rendered("default"), "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/livez", "readiness": "/readyz", "liveness": "/livez"}
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] + 15 < spec["terminationGracePeriodSeconds"]


def test_monitors_rules_and_dashboards_carry_the_labels_they_are_chosen_by():
    objects = rendered("production")
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert find(objects, kind)["metadata"]["labels"]["release"] == "monitoring", kind
    boards = [one for one in objects if one["metadata"]["labels"].get("grafana_dashboard") == "1"]
    assert len(boards) == len(list((CHART / "files" / "dashboards").glob("*.json"))) == 3
    for board in boards:
        ((name, text),) = board["data"].items()
        assert json.loads(text) == json.loads((CHART / "files" / "dashboards" / name.removeprefix("limaml-")).read_text())


def test_a_rule_is_the_file_s_with_a_runbook_that_can_be_opened():
    written = yaml.safe_load((CHART / "files" / "rules" / "limaml.yaml").read_text())
    assert find(render("--set", "prometheusRule.enabled=true"), "PrometheusRule")["spec"] == written
    alerts = [rule for group in find(rendered("production"), "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    assert {alert["annotations"]["runbook_url"].partition("/docs/")[0] for alert in alerts} == {
        "https://git.example.com/limaml/blob/main"
    }


def test_the_hook_runs_before_the_release_unless_its_secrets_come_with_it():
    for variant, when in (("default", "pre-install,pre-upgrade"), ("externalsecret", "post-install,pre-upgrade")):
        hooks = [one for one in rendered(variant) if "helm.sh/hook" in one["metadata"].get("annotations", {})]
        found = {one["kind"]: one["metadata"]["annotations"] for one in hooks if one["kind"] != "Pod"}
        assert set(found) == {"ConfigMap", "ServiceAccount", "Job"}
        assert {annotations["helm.sh/hook"] for annotations in found.values()} == {when}
        assert int(found["ConfigMap"]["helm.sh/hook-weight"]) < int(found["Job"]["helm.sh/hook-weight"])
    spec = find(rendered("local"), "Job")["spec"]["template"]["spec"]
    assert [one["args"] for one in (*spec["initContainers"], *spec["containers"])] == [["apply"], ["status"]]


def test_a_verb_s_pod_finds_ray_with_its_token():
    (pod,) = (pod for name, pod in pods(rendered("ray")).items() if name.endswith("pod-template"))
    (container,) = pod["spec"]["containers"]
    environment = {one["name"]: one for one in container["env"]}
    assert container["name"] == "base"
    assert "command" not in container
    assert environment["RAY_ADDRESS"]["value"] == "ray://limaml-ray-head-svc:10001"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "limaml-ray", "key": "auth_token"}
    # Airflow's runner sets the component to the verb, so no policy may go by it.
    labels = {key: text for key, text in pod["metadata"]["labels"].items() if key != "app.kubernetes.io/component"}
    (ingress,) = find(rendered("ray"), "NetworkPolicy", "limaml-ray")["spec"]["ingress"]
    admitted = [one["podSelector"]["matchLabels"] for one in ingress["from"]]
    assert any(wanted.items() <= labels.items() for wanted in admitted)
    closed = find(rendered("ray"), "NetworkPolicy", "limaml-closed")["spec"]
    assert closed["podSelector"]["matchLabels"].items() <= labels.items()
    assert "ingress" not in closed
    assert pod["metadata"]["namespace"] == "ranking"
    assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])


def test_ray_is_of_the_locked_version():
    assert f"ray=={VALUES['ray']['version']}" in (ROOT / "requirements.lock").read_text().split()


def test_the_notes_name_the_next_command():
    done = run_helm(
        "install", "limaml", CHART, "--dry-run=client", "--namespace", "ranking", "--values", values_of("production")
    )
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert "helm -n ranking test limaml" in notes
    assert "https://rank.example.com/rank" in notes
    assert "create secret generic limaml-token" in notes


def keys(values, path=()):
    """Every path in values.yaml; what lies below a free map of the schema is its own affair."""
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict) and "properties" in at((*path, name)):
            yield from keys(value, (*path, name))


def at(path):
    schema = SCHEMA
    for name in path:
        schema = schema["properties"][name]
        if "$ref" in schema:
            schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_the_schema_knows_every_value_and_no_other():
    found = list(keys(VALUES))
    assert len(found) > 150
    for path in found:
        schema = at(path)
        assert schema, path
        assert "properties" not in schema or schema["additionalProperties"] is False, path
    assert set(SCHEMA["properties"]) == set(VALUES) | {"global"}
    assert SCHEMA["additionalProperties"] is False
    for typo in ("servings.replicas=1", "serving.replica=1", "serving.resources.request.cpu=1", "serving.service.type=Node"):
        done = template("--set", typo)
        assert done.returncode != 0, typo
        assert "values don't meet the specifications of the schema" in done.stderr, typo


def test_every_value_is_explained():
    """tests/rules/test_pages.py holds that the page says what the comments do."""
    assert not unexplained(CHART / "values.yaml")
