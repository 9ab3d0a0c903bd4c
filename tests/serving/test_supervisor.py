"""What the kernel has accepted and no worker yet, when the service is told to end."""

import socket
import threading
import time

import pytest

from serving import supervisor

ANSWER = b"answered"


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_connection_that_waits_is_answered_and_a_later_one_refused(listening, monkeypatch):
    monkeypatch.setattr(supervisor, "_WAIT_S", 60.0)
    address = listening.getsockname()
    with socket.create_connection(address, timeout=10) as waiting:
        refusing = threading.Thread(target=supervisor.refuse, args=(listening,))
        refusing.start()
        time.sleep(0.2)
        assert refusing.is_alive()
        accepted, _ = listening.accept()
        with accepted:
            refusing.join(30)
            accepted.sendall(ANSWER)
            assert waiting.recv(len(ANSWER)) == ANSWER
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)


def test_workers_that_accept_nothing_do_not_keep_it(listening, monkeypatch):
    monkeypatch.setattr(supervisor, "_WAIT_S", 0.05)
    with socket.create_connection(listening.getsockname(), timeout=10) as waiting:
        supervisor.refuse(listening)
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)
