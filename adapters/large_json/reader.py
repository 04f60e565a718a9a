"""Reader of one large JSON body in a process with a memory limit, so that a hostile body cannot exhaust the service.

Two processes run this file. The service calls `read_in_process`, which starts the reader process. The reader process
runs `main`. They exchange, in this order:

1. Request, from the service to the reader's standard input: one line of JSON with the `length` of the body in bytes,
   `what`, `longest`, `columns` and `memory_bytes`. The body follows.
2. Head, from the reader's standard output to the service: one line of JSON, which is one of
   - `{"value": …, "parts": [size, …]}`: the encoded value, and the size of each part that follows;
   - `{"error": class, "members": {…}}`: an error of the body, which the service raises;
   - `{"out_of_memory": true}` or `{"failed": traceback}`: the service refuses the body, and logs the traceback.
3. Parts, also from the reader: up to `_ENTRIES_PER_LINE` entries of a list as JSON, whose size is its number of bytes;
   or an array as raw float32, whose size is its shape.

The service keeps the reader's standard input open until it has the answer. The reader exits when it is closed, so that
it does not outlive the service.

In an encoded value, a list is `[encoding, content]`, an object has encoded members, and other values are as in JSON.
The content of a list is, by encoding:

- `_PLAIN`: the encoded entries.
- `_LINES`: the indices of the parts with the entries.
- `_LONG`: a `TruncatedList` as an object: its `length`, its `first` entries and, for a table, the faults `odd` and
  `bad`, or the index of the part with its `array`.
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
from itertools import chain, repeat
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
# Encoding of a list; the docstring of this module has the content of each.
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


# These functions run in the service, up to `main`. They send the request and the body, receive the head and the parts,
# and decode them.


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
            # A reader that ends early may not have read the whole body. Its answer says why.
            with suppress(BrokenPipeError):
                process.stdin.write(request + b"\n")
                process.stdin.write(body)
                process.stdin.flush()
            return _receive(process.stdout, what)
        except (EOFError, ValueError):
            _log_end(process)
            # A negative status is the signal that killed it. Once the time is up, the timer has done that.
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
    detail = f"{what} cannot be read in {MEMORY_BYTES} bytes of memory and {_MAX_SECONDS:g} seconds"
    return InvalidInput(detail, field="body", expected="JSON with rows of numbers; larger data belongs in a data set")


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
    return _decode_value(head["value"], [_read_part(pipe, size) for size in head["parts"]])


def _read_part(pipe: IO[bytes], size: int | list[int]) -> Any:
    """Return the entries of a list, whose size is its number of bytes, or an array, whose size is its shape."""
    if isinstance(size, int):
        return json.loads(pipe.read(size), parse_int=whole_number)
    numbers_NC: Float32 = np.empty(size, np.float32)
    if pipe.readinto(numbers_NC.data.cast("B")) < numbers_NC.nbytes:  # type: ignore[attr-defined]  # a BufferedReader
        raise EOFError
    return numbers_NC


def _decode_value(encoded: Any, parts: list[Any]) -> Any:
    """Return the value that `AnswerWriter` encoded."""
    if isinstance(encoded, dict):
        return {key: _decode_value(value, parts) for key, value in encoded.items()}
    if not isinstance(encoded, list):
        return encoded
    encoding, content = encoded
    if encoding == _PLAIN:
        return [_decode_value(entry, parts) for entry in content]
    if encoding == _LINES:
        return list(chain.from_iterable(parts[index] for index in content))
    table = NumberTable(parts[content["array"]] if "array" in content else None)
    for fault in content.keys() & {"odd", "bad"}:
        setattr(table, fault, tuple(_decode_value(entry, parts) for entry in content[fault]))
    return TruncatedList([_decode_value(entry, parts) for entry in content["first"]], content["length"], table)


# From here on, everything runs in the reader process. It receives the request and the body, limits its own memory,
# parses the body, and encodes and sends the head and the parts.


def main() -> None:
    """Read one request and its body from standard input, write the answer to standard output, and exit."""
    # The process ends after one body, and a collection would visit millions of objects.
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
    # If the answer is cut short, the service refuses the body.
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
    """Exit when standard input is closed after the body, which also happens if the service dies."""
    body_is_read.wait()
    while os.read(0, 1024):
        pass
    os._exit(0)


class AnswerWriter:
    """Encoder of one value for the service. It collects the parts while `head` encodes the value; `write` sends them.

    A list longer than `longest`, and than the longest table, is cut to its first entries. `what` names the text in
    errors.
    """

    def __init__(self, *, longest: int, what: str) -> None:
        self._longest = longest
        self._what = what
        self._parts: list[bytes | memoryview] = []
        self._sizes: list[int | tuple[int, ...]] = []

    def head(self, value: object) -> dict[str, Any]:
        """Encode a value and return the head.

        Raises `NotJson` for more than `MAX_LEVELS` levels, and `OutOfRange` for a string of more than
        `_MAX_TEXT_CHARACTERS` characters and for more than `MAX_JSON_BYTES` without arrays.
        """
        # A list with an entry for each row, such as labels, is as long as the table.
        longest = max(self._longest, _rows_of_longest_table(value, MAX_LEVELS, self._what))
        encoded = self._encode(value, "", longest)
        line_bytes = sum(size for size in self._sizes if isinstance(size, int))
        if len(json.dumps(encoded)) + line_bytes > MAX_JSON_BYTES:
            expected = f"at most {MAX_JSON_BYTES} bytes of JSON besides rows of numbers; a data set may have more"
            raise OutOfRange(f"the body is too large: expected {expected}", field="body", expected=expected)
        return {"value": encoded, "parts": self._sizes}

    def write(self, head: dict[str, Any], file: BinaryIO) -> None:
        """Write the head, and the parts of a value."""
        file.write(json.dumps(head).encode() + b"\n")
        if "value" in head:
            file.writelines(self._parts)
        file.flush()

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
        batches = (value[at : at + _ENTRIES_PER_LINE] for at in range(0, len(value), _ENTRIES_PER_LINE))
        lines = (json.dumps(batch).encode() for batch in batches)
        return [_LINES, [self._add_part(line, len(line)) for line in lines]]

    def _add_part(self, part: bytes | memoryview, size: int | tuple[int, ...]) -> int:
        """Add a part and return its index."""
        self._parts.append(part)
        self._sizes.append(size)
        return len(self._parts) - 1

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
            encoded["array"] = self._add_part(table.numbers_NC.data.cast("B"), table.numbers_NC.shape)
        return encoded


def _rows_of_longest_table(value: Any, levels: int, what: str) -> int:
    """Return the rows of the longest table in a value, or 0 without one.

    Raises `NotJson` if the value has more than `levels` levels of lists and objects. One pass does both, because lists
    may have millions of entries.
    """
    rows = 0
    entries: Iterable[Any]
    if isinstance(value, TruncatedList):
        table = value.table
        assert table is not None
        rows, entries = len(value), [value[0], *(table.odd or ()), *(table.bad or ())]
    elif isinstance(value, list):
        entries = value
    elif isinstance(value, dict):
        entries = value.values()
    else:
        return 0
    if not levels:
        raise nested_too_deeply(what)
    # Most lists have millions of numbers or strings, and no lists.
    if not _CONTAINERS.isdisjoint(map(type, entries)):
        rows = max(rows, max(map(_rows_of_longest_table, entries, repeat(levels - 1), repeat(what))))
    return rows


def _checked_text(text: str, field: str) -> str:
    """Return a string or a key of an object; raise `OutOfRange` if it is too long."""
    if len(text) > _MAX_TEXT_CHARACTERS:
        detail = f"a string in {shorten(field or 'the body')} has {len(text)} characters"
        expected = f"at most {_MAX_TEXT_CHARACTERS} characters"
        raise OutOfRange(detail, field=shorten(field or "body"), given=shorten(text), expected=expected)
    return text


if __name__ == "__main__":
    main()
