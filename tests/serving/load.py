"""Clients of the ranking service at a steady rate, whatever it does.

    python load.py PORT RATE CLIENTS kept|fresh USER,… ITEM,…

Their connections are kept alive, or fresh for each request.

Asks until its standard input is closed or the service takes no more connections, then prints one JSON line a request: user,
when it was due and when its answer was complete (seconds of the monotonic clock), status (0: none), answer, failure.
"""

import http.client
import json
import queue
import socket
import sys
import threading
import time


class Load:
    """Client threads; an open loop."""

    def __init__(self, port, rate_per_s, num_clients, keep, users, items):
        self.port = port
        self.keep = keep
        self.users = users
        self.items = items
        self.step_s = num_clients / rate_per_s
        self.seen = queue.SimpleQueue()
        self.stopping = threading.Event()
        start = time.monotonic()
        self.clients = [
            threading.Thread(target=self._run, args=(number, start + number / rate_per_s)) for number in range(num_clients)
        ]
        for client in self.clients:
            client.start()

    def _run(self, number, due):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        turn = number
        while not self.stopping.wait(max(0.0, due - time.monotonic())):
            seen = self._ask(connection, self.users[turn % len(self.users)], due)
            if seen is None:
                break
            self.seen.put(seen)
            turn, due = turn + 1, due + self.step_s
            if not self.keep:
                connection.close()
        connection.close()

    def _ask(self, connection, user, due):
        """None when the service has ended: it takes no more connections.

        A request on a connection kept alive that is closed before one byte of an answer was never accepted (RFC 9112, 9.3.1:
        the server may close an idle connection at any time): it is sent again on a new connection, which must be refused
        or answered.
        """
        body = json.dumps({"user_id": user, "item_ids": self.items, "context": {"hour": 12}})
        for reused in (connection.sock is not None, False):
            began = False
            try:
                if connection.sock is None:
                    connection.connect()
                    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.request("POST", "/rank", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                began = True
                return (user, due, time.monotonic(), response.status, json.loads(response.read()), "")
            except ConnectionRefusedError:
                return None
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                if not reused or began:
                    return (user, due, time.monotonic(), 0, {}, f"{type(error).__name__}: {error}")
        return None

    def stop(self):
        """All that was seen."""
        self.stopping.set()
        for client in self.clients:
            client.join(30)
        while not self.seen.empty():
            yield self.seen.get()


if __name__ == "__main__":
    port, rate_per_s, num_clients, connections, users, items = sys.argv[1:]
    load = Load(int(port), float(rate_per_s), int(num_clients), connections == "kept", users.split(","), items.split(","))
    sys.stdin.read()
    for seen in load.stop():
        print(json.dumps(seen))
