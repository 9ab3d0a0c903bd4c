"""`train` as a RayJob: what is asked of the Kubernetes API, by its real client, and what is made of the states it answers."""

import json
import shlex
import threading
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from limaml.config import Config, load
from limaml.errors import ConfigError, LimamlError
from limaml.training.candidate import fingerprint
from limaml.training.ray_job import job, train_as_job

ROOT = Path(__file__).parents[3]
THROUGH, MARK = date(2026, 1, 31), "0123456789abcdef0123"
NAME = "limaml-train-0123456789abcdef"
PATH = "/apis/ray.io/v1/namespaces/ranking/rayjobs"
TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"namespace": "ranking", "labels": {"team": "ours"}},
    "spec": {"backoffLimit": 5, "submitterConfig": {"backoffLimit": 2}, "rayClusterSpec": {"rayVersion": "2.60.0"}},
}


class Kubernetes:
    """The part of the API that keeps RayJobs: one answer of `states` a look, the last one again and again."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.states: list[dict[str, str]] = []
        self.calls: list[str] = []
        self.refuses = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.calls.append(f"{method} {path}")
        name = path.removeprefix(PATH).strip("/")
        if self.refuses:
            return self.refuses, {"message": "no"}
        if method == "POST":
            self.jobs[body["metadata"]["name"]] = body
            return 201, body
        if name not in self.jobs:
            return 404, {}
        if method == "DELETE":
            return 200, self.jobs.pop(name)
        state = self.states.pop(0) if len(self.states) > 1 else (self.states or [{}])[0]
        return 200, self.jobs[name] | {"status": state}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        kubernetes = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                status, found = kubernetes.answer(self.command, self.path, body)
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    found = Kubernetes()
    place = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{found.server.server_port}"}}
    context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
    config = {"clusters": [place], "contexts": [context], "users": [{"name": "me", "user": {}}], "current-context": "here"}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(TEMPLATE))
    overrides = [f"ray.job_template={tmp_path}/job.yaml", "ray.job_poll_s=0.01", f"storage.root={tmp_path}/data"]
    return load(ROOT / "configs" / "synthetic.toml", [*overrides, "meta.inner_steps=3", "evaluation.first_k=[0, 5]"])


def test_a_job_is_the_template_with_this_run_written_over_it(cfg: Config) -> None:
    body = job(cfg, THROUGH, MARK)
    assert body["metadata"] == {"name": NAME, "namespace": "ranking", "labels": {"team": "ours"}}
    spec = body["spec"]
    assert spec["rayClusterSpec"] == TEMPLATE["spec"]["rayClusterSpec"]
    assert (spec["backoffLimit"], spec["submitterConfig"], spec["shutdownAfterJobFinishes"]) == (0, {"backoffLimit": 0}, True)
    verb, *settings = shlex.split(spec["entrypoint"])[3:]
    assert (verb, settings[0]) == ("train", f"--through={THROUGH}")
    # The job's own file may be the shipped one: with these overrides it trains the same model, and submits no job.
    overrides = [setting.removeprefix("--set=") for setting in settings[1:]]
    inside = load(ROOT / "configs" / "synthetic.toml", [*overrides, f"storage.root={cfg.storage.root}"])
    assert fingerprint(inside, THROUGH) == fingerprint(cfg, THROUGH)
    assert (inside.ray.job_template, inside.ray.address, inside.meta.inner_steps) == ("", "auto", 3)


def test_its_state_is_read_from_the_resource_until_it_succeeded(cfg: Config, kubernetes: Kubernetes) -> None:
    states = ({}, {"jobDeploymentStatus": "Initializing"}, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"})
    kubernetes.states = [*states, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    train_as_job(cfg, THROUGH, MARK)
    assert kubernetes.calls == [f"GET {PATH}/{NAME}", f"POST {PATH}", *[f"GET {PATH}/{NAME}"] * 4]


@pytest.mark.parametrize(
    "state",
    [
        {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed", "message": "the driver ended with 65"},
        {"jobStatus": "STOPPED", "message": "the driver ended with 65"},
        {"jobDeploymentStatus": "Failed", "reason": "SubmissionFailed", "message": "the driver ended with 65"},
    ],
)
def test_a_job_that_fails_is_named_with_its_reason_and_done_again(
    cfg: Config, kubernetes: Kubernetes, state: dict[str, str]
) -> None:
    kubernetes.states = [state]
    with pytest.raises(LimamlError, match=rf"RayJob ranking/{NAME} must succeed, it ended as \w+: .*the driver ended with 65"):
        train_as_job(cfg, THROUGH, MARK)
    kubernetes.calls, kubernetes.states = [], [state, {"jobStatus": "SUCCEEDED"}]
    train_as_job(cfg, THROUGH, MARK)
    assert [call.split()[0] for call in kubernetes.calls] == ["GET", "DELETE", "GET", "POST", "GET"]


def test_a_verb_that_was_killed_finds_its_job_again(cfg: Config, kubernetes: Kubernetes) -> None:
    kubernetes.jobs[NAME] = job(cfg, THROUGH, MARK)
    kubernetes.states = [{"jobStatus": "RUNNING"}, {"jobStatus": "SUCCEEDED"}]
    train_as_job(cfg, THROUGH, MARK)
    assert [call.split()[0] for call in kubernetes.calls] == ["GET", "GET"]


def test_a_verb_that_is_told_to_end_takes_its_job_with_it(
    cfg: Config, kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_to_end(_: float) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("limaml.training.ray_job.time.sleep", told_to_end)
    kubernetes.states = [{"jobStatus": "RUNNING"}]
    with pytest.raises(SystemExit):
        train_as_job(cfg, THROUGH, MARK)
    assert kubernetes.jobs == {}


def test_a_refusal_and_a_template_that_is_none_say_what_to_do(cfg: Config, kubernetes: Kubernetes, tmp_path: Path) -> None:
    kubernetes.refuses = 403
    with pytest.raises(
        LimamlError, match=r"Kubernetes refused get_namespaced_custom_object of RayJob .* 403 .* service account"
    ):
        train_as_job(cfg, THROUGH, MARK)
    (tmp_path / "job.yaml").write_text("kind: Pod\napiVersion: v1\n")
    with pytest.raises(
        ConfigError, match=r"ray\.job_template must hold a ray\.io/v1 RayJob with .*, got a v1 Pod in .*job\.yaml"
    ):
        job(cfg, THROUGH, MARK)
