"""Each combination of values that cannot work is refused, with the rule, the value and the remedy; and what works is not."""

import json

import pytest
import yaml

from tests.deploy.charts import CHART, template

CONFIG = yaml.safe_load((CHART / "values.yaml").read_text())["config"]
LOCAL = yaml.safe_load((CHART / "ci" / "local-values.yaml").read_text())["config"]
CPU = {"serving": {"resources": {"requests": {"cpu": "1"}}}}
MONITORED = {"serviceMonitor": {"enabled": True}, "networkPolicy": {"from": [{"podSelector": {}}]}}
KEDA = MONITORED | {"autoscaling": {"keda": {"enabled": True, "prometheusAddress": "http://prometheus:9090"}}}
RAY_POD = {"resources": {"limits": {"cpu": "1", "memory": "4Gi"}}}


def config(*changes, text=CONFIG):
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return {"config": text}


def refused(values, tmp_path):
    """The lines of what the chart says against values; none where it renders them."""
    path = tmp_path / "values.json"
    path.write_text(json.dumps(values))
    done = template("--values", path)
    if done.returncode == 0:
        return []
    assert "These values cannot work:" in done.stderr, done.stderr
    told = done.stderr.partition("These values cannot work:\n")[2].partition("\n\nUse --debug")[0]
    return [line.strip() for line in told.splitlines() if line.strip()]


CASES = {
    "no TOML": ({"config": "[serving\n"}, "config must be TOML, but: ", "--set-file config=FILE"),
    "loopback": (
        config(('host = "0.0.0.0"', 'host = "127.0.0.1"')),
        "config: serving.host must be an address that others reach in a pod, got 127.0.0.1; ",
        'set host = "0.0.0.0"',
    ),
    "no host": (config(('host = "0.0.0.0"', "")), "config: serving.host must be", 'set host = "0.0.0.0"'),
    "no token file": (
        config(('token_file = "/run/secrets/limaml/token"', "")),
        "config: serving.token_file must name the file of a token where the service listens beyond loopback, got none; ",
        "allow_remote_without_token = true",
    ),
    "no token": (
        {"secrets": {"token": {"name": ""}}},
        "secrets.token.name must name the Secret with the token of serving.token_file (/run/secrets/limaml/token), got none; ",
        "enable secrets.externalSecret",
    ),
    "token over the configuration": (
        config(("/run/secrets/limaml/token", "/etc/limaml/token")),
        "config: serving.token_file must lie in a folder of its own, got /etc/limaml/token; ",
        'set token_file = "/run/secrets/limaml/token"',
    ),
    "partitions in a pod": (
        config(('root = "s3://limaml/data"', 'root = "/data"')),
        "config: storage.root must be a place that all pods share, got /data, which ends with its pod; ",
        "s3://bucket/prefix, or allowLocalStores=true",
    ),
    "registry in a pod": (
        config(("http://mlflow:5000", "sqlite:///mlflow.db")),
        "config: registry.tracking_uri must be a place that all pods share, got sqlite:///mlflow.db",
        "http://mlflow:5000, or allowLocalStores=true",
    ),
    "artifacts in a pod": (
        config(("s3://limaml/mlflow", "artifacts")),
        "config: registry.artifact_root must be a place that all pods share, got artifacts",
        "allowLocalStores=true",
    ),
    "lease in a pod": (
        {"config": CONFIG.partition("[embeddings]")[0] + "[training]" + CONFIG.partition("[training]")[2]},
        "config: embeddings.lease_url must be a place that all pods share, got sqlite:///.run/lease.db",
        "postgresql+psycopg://USER:${PASSWORD}@HOST/DATABASE",
    ),
    "features in a pod": (
        config(('registry_type = "sql"', ""), ('registry = "postgresql', 'registry = "a.db" #')),
        "config: feast.registry must be a place that all pods share, got a.db, which ends with its pod; ",
        'set registry_type = "sql" and a URL',
    ),
    "SQLite in a pod": (
        {"serving": {"replicas": 1}} | config(('online_store = "redis"', 'online_store = "sqlite"')),
        "config: feast.online_store must be redis, got sqlite, which ends with its pod; ",
        'set online_store = "redis", or allowLocalStores=true',
    ),
    "workers on SQLite": (
        {"allowLocalStores": True, "serving": {"replicas": 1}} | config(("port = 3100", "workers = 3"), text=LOCAL),
        "config: serving.workers must be 1 where feast.online_store is sqlite, got 3: its readers block one another",
        'set workers = 1, or online_store = "redis"',
    ),
    "pods on SQLite": (
        {"allowLocalStores": True} | config(text=LOCAL),
        "config: feast.online_store must be redis where more than one pod serves, got sqlite and 2 pods; ",
        "serving.replicas=1",
    ),
    "features nowhere": (
        config(('repo_path = "/opt/limaml/feature_repo"', "")),
        "config: feast.repo_path must be absolute in a pod, got feature_repo; ",
        'set repo_path = "/opt/limaml/feature_repo"',
    ),
    "a password of nobody": (
        {"secrets": {"env": {"LIMAML_REDIS_PASSWORD": None}}},
        "secrets.env must have every variable that config refers to, got no LIMAML_REDIS_PASSWORD; ",
        "add secrets.env.LIMAML_REDIS_PASSWORD",
    ),
    "a password of no Secret": (
        {"secrets": {"env": {"LIMAML_REDIS_PASSWORD": {"name": ""}}}},
        "secrets.env.LIMAML_REDIS_PASSWORD.name must name a Secret, got none; ",
        "enable secrets.externalSecret",
    ),
    "drain too long": (
        {"serving": {"preStopSeconds": 50}},
        "serving.terminationGracePeriodSeconds must be > preStopSeconds + config's serving.timeout_s + 10 (65), got 60; ",
        "raise it",
    ),
    "two scalers": (
        KEDA | CPU | {"autoscaling": KEDA["autoscaling"] | {"hpa": {"enabled": True}}},
        "autoscaling.hpa.enabled and autoscaling.keda.enabled must not both be true",
        "set one to false",
    ),
    "no processor time": (
        {"autoscaling": {"hpa": {"enabled": True}}},
        "serving.resources.requests.cpu must be set where autoscaling.hpa is enabled, got none",
        "e.g. to 500m",
    ),
    "no Prometheus": (
        MONITORED | {"autoscaling": {"keda": {"enabled": True}}},
        "autoscaling.keda.prometheusAddress must name Prometheus where KEDA scales by its metrics, got none; ",
        "http://monitoring-prometheus.monitoring:9090",
    ),
    "no metrics": (
        {"autoscaling": KEDA["autoscaling"]},
        "serviceMonitor.enabled must be true where KEDA scales by requests in flight",
        "set autoscaling.keda.query",
    ),
    "refused before scaled": (
        KEDA | {"autoscaling": {"keda": KEDA["autoscaling"]["keda"] | {"inFlightPerPod": 64}}},
        "autoscaling.keda.inFlightPerPod must be < serving.max_in_flight * serving.workers (64), got 64; ",
        "lower it",
    ),
    "fewest above most": (
        CPU | {"autoscaling": {"hpa": {"enabled": True, "minReplicas": 11}}},
        "autoscaling.hpa.minReplicas must be <= maxReplicas (10), got 11; ",
        "raise maxReplicas",
    ),
    "no node can be drained": (
        {"podDisruptionBudget": {"bound": "minAvailable", "amount": 2}},
        "podDisruptionBudget.amount must be < the fewest pods (2) where they must stay, got 2",
        "use bound=maxUnavailable",
    ),
    "a route without a host": (
        {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}, "networkPolicy": {"enabled": False}},
        "httpRoute.hostnames must name a host where httpRoute is enabled, got none",
        "rank.example.com",
    ),
    "a route without a Gateway": (
        {"httpRoute": {"enabled": True, "hostnames": ["rank.example.com"]}, "networkPolicy": {"enabled": False}},
        "httpRoute.parentRefs must name a Gateway where httpRoute is enabled, got none",
        "namespace: gateways",
    ),
    "an Ingress without a host": (
        {"ingress": {"enabled": True}, "networkPolicy": {"enabled": False}},
        "ingress.hosts must name a host where ingress is enabled, got none",
        "rank.example.com",
    ),
    "nobody may connect": (
        {"ingress": {"enabled": True, "hosts": ["rank.example.com"]}, "serviceMonitor": {"enabled": True}},
        "networkPolicy.from must admit whoever connects for ingress, serviceMonitor, got none",
        "add the namespace of the gateway or of Prometheus",
    ),
    "pods may connect nowhere": (
        {"networkPolicy": {"egress": {"enabled": True}}},
        "networkPolicy.egress.to must admit the online store, MLflow, Postgres and the object store",
        "add rules for them",
    ),
    "a store of secrets without a name": (
        {"secrets": {"externalSecret": {"enabled": True, "data": [{"secretKey": "token", "remoteRef": {"key": "limaml"}}]}}},
        "secrets.externalSecret.storeRef.name must name a SecretStore",
        "set it",
    ),
    "a store of secrets without secrets": (
        {"secrets": {"externalSecret": {"enabled": True, "storeRef": {"name": "vault"}}}},
        "secrets.externalSecret.data must say what is fetched",
        "add [{secretKey: token",
    ),
    "a verb's pod by tag": (
        {"airflow": {"podTemplate": {"enabled": True}}},
        "images.train.digest must be set where airflow.podTemplate is enabled, got none",
        "set it to sha256:…",
    ),
    "Ray without a size": (
        {"ray": {"enabled": True, "head": RAY_POD, "worker": {"resources": {"limits": {"cpu": "1"}}}}},
        'ray.worker.resources must have a cpu and a limit of memory where ray is enabled, got {"limits":{"cpu":"1"}}',
        "set them",
    ),
    "Ray's fewest above its most": (
        {"ray": {"enabled": True, "autoscaling": True, "head": RAY_POD, "worker": RAY_POD | {"minReplicas": 5}}},
        "ray.worker.minReplicas must be <= maxReplicas (4), got 5; ",
        "raise maxReplicas",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_the_remedy_and_nothing_else_is(case, tmp_path):
    values, rule, remedy = CASES[case]
    (line,) = refused(values, tmp_path)
    assert line.startswith(rule)
    assert remedy in line


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    lines = refused(config(('host = "0.0.0.0"', "")) | {"ingress": {"enabled": True}}, tmp_path)
    assert len(lines) == 3


@pytest.mark.parametrize(
    "values",
    [
        KEDA,
        CPU | {"autoscaling": {"hpa": {"enabled": True}}},
        {"secrets": {"env": {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}}},
        config(('token_file = "/run/secrets/limaml/token"', "allow_remote_without_token = true")),
        {"ray": {"enabled": True, "head": RAY_POD, "worker": RAY_POD}},
    ],
)
def test_what_works_is_not_refused(values, tmp_path):
    assert not refused(values, tmp_path)
