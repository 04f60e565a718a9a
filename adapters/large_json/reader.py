"""Reader of one large JSON body in a process with a memory limit, so that a hostile body cannot exhaust the service.

The service calls `read_in_process`, and the process runs `main`. Standard input has one line of JSON, the request, and
then the body. It stays open until the answer is read: the process exits when it is closed. Standard output has one line
of JSON, the head, then the long lists as JSON texts and then the arrays as raw float32.
"""

# N rows · C columns
import gc
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import IO, Any, BinaryIO

import numpy as np

from adapters import errors
from adapters.arrays import Float32, NumberTable, TruncatedList
from adapters.errors import InvalidInput, LoraplexError, OutOfRange, shorten
from adapters.large_json.parser import read_large
from adapters.strict_json import json_errors, nested_too_deeply, whole_number

# Memory limit of the process: a body of 64 MiB takes its text, its arrays, and the Python form of one value.
MEMORY_BYTES = 640 * 2**20
# Most bytes of JSON in an answer, arrays excluded. The service parses it all at once and without this memory limit.
MAX_JSON_BYTES = 2**24
# Most levels of lists and objects in a value. An answer has up to twice as many, and each takes recursive calls.
MAX_LEVELS = 100
_MODULE = "adapters.large_json.reader"
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_MAX_SECONDS = 120.0
_SECONDS_TO_END = 1.0
_ATTEMPTS = 2
# Bytes of what a process wrote to standard error that are logged.
_STDERR_KEPT = 4000
# Encoding of a list: entries in the head, entries in the lines after the head, or a `TruncatedList`.
_PLAIN, _LINES, _LONG = range(3)
_MAX_PLAIN_ENTRIES = 1000
_ENTRIES_PER_LINE = 5000
# Entries that are kept of a list that is cut, which is enough for an error message.
_ENTRIES_KEPT = 100
# Most characters of a string that is not in a long list.
_MAX_TEXT_CHARACTERS = 2**16
_ERROR_MEMBERS = ("detail", "field", "row", "given", "expected")
_CONTAINERS = {list, dict, TruncatedList}

log = logging.getLogger(__name__)


def read_in_process(
    body: bytes | bytearray, *, longest: int, columns: Mapping[str, int] | None = None, what: str = "the body"
) -> object:
    """Return what `parser.read_large` returns for a body; lists of more than `longest` entries are cut.

    `longest` is what a valid list of this call may have; a list may also be as long as the longest table. `columns` is
    as `read_large` takes it. Raises what `read_large` raises, and `InvalidInput` for a body that cannot be read within
    bounds. If another process kills the one that reads (such as the kernel, which is out of memory), it is read once
    more.
    """
    limits = {"longest": longest, "memory_bytes": MEMORY_BYTES, "columns": dict(columns or {})}
    request = json.dumps({"length": len(body), "what": what} | limits).encode()
    for _ in range(_ATTEMPTS):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | _ENVIRONMENT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(_MAX_SECONDS, process.kill)
        timer.start()
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(request + b"\n")
                process.stdin.write(body)
                process.stdin.flush()
            return _receive(process.stdout, what)
        except (EOFError, ValueError):
            _log_end(process)
            # Once the time is up, the timer has killed it.
            if process.returncode >= 0 or not timer.is_alive():
                break
            log.warning("the process that read a JSON body was killed by another one")
        finally:
            timer.cancel()
            process.kill()
            with suppress(BrokenPipeError), process:
                pass  # closes the pipes, and waits
    raise _unreadable_error(what)


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


def _receive(pipe: IO[bytes], what: str) -> object:
    """Return the value in an answer; raise the error in it, and `EOFError` or `ValueError` for half an answer."""
    head: Mapping[str, Any] = json.loads(pipe.readline(), parse_int=whole_number)
    if "error" in head:
        kind: type[LoraplexError] = getattr(errors, head["error"])
        raise kind(**head["members"])
    if "value" not in head:
        if "failed" in head:
            log.error("a JSON body could not be read:\n%s", head["failed"])
        raise _unreadable_error(what)
    lines = [json.loads(pipe.read(length), parse_int=whole_number) for length in head["lines"]]
    return _decode_value(head["value"], lines, [_read_array(pipe, shape) for shape in head["arrays"]])


def _read_array(pipe: IO[bytes], shape: tuple[int, int]) -> Float32:
    numbers_NC: Float32 = np.empty(shape, np.float32)
    if pipe.readinto(numbers_NC.data.cast("B")) < numbers_NC.nbytes:  # type: ignore[attr-defined]  # a BufferedReader
        raise EOFError
    return numbers_NC


def _decode_value(encoded: Any, lines: list[list[Any]], arrays: list[Float32]) -> Any:
    """Return the value that `AnswerWriter` encoded."""
    if isinstance(encoded, dict):
        return {key: _decode_value(value, lines, arrays) for key, value in encoded.items()}
    if not isinstance(encoded, list):
        return encoded
    encoding, content = encoded
    if encoding == _PLAIN:
        return [_decode_value(entry, lines, arrays) for entry in content]
    if encoding == _LINES:
        return [entry for line in lines[content[0] : content[1]] for entry in line]
    first = [_decode_value(entry, lines, arrays) for entry in content["first"]]
    table = NumberTable(numbers_NC=arrays[content["array"]] if "array" in content else None)
    for fault in content.keys() & {"odd", "bad"}:
        setattr(table, fault, tuple(_decode_value(entry, lines, arrays) for entry in content[fault]))
    return TruncatedList(first, content["length"], table)


def main() -> None:
    """Read one request and its body from standard input, and write the answer to standard output."""
    gc.disable()
    request = json.loads(sys.stdin.buffer.readline())
    # Lower the priority: the service's short requests must not wait for a large body.
    os.nice(10)
    # Start the thread before the memory is limited: without memory for its stack, it raises `RuntimeError`.
    body_is_read = threading.Event()
    threading.Thread(target=_exit_on_closed_input, args=(body_is_read,), daemon=True).start()
    _lower_limit(resource.RLIMIT_DATA, request["memory_bytes"])
    _lower_limit(resource.RLIMIT_CORE, 0)
    longest, what = request["longest"], request["what"]
    writer = AnswerWriter(longest=longest, what=what)
    try:
        body = sys.stdin.buffer.read(request["length"])
        body_is_read.set()
        with json_errors(what):
            text = body.decode()
        del body
        head = writer.head(read_large(text, columns=request["columns"], longest=longest, what=what))
    except LoraplexError as error:
        members = error.members()
        kept = {name: members[name] for name in _ERROR_MEMBERS if name in members}
        head = {"error": type(error).__name__, "members": kept}
    except MemoryError:
        head = {"out_of_memory": True}
    except Exception:
        head = {"failed": traceback.format_exc()}
    # If the answer is cut short, the parent process refuses the body.
    with suppress(MemoryError, BrokenPipeError):
        writer.write(head, sys.stdout.buffer)
    # Do not flush the rest of a broken answer.
    os._exit(0)


def _lower_limit(kind: int, most: int) -> None:
    """Limit a resource to `most`, or to the limit of the parent process if that is lower."""
    _, inherited = resource.getrlimit(kind)
    limit = most if inherited == resource.RLIM_INFINITY else min(most, inherited)
    resource.setrlimit(kind, (limit, limit))


def _exit_on_closed_input(body_is_read: threading.Event) -> None:
    """Exit when standard input is closed after the body, which also happens if the parent process dies."""
    body_is_read.wait()
    while os.read(0, 1024):
        pass
    os._exit(0)


class AnswerWriter:
    """Encoder of one value for the parent process.

    Call `head`, then `write`. A list longer than `longest`, and than the longest table, is cut to its first entries.
    `what` names the text in errors.
    """

    def __init__(self, *, longest: int, what: str) -> None:
        self._longest = longest
        self._what = what
        self._lines: list[str] = []
        self._arrays: list[Float32] = []
        self._json_bytes = 0

    def head(self, value: object) -> dict[str, Any]:
        """Encode a value and return the head.

        Raises `NotJson` for more than `MAX_LEVELS` levels, and `OutOfRange` for a string of more than
        `_MAX_TEXT_CHARACTERS` characters and for more than `MAX_JSON_BYTES` without arrays.
        """
        self._measure(value, MAX_LEVELS)
        encoded = self._encode(value, "", self._longest)
        self._count_json(len(json.dumps(encoded)))
        return {
            "value": encoded,
            "lines": [len(line) for line in self._lines],
            "arrays": [array.shape for array in self._arrays],
        }

    def write(self, head: dict[str, Any], file: BinaryIO) -> None:
        """Write the head, and the lines and the arrays of a value."""
        file.write(json.dumps(head).encode() + b"\n")
        if "value" in head:
            file.writelines(line.encode() for line in self._lines)
            file.writelines(array.data.cast("B") for array in self._arrays)
        file.flush()

    def _measure(self, value: Any, levels: int) -> None:
        """Raise `NotJson` if a value has more levels of lists and objects; note the rows of its longest table."""
        entries: Iterable[Any]
        if isinstance(value, TruncatedList):
            # A list with an entry for each row, such as labels, is as long as the table.
            self._longest = max(self._longest, len(value))
            table = value.table
            assert table is not None
            entries = [value[0], *(table.odd or ()), *(table.bad or ())]
        elif isinstance(value, list):
            entries = value
        elif isinstance(value, dict):
            entries = value.values()
        else:
            return
        if not levels:
            raise nested_too_deeply(self._what)
        # Most lists have millions of numbers or strings, and no lists.
        if not _CONTAINERS.isdisjoint(map(type, entries)):
            for entry in entries:
                self._measure(entry, levels - 1)

    def _encode(self, value: Any, field: str, longest: int) -> Any:
        """Return the value with each list replaced by `[encoding, content]`.

        `field` is its path, for errors. Lists of more than `longest` entries are cut.
        """
        if isinstance(value, str):
            return _checked_text(value, field)
        if isinstance(value, dict):
            return {
                _checked_text(key, field): self._encode(entry, f"{field}.{key}" if field else key, longest)
                for key, entry in value.items()
            }
        if isinstance(value, TruncatedList):
            return [_LONG, self._encode_table(value, field)]
        if not isinstance(value, list):
            return value
        if len(value) > longest:
            return [_LONG, {"length": len(value), "first": self._encode_some(value[:_ENTRIES_KEPT], field)}]
        if len(value) <= _MAX_PLAIN_ENTRIES:
            return [_PLAIN, [self._encode(entry, field, longest) for entry in value]]
        begin = len(self._lines)
        for at in range(0, len(value), _ENTRIES_PER_LINE):
            line = json.dumps(value[at : at + _ENTRIES_PER_LINE])
            self._count_json(len(line))
            self._lines.append(line)
        return [_LINES, [begin, len(self._lines)]]

    def _encode_some(self, values: Iterable[Any], field: str) -> list[Any]:
        """Encode values for an error message."""
        return [self._encode(value, field, _ENTRIES_KEPT) for value in values]

    def _encode_table(self, value: TruncatedList, field: str) -> dict[str, Any]:
        """Return the content of a table: its length, its first row, its faulty rows and the index of its array."""
        table = value.table
        assert table is not None
        encoded: dict[str, Any] = {"length": len(value), "first": self._encode_some([value[0]], field)}
        for name, fault in ("odd", table.odd), ("bad", table.bad):
            if fault is not None:
                encoded[name] = self._encode_some(fault, field)
        if table.numbers_NC is not None:
            encoded["array"] = len(self._arrays)
            self._arrays.append(table.numbers_NC)
        return encoded

    def _count_json(self, size: int) -> None:
        """Add to the bytes of JSON; raise `OutOfRange` if there are too many."""
        self._json_bytes += size
        if self._json_bytes > MAX_JSON_BYTES:
            raise OutOfRange(
                f"besides rows of numbers the body has more than {MAX_JSON_BYTES} bytes of JSON",
                field="body",
                expected=f"at most {MAX_JSON_BYTES} bytes of text and labels; a data set may have more",
            )


def _checked_text(text: str, field: str) -> str:
    """Return a string or a key of an object; raise `OutOfRange` if it is too long."""
    if len(text) > _MAX_TEXT_CHARACTERS:
        raise OutOfRange(
            f"a string in {shorten(field or 'the body')} has {len(text)} characters",
            field=shorten(field) if field else None,
            given=shorten(text),
            expected=f"at most {_MAX_TEXT_CHARACTERS} characters",
        )
    return text


if __name__ == "__main__":
    main()
