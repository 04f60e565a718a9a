"""The service as the demo handles it: started, waited for, killed, started again, ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

from demo.problems import DemoFailed

READY_WITHIN_SECONDS = 60.0
END_WITHIN_SECONDS = 35.0
_POLL_SECONDS = 0.1
_PROC = Path("/proc")


class Service:
    """One `loraplex serve` on a free port of this machine, with everything that it writes under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._data_dir = folder / "data"
        self._log = folder / "service.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, with its output in the log; it is not ready yet."""
        script = Path(sys.executable).with_name("loraplex")
        if not script.exists():
            raise DemoFailed(f"There is no {script}: run 'make demo', which installs it.")
        command = [str(script), "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--data-dir", str(self._data_dir)]
        # Settings of the caller's own service would change the demo.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LORAPLEX_")}
        with self._log.open("ab") as log:
            # A session of its own: one signal reaches the whole tree, and only the demo hears Ctrl-C.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_until_ready(self) -> float:
        """Wait for /readyz to say yes; return the seconds that it took."""
        started = time.monotonic()
        with httpx.Client(base_url=self.url, trust_env=False, timeout=2) as client:
            while time.monotonic() - started < READY_WITHIN_SECONDS:
                if self._process is None or self._process.poll() is not None:
                    raise DemoFailed("The service ended before it was ready.")
                with suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == httpx.codes.OK:
                        return time.monotonic() - started
                time.sleep(_POLL_SECONDS)
        raise DemoFailed(f"The service was not ready within {READY_WITHIN_SECONDS:.0f} s.")

    def kill(self) -> int:
        """`kill -9` for the supervisor and all its children at once; return how many processes that were."""
        if self._process is None:
            return 0
        members = _members_of_session(self._process.pid)
        if members:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for member in members:
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        self._process.wait()
        self._process = None
        _wait_until_gone(members)
        return len(members)

    def end(self) -> None:
        """Ask it to end, as an operator would; what has not ended in time is killed."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            code = self._process.wait(END_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"The service had not ended {END_WITHIN_SECONDS:.0f} s after SIGTERM.") from None
        finally:
            left_over = self.kill()
        if code != 0 or left_over:
            raise DemoFailed(f"The service ended with code {code} and left {left_over} processes behind.")

    def log_tail(self, lines: int = 25) -> str:
        """Return the last lines of the service's log, to show after an error."""
        if not self._log.exists():
            return "(nothing was logged)"
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _members_of_session(session: int) -> list[int]:
    """Return the live processes of a session, including children in process groups of their own.

    This needs /proc, which only Linux has; on other systems, the result is the leader alone.
    """
    if not (_PROC / "self" / "stat").exists():
        with suppress(ProcessLookupError):
            os.killpg(session, 0)
            return [session]
        return []
    members = []
    for entry in _PROC.glob("[0-9]*"):
        state, of_session = _state_and_session(int(entry.name))
        if of_session == session and state != "Z":
            members.append(int(entry.name))
    return members


def _wait_until_gone(members: list[int]) -> None:
    """Wait for the end of a killed process, which may hold its port and its locks for a moment."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(_state_and_session(pid)[0] not in "Z" for pid in members):
        time.sleep(0.01)


def _state_and_session(process: int) -> tuple[str, int]:
    """Linux's letter for the state, Z for one that has ended, and the session; ("", 0) where it is gone."""
    try:
        # After the name, which stands in brackets and may itself hold some: state, parent, group, session.
        fields = (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[3])
