"""A real PostgreSQL 15 server of Debian's package, for as long as a test needs it."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from tests.polling import wait_for

BIN = Path("/usr/lib/postgresql/15/bin")
INSTALL = "apt-get install postgresql"
STOP_DEADLINE_S = 30.0


@contextlib.contextmanager
def postgres_server(folder):
    """The URL of an empty database `shop` on a free loopback port, user and password in it; the server's log is in `folder`.

    The server refuses to run as root, and its own user cannot enter root's temporary folders: then its data lies beside them.
    """
    if not (BIN / "postgres").exists():
        raise FileNotFoundError(f"{BIN / 'postgres'} must be there, got nothing; install it: {INSTALL}")
    account, data = _account_and_data(Path(folder))
    password = secrets.token_hex(12)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, data, ignore_errors=True)
        log = stack.enter_context((Path(folder) / "postgres.log").open("ab"))
        # No lock, message catalogue or collation of the machine: the same server everywhere.
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": str(data)}
        started = {"cwd": "/", "stdout": log, "stderr": log, "env": environment, **account}
        words = data / "password"
        words.write_text(password)
        if account:
            os.chown(words, account["user"], account["group"])
        cluster = data / "cluster"
        subprocess.run(
            [
                BIN / "initdb",
                "--pgdata",
                cluster,
                "--username=limaml",
                f"--pwfile={words}",
                "--auth=scram-sha-256",
                "--no-sync",
            ],
            check=True,
            **started,
        )
        port = _unused_port()
        options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
        server = subprocess.Popen(
            [BIN / "postgres", "-D", cluster, *(part for name, value in options.items() for part in ("-c", f"{name}={value}"))],
            **started,
        )
        stack.callback(_stop, server)
        url = f"postgresql://limaml:{password}@127.0.0.1:{port}/"
        wait_for(lambda: _answers(server, url), f"a PostgreSQL server (see {log.name})")
        psql(url + "postgres", "CREATE DATABASE shop")
        yield url + "shop"


def psql(url, statement):
    """Run a statement with the server's own client; what it prints, unaligned and without headings."""
    command = [BIN / "psql", url, "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "-f", "-"]
    done = subprocess.run(command, input=statement, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _account_and_data(folder):
    if os.getuid():
        return {}, Path(tempfile.mkdtemp(prefix="postgres-", dir=folder))
    account = pwd.getpwnam("postgres")
    data = Path(tempfile.mkdtemp(prefix="limaml-postgres-", dir="/tmp"))
    os.chown(data, account.pw_uid, account.pw_gid)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}, data


def _unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(server, url):
    assert server.poll() is None, f"PostgreSQL ended with {server.returncode}"
    return subprocess.run([BIN / "pg_isready", "--quiet", "-d", url + "postgres"]).returncode == 0


def _stop(server):
    server.send_signal(signal.SIGINT)  # Its fast shutdown: clients are cut off.
    try:
        server.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
