"""Servers that tests marked `services` and `production` start on loopback: Redis in three forms, S3, a Ray cluster.

Each is a context manager, with its files in a folder of its own; a program that is not installed fails the test.
"""

import ipaddress
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from limaml.io.ray_compat import start_limits
from limaml.local import processes
from tests.polling import wait_for
from tests.ports import unused_ports

ROOT = Path(__file__).parents[1]
START_DEADLINE_S = 60.0
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""The environment in which it lets a client in; it takes any key, but a client wants some."""
S3_PYTHON = ROOT / "tests" / ".venv" / "bin" / "python"


@contextmanager
def _running(command: Sequence[object], log_path: Path, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """A process for the time of the block; a failure in it shows the end of the process's log."""
    with log_path.open("ab") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, env=environment)
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}\nthe end of {log_path}:\n{processes.tail(log_path, 40)}") from None
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- Redis ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Redis:
    """A server with TLS and a password. `connection` is what `feast.online_connection` holds; the password is not in it."""

    connection: str
    password: str
    client: "redis.Redis[bytes]"


def _redis_program() -> str:
    program = shutil.which("redis-server")
    if program is None:
        pytest.fail("redis-server must be installed for this test: apt-get install redis-server")
    return program


@contextmanager
def redis_with_tls(folder: Path) -> Iterator[Redis]:
    """Nothing but TLS is listened for; the certificate is signed by an authority of the test's own."""
    (port,), password = unused_ports(1), secrets.token_urlsafe(24)
    authority, certificate, key = certificates(folder)
    lines = [
        *(f"port 0\ntls-port {port}\nbind 127.0.0.1\ndir {folder}\nsave ''\nappendonly no\nrequirepass {password}".split("\n")),
        *(f"tls-cert-file {certificate}\ntls-key-file {key}\ntls-ca-cert-file {authority}\ntls-auth-clients no".split("\n")),
    ]
    settings = folder / "redis.conf"
    settings.write_text("\n".join(lines).replace("''", '""') + "\n")
    client = redis.Redis("127.0.0.1", port, password=password, ssl=True, ssl_ca_certs=str(authority))
    with _running([_redis_program(), settings], folder / "redis.log"), client:
        wait_for(lambda: _answers(client), "Redis' PONG", START_DEADLINE_S)
        yield Redis(f"127.0.0.1:{port},ssl=true,ssl_ca_certs={authority}", password, client)


@contextmanager
def redis_cluster(folder: Path) -> Iterator[str]:
    """Three nodes, a third of the slots each; gives `host:port,host:port,host:port`."""
    ports = unused_ports(3)
    # The nodes talk to one another on a second port, by default the first one and 10,000.
    buses = unused_ports(3)
    with ExitStack() as nodes:
        for port, bus in zip(ports, buses, strict=True):
            place = folder / str(port)
            place.mkdir()
            command = [_redis_program(), "--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", place]
            command += ["--cluster-enabled", "yes", "--cluster-port", bus]
            nodes.enter_context(_running(command, place / "redis.log"))
            node = redis.Redis("127.0.0.1", port)
            wait_for(lambda node=node: _answers(node), "a node's PONG", START_DEADLINE_S)
        addresses = [f"127.0.0.1:{port}" for port in ports]
        create = ["redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", "0", "--cluster-yes"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        wait_for(lambda: all(_is_whole(port) for port in ports), "the cluster", START_DEADLINE_S)
        yield ",".join(addresses)


@contextmanager
def redis_sentinel(folder: Path, master_address: str, name: str = "mymaster") -> Iterator[str]:
    """A sentinel that watches the server at `master_address`; gives the sentinel's own address."""
    (port,) = unused_ports(1)
    host, master_port = master_address.split(":")
    settings = folder / "sentinel.conf"
    settings.write_text(f"port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor {name} {host} {master_port} 1\n")
    client = redis.Redis("127.0.0.1", port)
    with _running([_redis_program(), settings, "--sentinel"], folder / "sentinel.log"):
        wait_for(lambda: _answers(client), "the sentinel's PONG", START_DEADLINE_S)
        yield f"127.0.0.1:{port}"


def _answers(client: "redis.Redis[bytes]") -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _is_whole(port: int) -> bool:
    with redis.Redis("127.0.0.1", port) as node:
        return str(node.cluster("info")["cluster_state"]) == "ok"


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Files of a new authority's certificate, of a certificate for 127.0.0.1 that it signed, and of that one's key."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name, name = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in ("limaml tests", "127.0.0.1")
    )
    now = datetime.now(UTC)

    def signed(subject: x509.Name, public_key: ec.EllipticCurvePublicKey, extensions: Sequence[x509.ExtensionType]) -> bytes:
        builder = x509.CertificateBuilder().issuer_name(authority_name).subject_name(subject).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    files = (folder / "authority.pem", folder / "server.pem", folder / "server.key")
    files[0].write_bytes(signed(authority_name, authority_key.public_key(), [x509.BasicConstraints(True, None)]))
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    files[1].write_bytes(signed(name, key.public_key(), [loopback]))
    files[2].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


# -- S3 -------------------------------------------------------------------------------------------------------------------


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """An empty S3 server in memory; gives `host:port`."""
    if not S3_PYTHON.exists():
        pytest.fail("the S3 server must be installed for this test: make tests/.venv/installed")
    (port,) = unused_ports(1)
    address = f"127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"http://{address}/", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    with _running([S3_PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], folder / "s3.log"):
        wait_for(answers, "the S3 server's answer", START_DEADLINE_S)
        yield address


def create_bucket(address: str, name: str) -> str:
    """An empty bucket; gives the options of its URLs, which begin with `?`."""
    httpx.put(f"http://{address}/{name}", trust_env=False).raise_for_status()
    return f"?endpoint_override={address}&scheme=http&region=us-east-1"


# -- Ray ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RayCluster:
    """A head without processors and nodes with some, as processes of this machine."""

    address: str
    client_address: str
    token_file: Path
    nodes: tuple[processes.Recorded, ...]
    """The head first."""


@contextmanager
def ray_cluster(
    folder: Path, *, num_nodes: int = 2, cpus: int = 2, environment: Mapping[str, str] | None = None
) -> Iterator[RayCluster]:
    """A head and `num_nodes` nodes that have this code, ask for a token, and have `environment`."""
    mark, token_file = secrets.token_hex(8), folder / "ray.token"
    token_file.write_text(secrets.token_hex(32))
    token_file.chmod(0o600)
    # A unix socket's path is short; the folders of a test are not.
    home = Path(tempfile.mkdtemp(prefix="limaml-ray-"))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables = {
        **inherited,
        **start_limits(300),
        "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120",  # 30 s for the process that serves one `ray://` connection
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "SPT_NOENV": "1",  # setproctitle writes its titles over the environment otherwise, and the mark is lost
        processes.MARKER: mark,
        **(environment or {}),
    }
    port, client_port, *agents = unused_ports(2 + 1 + num_nodes)
    # Ray takes 127.0.0.1 for a mistake and the machine's address instead; each node has a loopback address of its own.
    address = f"127.0.0.2:{port}"
    shared = ["--min-worker-port=0", "--max-worker-port=0", "--block", "--disable-usage-stats"]
    head = ["--head", f"--port={port}", f"--ray-client-server-port={client_port}", "--num-cpus=0", f"--temp-dir={home}"]
    head += ["--include-dashboard=false"]
    started: list[processes.Recorded] = []
    try:
        for number, agent in enumerate(agents):
            own = [f"--address={address}", f"--num-cpus={cpus}"] if number else head
            own = [*own, f"--node-ip-address=127.0.0.{number + 2}"]
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *own, *shared]
            command += [f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={128 * 1024 * 1024}"]
            log = folder / f"ray-{number}.log"
            started.append(processes.start(f"ray-{number}", command, environment=variables, log=log))
            # One after another: nodes that start at once choose the same name for their sockets.
            wait_for(lambda: _ray_started(started[-1]), "Ray's node", 300.0)
        yield RayCluster(address, f"ray://127.0.0.2:{client_port}", token_file, tuple(started))
    finally:
        processes.end(started, mark)
        shutil.rmtree(home, ignore_errors=True)


def _ray_started(node: processes.Recorded) -> bool:
    log = Path(node.log).read_text(errors="replace")
    if not processes.is_alive(node):
        raise AssertionError(f"{node.name} ended:\n{log[-4000:]}")
    return "Ray runtime started" in log
