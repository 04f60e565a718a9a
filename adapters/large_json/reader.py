"""Start of the process that reads a large JSON body, and decoding of its answer."""

# N rows · C columns
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

import numpy as np

from adapters import errors
from adapters.arrays import Float32, NumberTable, TruncatedList
from adapters.errors import InvalidInput
from adapters.large_json.reader_process import LINES, PLAIN
from adapters.strict_json import whole_number

# Memory limit of the process: a body of 64 MiB takes its text, its arrays, and the Python form of one value.
MEMORY_BYTES = 640 * 2**20
_MODULE = "adapters.large_json.reader_process"
_MAX_SECONDS = 120.0
_CHUNK_BYTES = 2**20
# Bytes of what a process wrote to standard error that are logged.
_STDERR_KEPT = 4000
_SECONDS_TO_END = 1.0
_ATTEMPTS = 2
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

log = logging.getLogger(__name__)


class _KilledError(Exception):
    """The reading process was killed by another process."""


class _UnreadableError(EOFError):
    """The process answered that the body cannot be read."""


def read_in_process(
    body: bytes | bytearray, *, longest: int, columns: Mapping[str, int] | None = None, what: str = "the body"
) -> object:
    """Return what `parser.read_large` returns for a body; lists of more than `longest` entries are cut.

    `longest` is what a valid list of this call may have; a list may also be as long as the longest table. `columns` is
    as `read_large` takes it. Raises what `read_large` raises, and `InvalidInput` for a body that cannot be read within
    bounds. If another process kills the one that reads (such as the kernel, which is out of memory), it is read once
    more.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _read(body, longest=longest, columns=columns, what=what)
        except _KilledError:
            log.warning("the process that read a JSON body was killed by another one")
    raise _unreadable_error(what)


def _read(body: bytes | bytearray, *, longest: int, columns: Mapping[str, int] | None, what: str) -> object:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | _ENVIRONMENT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    timer = threading.Timer(_MAX_SECONDS, process.kill)
    timer.start()
    began = time.monotonic()
    try:
        limits = {"longest": longest, "memory_bytes": MEMORY_BYTES, "columns": dict(columns or {})}
        request = {"length": len(body), "what": what} | limits
        with suppress(BrokenPipeError):
            _send(process.stdin, json.dumps(request).encode() + b"\n", body)
        return _receive(process.stdout)
    except (EOFError, ValueError) as error:
        if not isinstance(error, _UnreadableError):
            _log_end(process)
            if process.returncode < 0 and time.monotonic() - began < _MAX_SECONDS:
                raise _KilledError from None
        raise _unreadable_error(what) from None
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(BrokenPipeError):
                pipe.close()


def _unreadable_error(what: str) -> InvalidInput:
    return InvalidInput(
        f"{what} cannot be read in {MEMORY_BYTES} bytes of memory and {_MAX_SECONDS:g} seconds",
        field="body",
        expected="JSON with rows of numbers; larger data belongs in a data set",
    )


def _log_end(process: "subprocess.Popen[bytes]") -> None:
    """Log how a process ended that gave no complete answer. With status 0 it ran out of memory, which is not logged."""
    assert process.stderr is not None
    with suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    process.kill()
    status = process.wait()
    if status != 0:
        # A pipe holds 64 KiB. A process that writes more waits, and is killed.
        stderr = process.stderr.read()[-_STDERR_KEPT:].decode(errors="replace")
        log.error("a process that read a JSON body ended with status %d:\n%s", status, stderr)


def _send(pipe: IO[bytes], head: bytes, body: bytes | bytearray) -> None:
    pipe.write(head)
    with memoryview(body) as view:
        for begin in range(0, len(view), _CHUNK_BYTES):
            pipe.write(view[begin : begin + _CHUNK_BYTES])
    pipe.flush()


def _receive(pipe: IO[bytes]) -> object:
    """Return the value in an answer; raise the error in it, and `EOFError` or `ValueError` for half an answer."""
    head: Mapping[str, Any] = json.loads(pipe.readline(), parse_int=whole_number)
    if "error" in head:
        kind: type[errors.LoraplexError] = getattr(errors, head["error"])
        raise kind(**head["members"])
    if "value" not in head:
        if "failed" in head:
            log.error("a JSON body could not be read:\n%s", head["failed"])
        raise _UnreadableError
    lines = [json.loads(_read_exactly(pipe, length), parse_int=whole_number) for length in head["lines"]]
    arrays = [_read_array(pipe, shape) for shape in head["arrays"]]
    return _decode_value(head["value"], lines, arrays)


def _read_exactly(pipe: IO[bytes], length: int) -> bytes:
    content = pipe.read(length)
    if len(content) < length:
        raise EOFError
    return content


def _read_array(pipe: IO[bytes], shape: Sequence[int]) -> Float32:
    numbers_NC: Float32 = np.empty(shape, np.float32)
    view = numbers_NC.data.cast("B")
    while view:
        count = pipe.readinto(view[:_CHUNK_BYTES])  # type: ignore[attr-defined]  # a BufferedReader
        if not count:
            raise EOFError
        view = view[count:]
    return numbers_NC


def _decode_value(encoded: Any, lines: list[list[Any]], arrays: list[Float32]) -> Any:
    """Return the value that `reader_process.AnswerWriter` encoded."""
    if isinstance(encoded, dict):
        return {key: _decode_value(value, lines, arrays) for key, value in encoded.items()}
    if not isinstance(encoded, list):
        return encoded
    encoding, content = encoded
    if encoding == PLAIN:
        return [_decode_value(entry, lines, arrays) for entry in content]
    if encoding == LINES:
        return [entry for line in lines[content[0] : content[1]] for entry in line]
    first = [_decode_value(entry, lines, arrays) for entry in content["first"]]
    table = NumberTable(numbers_NC=arrays[content["array"]] if "array" in content else None)
    if "odd" in content:
        table.odd = (content["odd"][0], _decode_value(content["odd"][1], lines, arrays))
    if "bad" in content:
        row, column, number = content["bad"]
        table.bad = (row, column, _decode_value(number, lines, arrays))
    return TruncatedList(first, content["length"], table)
