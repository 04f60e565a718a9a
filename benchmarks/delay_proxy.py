"""A proxy that holds each piece of a connection back: `python -m benchmarks.delay_proxy TARGET_PORT MILLISECONDS`.

Half of the time is added in each direction. It prints its own port, and runs until its standard input ends.
"""

import socket
import sys
import threading
import time
from contextlib import suppress

_CHUNK_BYTES = 2**16


def main() -> None:
    """Forward every connection to the target port on loopback."""
    target, half_seconds = int(sys.argv[1]), float(sys.argv[2]) / 2000
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listener, target, half_seconds), daemon=True).start()
    sys.stdin.read()


def _accept(listener: socket.socket, target: int, half_seconds: float) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", target))
        for source, sink in ((client, server), (server, client)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pump, args=(source, sink, half_seconds), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, half_seconds: float) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            time.sleep(half_seconds)
            sink.sendall(chunk)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
