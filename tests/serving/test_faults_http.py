"""The real service while the registry or the champion is at fault, too much is asked of it, or a stranger asks."""

import hashlib
import json
import socket
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

NOW = datetime.now(UTC).replace(microsecond=0)
MUCH = [2.0, -1.0, 0.5, 1.5]
ITEMS = ["i1", "i2", "i3"]
TOKEN = "s3cret"
MAX_IN_FLIGHT = 4
TOLERANCE = 1e-6
LOAD_FAILED = "limaml_champion_load_failed"


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("faults"))
    (world.folder / "token").write_text(f"{TOKEN}\n")
    changed = {"token_file": str(world.folder / "token"), "max_in_flight": MAX_IN_FLIGHT}
    world.cfg = world.cfg.model_copy(update={"serving": world.cfg.serving.model_copy(update=changed)})
    assert world.registry.champion() is None
    world.build()
    return world


@pytest.fixture(scope="module")
def server(world, start_server):
    return start_server(world.cfg, world.folder)


@pytest.fixture(scope="module")
def good(world, server):
    """A champion that serves from slot blue."""
    version = world.register(seed=1, slot="blue", complete_through=NOW - timedelta(days=1))
    world.publish("blue", version, {"much": MUCH}, as_of=NOW - timedelta(days=1))
    world.registry.set_champion(version)
    server.wait_until("/readyz", 200)
    server.client.headers["Authorization"] = f"Bearer {TOKEN}"
    return version


def scores(answer):
    return {entry["item_id"]: entry["score"] for entry in answer["items"]}


def serves(world, server, version):
    """It answers, as it always did."""
    answer = server.ranked("much", ITEMS)
    assert answer["model_version"] == version
    assert scores(answer) == pytest.approx(world.expected(version, "much", ITEMS, MUCH), abs=TOLERANCE)


def metric_when(server, condition, name, wait_until, **labels):
    return wait_until(lambda: condition(server.metric(name, **labels)), f"{name} as expected")


# -- the registry -----------------------------------------------------------------------------------------------------


def polled_again(server, wait_until):
    before = datetime.now(UTC).timestamp()
    metric_when(server, lambda at: at > before, "limaml_registry_poll_timestamp_seconds", wait_until)


@pytest.mark.fault(
    "the registry's database overwritten with garbage while serving",
    after="scores are as before throughout; restored, it is followed again",
)
def test_a_registry_full_of_garbage_is_not_missed_and_found_again(world, server, good, wait_until):
    path = Path(world.cfg.registry.tracking_uri.removeprefix("sqlite:///"))
    kept = path.read_bytes()
    path.write_bytes(b"this is no database " * (len(kept) // 20))
    try:
        server.wait_for_log("champion_poll_failed")
        serves(world, server, good)
        assert server.client.get("/readyz").status_code == 200
        assert server.metric(LOAD_FAILED) == 0.0, "no champion was seen that could not be loaded"
    finally:
        path.write_bytes(kept)
    polled_again(server, wait_until)
    serves(world, server, good)


@pytest.mark.fault("a registry that hangs while serving", after="requests are answered as before; then it is followed again")
def test_a_registry_that_hangs_is_not_waited_for(world, server, good, wait_until):
    connection = sqlite3.connect(world.cfg.registry.tracking_uri.removeprefix("sqlite:///"), isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        seen = server.metric("limaml_registry_poll_timestamp_seconds")
        for _ in range(50):
            serves(world, server, good)
        assert server.metric("limaml_registry_poll_timestamp_seconds") <= seen + 1.0
    finally:
        connection.execute("ROLLBACK")
        connection.close()
    polled_again(server, wait_until)


# -- the champion -----------------------------------------------------------------------------------------------------


def rewrite(bundle, name, data):
    """Replace a file and its checksum, as somebody who made a wrong bundle would have."""
    (bundle / name).write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(data).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def change_tensor(bundle, change):
    tensors = load((bundle / "refit.safetensors").read_bytes())
    name = "global_block.mlp.layers.0.weight"
    rewrite(bundle, "refit.safetensors", save(tensors | {name: change(tensors[name])}))


def missing_file(bundle):
    (bundle / "refit.safetensors").unlink()


def wrong_width(bundle):
    change_tensor(bundle, lambda weight: weight[:, :-1].contiguous())


def nan_weights(bundle):
    change_tensor(bundle, lambda weight: torch.full_like(weight, float("nan")))


def flipped_byte(bundle):
    data = bytearray((bundle / "refit.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "refit.safetensors").write_bytes(data)


def newer_format(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_file, "refit.safetensors, which is missing"),
        (flipped_byte, "must have its manifest's SHA-256"),
        (wrong_width, "must have shape"),
        (nan_weights, "must be finite"),
        (newer_format, "format_version must be"),
    ],
)
@pytest.mark.fault(
    "a bundle with a flipped byte, a lost file, wrong or non-finite weights becomes the champion",
    after="the version before it serves on, with the same scores",
)
def test_a_champion_that_cannot_be_loaded_leaves_the_old_one_serving(world, server, good, wait_until, damage, message):
    broken = world.register(seed=9, slot="green", complete_through=NOW)
    run = world.registry.get(broken).run_id
    [manifest] = (world.folder / "artifacts").glob(f"**/{run}/**/manifest.json")
    damage(manifest.parent)
    world.registry.set_champion(broken)
    try:
        metric_when(server, lambda value: value == 1.0, LOAD_FAILED, wait_until)
        server.wait_for_log("champion_load_failed", message, f'"version": "{broken}"')
        polled_again(server, wait_until)
        polled_again(server, wait_until)
        serves(world, server, good)
        lines = [line for line in server.log_path.read_text().splitlines() if f'"version": "{broken}"' in line]
        assert len(lines) == 1, "a cause is logged once, however often it is tried"
    finally:
        world.registry.set_champion(good)
    metric_when(server, lambda value: value == 0.0, LOAD_FAILED, wait_until)
    serves(world, server, good)


# -- too much ---------------------------------------------------------------------------------------------------------


def half_a_request(server):
    """A connection whose request has begun and whose body is still to come."""
    body = json.dumps({"user_id": "much", "item_ids": ITEMS, "context": {"hour": 12}}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST /rank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[:10])
    return connection, body[10:]


def test_more_requests_than_it_can_hold_are_refused_at_once(world, server, good, wait_until):
    before = server.metric("limaml_rank_requests_total", code="503")
    held = []

    def is_full():
        """No room is left for a whole request; until then one more half is sent, which may itself come while one is served."""
        if server.rank().status_code == 503:
            return True
        held.append(half_a_request(server))
        return False

    wait_until(is_full, "a refusal")
    with ThreadPoolExecutor(8) as pool:
        refused = list(pool.map(lambda _: server.rank(), range(40)))
    for response in refused:
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert response.json()["error"]["rule"] == f"works on at most {MAX_IN_FLIGHT} requests at a time"
    assert server.metric("limaml_rank_requests_total", code="503") > before + 40
    assert server.client.get("/readyz").status_code == 200
    answers = []
    for connection, rest in held:
        with connection:
            connection.sendall(rest)
            answers.append(connection.recv(12))
    assert answers.count(b"HTTP/1.1 200") == MAX_IN_FLIGHT
    assert set(answers) <= {b"HTTP/1.1 200", b"HTTP/1.1 503"}
    serves(world, server, good)


def test_ten_megabytes_are_refused_without_being_kept(world, server, good):
    import psutil

    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    before = sum(process.memory_info().rss for process in processes)

    def chunks():
        for _ in range(160):
            yield b" " * 65536

    for content in (b" " * 10_000_000, chunks()):
        response = server.client.post("/rank", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["rule"] == "must be at most 1048576 bytes"
    assert sum(process.memory_info().rss for process in processes) - before < 8_000_000
    serves(world, server, good)


# -- strangers --------------------------------------------------------------------------------------------------------


def test_a_stranger_is_refused_and_counted(server, good):
    before = server.metric("limaml_rank_requests_total", code="401")
    response = server.client.post("/rank", json={}, headers={"Authorization": "Bearer guess"})
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert response.json()["error"]["field"] == "Authorization"
    assert server.metric("limaml_rank_requests_total", code="401") == before + 1
