"""Train as a RayJob of Kubernetes (KubeRay): a Ray cluster for the time of one run, made from a template that is yours.

`ray.job_template` names a file with a RayJob; images, resources, volumes and secrets in it are the platform's to say. Written
over it are the name, which is the run's, the entrypoint, which is this very verb, and that nothing is tried again behind
Airflow's back: KubeRay's own retries make a new cluster, and those of the pod that submits would train twice at once.

The state is read from the resource. A verb that was killed finds its job again by the name; one that is told to end takes the
job with it.
"""

import json
import shlex
import time
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from limaml import telemetry
from limaml.config import Config
from limaml.errors import ConfigError, LimamlError

_GROUP, _VERSION, _PLURAL = "ray.io", "v1", "rayjobs"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CONFLICT, _NOT_FOUND = 409, 404
_SECTIONS = ("model", "meta", "training", "evaluation", "promotion", "governance")
_log = telemetry.get_logger(__name__)


def train_as_job(cfg: Config, through: date, mark: str) -> None:
    """Run `limaml train --through` in a RayJob and wait for its end. Raises LimamlError if it does not succeed."""
    body = job(cfg, through, mark)
    jobs = _Jobs(body["metadata"]["namespace"], body["metadata"]["name"])
    found = jobs.read()
    if found is not None and _outcome(found) not in (None, "SUCCEEDED"):
        jobs.delete()
        jobs.wait_until_gone(cfg.ray.job_poll_s)
        found = None
    if found is None:
        jobs.create(body)
    _log.info("ray_job", name=jobs.name, namespace=jobs.namespace, found_again=found is not None)
    try:
        outcome, state = _ended(jobs, cfg.ray.job_poll_s)
    except SystemExit:
        jobs.delete()
        raise
    if outcome != "SUCCEEDED":
        why = "; ".join(str(state[key]) for key in ("reason", "message") if state.get(key)) or "no reason given"
        raise LimamlError(
            f"RayJob {jobs.namespace}/{jobs.name} must succeed, it ended as {outcome}: {why}; look at the log of its pods and "
            "run it again"
        )


def job(cfg: Config, through: date, mark: str) -> dict[str, Any]:
    """The RayJob of a run. Raises ConfigError for a template that is none."""
    path = Path(cfg.ray.job_template)
    try:
        body = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"ray.job_template must be a readable YAML file, got {path}: {error}; correct it") from None
    kind = f"{body.get('apiVersion')} {body.get('kind')}" if isinstance(body, dict) else type(body).__name__
    if kind != f"{_GROUP}/{_VERSION} RayJob" or "rayClusterSpec" not in body.get("spec", {}):
        raise ConfigError(
            f"ray.job_template must hold a {_GROUP}/{_VERSION} RayJob with a rayClusterSpec, got a {kind} in {path}; correct it"
        )
    metadata = body.setdefault("metadata", {})
    namespace = _NAMESPACE_FILE.read_text() if _NAMESPACE_FILE.exists() else "default"
    metadata |= {"name": f"limaml-train-{mark[:16]}", "namespace": metadata.get("namespace", namespace)}
    verb = ["python", "-m", "limaml.cli", "train", f"--through={through}", *_settings(cfg)]
    spec = body["spec"]
    spec |= {"entrypoint": shlex.join(verb), "backoffLimit": 0}
    spec["submitterConfig"] = {**spec.get("submitterConfig", {}), "backoffLimit": 0}
    spec.setdefault("shutdownAfterJobFinishes", True)
    return dict(body)


def _settings(cfg: Config) -> list[str]:
    """What shapes the model, as overrides: the job's own configuration file need not have what this verb was told."""
    changed = {"ray.job_template": "", "ray.address": "auto"}
    for section in _SECTIONS:
        values = getattr(cfg, section).model_dump(mode="json", exclude_none=True)
        changed |= {f"{section}.{key}": value for key, value in values.items()}
    return [f"--set={key}={json.dumps(value)}" for key, value in changed.items()]


def _ended(jobs: "_Jobs", poll_s: float) -> tuple[str, dict[str, Any]]:
    """How the job ended, and its status. Raises LimamlError if it is gone."""
    said = ""
    while True:
        found = jobs.read()
        if found is None:
            raise LimamlError(f"RayJob {jobs.namespace}/{jobs.name} was deleted while it ran; run it again")
        status = found.get("status") or {}
        now = f"{status.get('jobDeploymentStatus', 'New')} {status.get('jobStatus', '')}".strip()
        if now != said:
            said = now
            _log.info("ray_job_state", name=jobs.name, state=now)
        if (outcome := _outcome(found)) is not None:
            return outcome, status
        time.sleep(poll_s)


def _outcome(found: dict[str, Any]) -> str | None:
    """SUCCEEDED, or how it failed; None while it runs. A job fails as well where its cluster does, before it has a state."""
    status = found.get("status") or {}
    if status.get("jobStatus") in ("SUCCEEDED", "FAILED", "STOPPED"):
        return str(status["jobStatus"])
    return "FAILED" if status.get("jobDeploymentStatus") in ("Failed", "ValidationFailed") else None


class _Jobs:
    """One RayJob through the Kubernetes API."""

    def __init__(self, namespace: str, name: str) -> None:
        from kubernetes import client, config

        self.namespace, self.name = namespace, name
        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
        self._api = client.CustomObjectsApi()
        self._failed = client.ApiException

    def create(self, body: dict[str, Any]) -> None:
        self._call(self._api.create_namespaced_custom_object, body, name=False, expected=_CONFLICT)

    def read(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._call(self._api.get_namespaced_custom_object)
        return found

    def delete(self) -> None:
        self._call(self._api.delete_namespaced_custom_object)

    def wait_until_gone(self, poll_s: float) -> None:
        while self.read() is not None:
            time.sleep(poll_s)

    def _call(self, method: Any, *body: Any, name: bool = True, expected: int = _NOT_FOUND) -> Any:
        """What the API answers; None for the refusal that is expected. Raises LimamlError for another one, or no answer."""
        import urllib3

        try:
            return method(_GROUP, _VERSION, self.namespace, _PLURAL, *([self.name] if name else []), *body)
        except self._failed as error:
            if error.status == expected:
                return None
            raise LimamlError(
                f"Kubernetes refused {method.__name__} of RayJob {self.namespace}/{self.name}: {error.status} {error.reason}: "
                f"{str(error.body)[:300]}; is KubeRay installed, and may this service account do it?"
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise LimamlError(f"Kubernetes did not answer about RayJob {self.namespace}/{self.name}: {error}") from error
