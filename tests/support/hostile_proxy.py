"""A proxy in front of a server that delays, cuts off, swallows or replaces answers."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_CHUNK_BYTES = 2**16

# Handles one connection, from the client to the server. Both are closed afterwards.
Fault = Callable[[socket.socket, socket.socket], None]


class HostileProxy:
    """Forwards connections on loopback to a port, as long as `fault` is None."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._fault: Fault | None = None
        self._connections: set[socket.socket] = set()
        # Connections that were handled with a fault.
        self.faults = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def failing(self, fault: Fault, *, times: int | None = None) -> Iterator[None]:
        """Handle new connections, or the next `times` of them, with a fault; those that are open are closed."""
        left = [times]

        def handle(client: socket.socket, server: socket.socket) -> None:
            if left[0] is not None:
                left[0] -= 1
                if left[0] <= 0:
                    self._fault = None
            self.faults += 1
            fault(client, server)

        self._fault = handle
        self._disconnect()
        try:
            yield
        finally:
            self._fault = None
            self._disconnect()

    def close(self) -> None:
        """End all connections."""
        self._listener.close()
        self._disconnect()

    def _disconnect(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._connections.add(client)
                threading.Thread(target=self._handle, args=(client, self._fault), daemon=True).start()

    def _handle(self, client: socket.socket, fault: Fault | None) -> None:
        try:
            with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
                (fault or forward)(client, server)
        finally:
            self._connections.discard(client)


def forward(client: socket.socket, server: socket.socket) -> None:
    """Forward everything."""
    requests = threading.Thread(target=_pump, args=(client, server), daemon=True)
    requests.start()
    _pump(server, client)
    with suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)
    requests.join()


def refuse(_client: socket.socket, _server: socket.socket) -> None:
    """Close the connection immediately."""


def stall(client: socket.socket, _server: socket.socket) -> None:
    """Take everything and never answer."""
    while client.recv(_CHUNK_BYTES):
        pass


def swallow_answer(client: socket.socket, server: socket.socket) -> None:
    """Let the server do what it is asked for, and close the connection before the client sees the answer."""
    requests = threading.Thread(target=_pump, args=(client, server), daemon=True)
    requests.start()
    server.recv(_CHUNK_BYTES)
    client.shutdown(socket.SHUT_RDWR)


def cut_after(count: int) -> Fault:
    """Return a fault that closes the connection after a number of bytes of the answers."""

    def cut(client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_pump, args=(client, server), daemon=True).start()
        left = count
        while left and (chunk := server.recv(min(left, _CHUNK_BYTES))):
            client.sendall(chunk)
            left -= len(chunk)
        client.shutdown(socket.SHUT_RDWR)

    return cut


def trickle(seconds: float) -> Fault:
    """Return a fault that waits before each piece of an answer."""

    def slow(client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_pump, args=(client, server), daemon=True).start()
        while chunk := server.recv(4096):
            time.sleep(seconds)
            client.sendall(chunk)

    return slow


def answer(status: str, body: bytes = b"", *headers: str) -> Fault:
    """Return a fault that answers everything with this."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]

    def respond(client: socket.socket, _server: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(_CHUNK_BYTES) or b"\r\n\r\n"
        rest = head.partition(b"\r\n\r\n")[2]
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        left = int(lengths[0]) - len(rest) if lengths else 0
        while left > 0 and (chunk := client.recv(_CHUNK_BYTES)):
            left -= len(chunk)
        client.sendall("\r\n".join(lines).encode() + body)

    return respond


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            target.sendall(chunk)
