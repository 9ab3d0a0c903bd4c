"""A Kubernetes API server as far as a runner of pods needs one: pods, their logs, their events, and a role that it enforces.

kmock (0.8) has no label selectors, which a try needs to find an earlier one's pod; a real API server is no package. What
becomes of a pod is a `Fate`, told beforehand, since there is no kubelet either.
"""

import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

BASE = "/api/v1/namespaces/limaml"
_PATH = re.compile(rf"{BASE}/(pods|events)(?:/([a-z0-9.-]+))?(?:/(log))?")
_VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
_TERM = re.compile(r"(!)?([\w./-]+)(?:(!?=)(.*))?")


@dataclass
class Fate:
    """What becomes of a pod: it waits, then runs until its log ends, then is as said here."""

    message: str | dict[str, Any] | None = None
    """The termination message; a dict as JSON."""
    exit_code: int = 0
    reason: str | None = None
    """The container's, such as OOMKilled."""
    pod_reason: str | None = None
    pod_message: str | None = None
    """The pod's own, such as Evicted."""
    waiting: tuple[str, str] | None = None
    """Reason and message of a container that never starts."""
    starts: bool = True
    """Without, the pod fails before there is any container."""
    log: tuple[str, ...] = ("one", "two")
    cuts: int = 0
    """So many times the log's connection breaks after its first line."""
    until: threading.Event | None = None
    """The log ends when this is set."""


@dataclass
class _Pod:
    body: dict[str, Any]
    fate: Fate
    reads: int = 0
    ended: bool = False
    deleted: threading.Event = field(default_factory=threading.Event)


class KubernetesApi:
    """`created` holds every pod as it came in, `asked` every verb and resource; `refusal` may answer instead, with a status."""

    def __init__(self, rules: list[dict[str, Any]]) -> None:
        self._allowed = {(verb, what) for rule in rules for what in rule["resources"] for verb in rule["verbs"]}
        self._lock = threading.RLock()
        self.created: list[dict[str, Any]] = []
        self.asked: set[tuple[str, str]] = set()
        self.pods: dict[str, _Pod] = {}
        self.fates: list[Fate] = []
        """One for each pod to come; the last one stays."""
        self.refusal: Callable[[str, str], int | None] = lambda verb, what: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        for pod in self.pods.values():
            pod.deleted.set()
        self._server.shutdown()
        self._server.server_close()

    def refused(self, verb: str, what: str) -> int | None:
        with self._lock:
            self.asked.add((verb, what))
            return self.refusal(verb, what) or (None if (verb, what) in self._allowed else 403)

    def create(self, body: dict[str, Any]) -> dict[str, Any] | None:
        name = body["metadata"]["name"]
        with self._lock:
            if name in self.pods:
                return None
            self.created.append(body)
            fate = self.fates.pop(0) if len(self.fates) > 1 else self.fates[0]
            stored = json.loads(json.dumps(body))
            stored["metadata"] |= {"uid": name, "namespace": "limaml", "creationTimestamp": _now()}
            self.pods[name] = _Pod(stored, fate)
            return self._seen(self.pods[name])

    def read(self, name: str) -> dict[str, Any] | None:
        with self._lock:
            if (pod := self.pods.get(name)) is None:
                return None
            pod.reads += 1
            return self._seen(pod)

    def list(self, selector: str) -> list[dict[str, Any]]:
        with self._lock:
            return [self._seen(pod) for pod in self.pods.values() if _selected(pod.body["metadata"]["labels"], selector)]

    def patch(self, name: str, change: dict[str, Any]) -> dict[str, Any] | None:
        with self._lock:
            if (pod := self.pods.get(name)) is None:
                return None
            pod.body["metadata"]["labels"] |= change["metadata"]["labels"]
            return self._seen(pod)

    def delete(self, name: str) -> dict[str, Any] | None:
        with self._lock:
            if (pod := self.pods.pop(name, None)) is None:
                return None
            pod.deleted.set()
            return self._seen(pod)

    def _seen(self, pod: _Pod) -> dict[str, Any]:
        return {**pod.body, "status": _status(pod)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: KubernetesApi

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        found = _PATH.fullmatch(url.path)
        if found is None:
            return self._send(404, _failure(404, f"no such path {url.path}"))
        resource, name, log = found.groups()
        verb = _VERBS.get(self.command, "get" if name else "list")
        what = f"{resource}/log" if log else resource
        if (status := self.api.refused(verb, what)) is not None:
            return self._send(status, _failure(status, f"{verb} {what} is forbidden" if status == 403 else "not now"))
        if log:
            return self._log(name)
        if verb == "list":
            items = self.api.list(query.get("labelSelector", "")) if resource == "pods" else []
            return self._send(200, {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items})
        answers = {"create": lambda: self.api.create(body), "patch": lambda: self.api.patch(name, body)}
        answers |= {"get": lambda: self.api.read(name), "delete": lambda: self.api.delete(name)}
        answer = answers[verb]()
        missing = 409 if verb == "create" else 404
        return self._send(200, answer) if answer else self._send(missing, _failure(missing, f"pods {name!r}: {missing}"))

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _log(self, name: str) -> None:
        pod = self.api.pods.get(name)
        if pod is None:
            return self._send(404, _failure(404, f"pods {name!r} not found"))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):  # the client may hang up
            for line in pod.fate.log:
                self._chunk(f"{_now()} {line}\n".encode())
                if pod.fate.cuts:
                    pod.fate.cuts -= 1
                    self.close_connection = True
                    return None
            while pod.fate.until is not None and not pod.fate.until.is_set() and not pod.deleted.wait(0.02):
                pass
            pod.ended = True
            self._chunk(b"")
        return None

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _status(pod: _Pod) -> dict[str, Any]:
    fate = pod.fate
    container: dict[str, Any] = {"name": "base", "image": "", "imageID": "", "ready": False, "restartCount": 0}
    if not fate.starts:
        return {"phase": "Failed", "reason": fate.pod_reason, "message": fate.pod_message}
    if fate.waiting is not None:
        state = {"waiting": dict(zip(("reason", "message"), fate.waiting, strict=True))}
        conditions = [{"type": "PodScheduled", "status": "True"}]
        return {"phase": "Pending", "conditions": conditions, "containerStatuses": [container | {"state": state}]}
    if pod.ended:
        message = json.dumps(fate.message) if isinstance(fate.message, dict) else fate.message
        terminated = {"exitCode": fate.exit_code, "reason": fate.reason, "message": message, "finishedAt": _now()}
        phase = "Succeeded" if fate.exit_code == 0 and fate.pod_reason is None else "Failed"
        statuses = [container | {"state": {"terminated": terminated}}]
        return {"phase": phase, "reason": fate.pod_reason, "message": fate.pod_message, "containerStatuses": statuses}
    if pod.reads < 2:
        return {"phase": "Pending"}
    return {"phase": "Running", "containerStatuses": [container | {"state": {"running": {"startedAt": _now()}}}]}


def _selected(labels: dict[str, str], selector: str) -> bool:
    """`a=b`, `a!=b`, `a` and `!a`, all of them."""
    for term in filter(None, selector.split(",")):
        found = _TERM.fullmatch(term)
        assert found is not None, term
        absent, label, sign, value = found.groups()
        holds = label in labels if sign is None else (labels.get(label) == value) == (sign == "=")
        if holds == bool(absent):
            return False
    return True


def _failure(status: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": message, "reason": ""}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
