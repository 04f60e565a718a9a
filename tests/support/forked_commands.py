"""The command `loraplex` of shells that tests run, without the seconds of imports of each call.

The program on the path passes its arguments, environment and streams to the process of the tests, which has the command
forked (see `fork_server`), and ends as it has ended.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.fork_server import ForkedPopen

_MESSAGE_BYTES = 2**20
_LORAPLEX = Path(sys.executable).with_name("loraplex")
_SCRIPT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as tests:
    tests.connect({address!r})
    call = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(tests, [json.dumps(call).encode()], [0, 1, 2])
    sys.exit(int(tests.recv(16) or 1))
"""


def copy_environment(folder: Path) -> Path:
    """Make a virtual environment like that of this process, without `loraplex`; return its folder of programs."""
    bin_folder = Path(sys.executable).parent
    folder.mkdir()
    programs = folder / "bin"
    programs.mkdir()
    for entry in (*bin_folder.parent.iterdir(), *bin_folder.iterdir()):
        copy = folder / entry.relative_to(bin_folder.parent)
        if entry not in (bin_folder, _LORAPLEX):
            copy.symlink_to(entry)
    activate = programs / "activate"
    if activate.exists():
        text = activate.read_text().replace(str(bin_folder.parent), str(folder))
        activate.unlink()
        activate.write_text(text)
    return programs


@contextmanager
def forked_commands(folder: Path) -> Iterator[Path]:
    """Make `loraplex` in a folder, which is to be on the path; end what has not ended when the block ends."""
    program = folder / "loraplex"
    processes: list[subprocess.Popen[bytes]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        address = f"\0loraplex-tests-{os.getpid()}-{id(listener)}"
        listener.bind(address)
        listener.listen()
        program.write_text(_SCRIPT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        threading.Thread(target=_accept, args=(listener, processes), daemon=True).start()
        try:
            yield folder
        finally:
            # `accept` returns.
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                process.wait(60)


def _accept(listener: socket.socket, processes: "list[subprocess.Popen[bytes]]") -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_run, args=(connection, processes), daemon=True).start()


def _run(connection: socket.socket, processes: "list[subprocess.Popen[bytes]]") -> None:
    with connection:
        message, fds, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
        call = json.loads(message)
        stdin, stdout, stderr = fds
        process = ForkedPopen(
            [_LORAPLEX, *call["arguments"]],
            cwd=call["folder"],
            env=call["environment"],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        processes.append(process)
        for fd in fds:
            os.close(fd)
        status = process.wait()
        # As a shell says that a signal has ended it.
        with suppress(OSError):
            connection.send(str(status if status >= 0 else 128 - status).encode())
