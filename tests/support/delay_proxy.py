"""A network with a delay: a process that forwards connections on loopback, and holds back what clients send."""

import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

_CHUNK_BYTES = 2**16


class DelayProxy:
    """Process in front of a port that adds a delay to each round trip. It does not share this process's lock."""

    def __init__(self, target: int, *, seconds: float) -> None:
        command = [sys.executable, "-m", __name__, str(target), str(seconds)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and all connections."""
        self._process.kill()
        self._process.communicate()


def _forward(client: socket.socket, target: int, seconds: float) -> None:
    delayed: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
    with client, suppress(OSError), socket.create_connection(("127.0.0.1", target)) as server:
        for connection in (client, server):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender = threading.Thread(target=_send, args=(delayed, server), daemon=True)
        sender.start()
        threading.Thread(target=_return, args=(server, client), daemon=True).start()
        while chunk := client.recv(_CHUNK_BYTES):
            delayed.put((time.monotonic() + seconds, chunk))
        delayed.put((time.monotonic() + seconds, b""))
        sender.join()


def _send(delayed: "SimpleQueue[tuple[float, bytes]]", server: socket.socket) -> None:
    with suppress(OSError):
        while True:
            due, chunk = delayed.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if not chunk:
                server.shutdown(socket.SHUT_RDWR)
                return
            server.sendall(chunk)


def _return(server: socket.socket, client: socket.socket) -> None:
    with suppress(OSError):
        while chunk := server.recv(_CHUNK_BYTES):
            client.sendall(chunk)
    with suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Forward to the port in the first argument, delayed by the seconds in the second one; print the own port."""
    target, seconds = int(sys.argv[1]), float(sys.argv[2])
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_forward, args=(client, target, seconds), daemon=True).start()


if __name__ == "__main__":
    main()
