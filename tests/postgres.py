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
# What is lost with the machine is lost with the test. A server that is killed keeps what it acknowledged: the kernel has it by
# then (synchronous_commit, on by default).
SETTINGS = ("fsync=off", "full_page_writes=off", "unix_socket_directories=", "max_connections=200")


class Postgres:
    """A server; `dsn` is `postgresql://user:password@127.0.0.1:port/postgres`."""

    def __init__(self, data: Path, log_path: Path) -> None:
        self._binaries, self._data, self._log_path = _binaries(), data, log_path
        # It refuses to run as root, and must reach its data as the user that Debian's package makes.
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(data, "postgres", "postgres")
        password, (self._port,) = secrets.token_hex(16), unused_ports(1)
        self.dsn = f"postgresql://limaml:{password}@127.0.0.1:{self._port}/postgres"
        self._make(password)

    def start(self) -> None:
        options = [part for setting in SETTINGS for part in ("-c", setting)]
        command = [self._binaries / "postgres", "-D", self._data / "data", "-h", "127.0.0.1", "-p", str(self._port), *options]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._data, **self._as_user)
        wait_for(self._answers, "Postgres' answer", START_DEADLINE_S)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends the connections that are left; SIGQUIT ends all at once, as a crash does: the next start recovers."""
        self._process.send_signal(how)
        self._process.wait(30)

    def _make(self, password: str) -> None:
        password_file = self._data / "password"
        password_file.write_text(password)
        password_file.chmod(0o600)
        if self._as_user:
            shutil.chown(password_file, "postgres", "postgres")
        command = [self._binaries / "initdb", "-D", self._data / "data", "-U", "limaml", "--auth=scram-sha-256"]
        command += [f"--pwfile={password_file}", "--no-sync", "--encoding=UTF8", "--locale=C"]
        subprocess.run(command, check=True, cwd=self._data, stdout=subprocess.DEVNULL, **self._as_user)

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(f"postgres ended with {self._process.returncode}:\n{self._log_path.read_text()[-4000:]}")
        try:
            psycopg2.connect(self.dsn, connect_timeout=5).close()
        except psycopg2.OperationalError:
            return False
        return True


@contextmanager
def running_postgres(folder: Path) -> Iterator[Postgres]:
    """Run a server in the block, its log in `folder`."""
    data = Path(tempfile.mkdtemp(prefix="limaml-postgres-"))
    try:
        server = Postgres(data, folder / "postgres.log")
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(data, ignore_errors=True)


@contextmanager
def postgres_server(folder: Path) -> Iterator[str]:
    """As `running_postgres`; gives its address."""
    with running_postgres(folder) as server:
        yield server.dsn


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
