"""A Postgres server of our own, for tests marked `services`: empty, on a free port of loopback, its user with a password."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from tests.polling import wait_for
from tests.ports import unused_ports

START_DEADLINE_S = 60.0
# What is lost with the machine is lost with the test.
SETTINGS = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "unix_socket_directories=", "max_connections=200")


@contextmanager
def postgres_server(folder: Path) -> Iterator[str]:
    """Run a server in the block, its log in `folder`; gives `postgresql://user:password@127.0.0.1:port/postgres`."""
    binaries, password, (port,) = _binaries(), secrets.token_hex(16), unused_ports(1)
    # It refuses to run as root, and must reach its data as the user that Debian's package makes.
    as_user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    data = Path(tempfile.mkdtemp(prefix="limaml-postgres-"))
    if as_user:
        shutil.chown(data, "postgres", "postgres")
    try:
        _make(binaries, data, password, as_user)
        options = [part for setting in SETTINGS for part in ("-c", setting)]
        command = [binaries / "postgres", "-D", data / "data", "-h", "127.0.0.1", "-p", str(port), *options]
        log_path = folder / "postgres.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=data, **as_user)
        dsn = f"postgresql://limaml:{password}@127.0.0.1:{port}/postgres"
        try:
            wait_for(lambda: _answers(process, dsn, log_path), "Postgres' answer", START_DEADLINE_S)
            yield dsn
        finally:
            process.send_signal(signal.SIGINT)  # ends the connections that are left
            process.wait(30)
    finally:
        shutil.rmtree(data, ignore_errors=True)


def create_database(dsn: str, name: str) -> str:
    """An empty database of the server; returns its address."""
    connection = psycopg2.connect(dsn)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f'CREATE DATABASE "{name}"')
    finally:
        connection.close()
    return f"{dsn.rpartition('/')[0]}/{name}"


def psql(url: str, statement: str) -> str:
    """Run a statement with the server's own client; what it prints, unaligned and without headings."""
    options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "-f", "-"]
    done = subprocess.run([_binaries() / "psql", url, *options], input=statement, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.fail("Postgres must be installed for this test: apt-get install postgresql")
    return found[-1].parent


def _make(binaries: Path, data: Path, password: str, as_user: dict[str, Any]) -> None:
    password_file = data / "password"
    password_file.write_text(password)
    password_file.chmod(0o600)
    if as_user:
        shutil.chown(password_file, "postgres", "postgres")
    command = [binaries / "initdb", "-D", data / "data", "-U", "limaml", "--auth=scram-sha-256", f"--pwfile={password_file}"]
    command += ["--no-sync", "--encoding=UTF8", "--locale=C"]
    subprocess.run(command, check=True, cwd=data, stdout=subprocess.DEVNULL, **as_user)


def _answers(process: "subprocess.Popen[bytes]", dsn: str, log_path: Path) -> bool:
    if process.poll() is not None:
        raise AssertionError(f"postgres ended with {process.returncode}:\n{log_path.read_text()[-4000:]}")
    try:
        psycopg2.connect(dsn, connect_timeout=5).close()
    except psycopg2.OperationalError:
        return False
    return True
