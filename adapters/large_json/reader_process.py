"""Process that reads one large JSON body under a memory limit, so that a hostile body cannot exhaust the service.

Standard input has one line of JSON, the request, and then the body. It must stay open until the answer is read: the
process exits when it is closed. Standard output has one line of JSON, the head, then the long lists as JSON texts and
then the arrays as raw float32. `adapters.large_json.reader` starts the process and joins the parts of the answer.
"""

# N rows · C columns
import gc
import json
import os
import resource
import sys
import threading
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, BinaryIO

from adapters.arrays import Float32, TruncatedList
from adapters.errors import LoraplexError, OutOfRange, shorten
from adapters.large_json.parser import read_large
from adapters.strict_json import decode, nested_too_deeply

# Most bytes of JSON in an answer, arrays excluded. The service parses it all at once and without this memory limit.
MAX_JSON_BYTES = 2**24
# Most levels of lists and objects in a value. An answer has up to twice as many, and each takes recursive calls.
MAX_LEVELS = 100
# Encoding of a list: entries in the head, entries in the lines after the head, or a `TruncatedList`.
PLAIN, LINES, LONG = range(3)
_MAX_PLAIN_ENTRIES = 1000
_ENTRIES_PER_LINE = 5000
# Entries that are kept of a list that is cut, which is enough for an error message.
_ENTRIES_KEPT = 100
# Most characters of a string that is not in a long list; more are cut in an error message.
_MAX_TEXT_CHARACTERS = 2**16


_CONTAINERS = {list, dict, TruncatedList}


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
        text = decode(body, what=what)
        del body
        head = writer.head(read_large(text, columns=request["columns"], longest=longest, what=what))
    except LoraplexError as error:
        given = {} if "given" not in error.members() else {"given": error.members()["given"]}
        members = {"detail": error.members()["detail"], "field": error.field, "row": error.row}
        head = {"error": type(error).__name__, "members": members | given | {"expected": error.expected}}
        writer = AnswerWriter(longest=0)
    except MemoryError:
        head, writer = {"out_of_memory": True}, AnswerWriter(longest=0)
    except Exception:
        head, writer = {"failed": traceback.format_exc()}, AnswerWriter(longest=0)
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

    def __init__(self, *, longest: int, what: str = "the body") -> None:
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
        self._check_levels(value, MAX_LEVELS)
        # A list with an entry for each row, such as labels, is as long as the table.
        self._longest = max(self._longest, _max_rows(value))
        encoded = self._encode(value, "")
        self._count_json(len(json.dumps(encoded)))
        return {
            "value": encoded,
            "lines": [len(line) for line in self._lines],
            "arrays": [array.shape for array in self._arrays],
        }

    def write(self, head: dict[str, Any], file: BinaryIO) -> None:
        """Write the head, the lines and the arrays."""
        file.write(json.dumps(head).encode() + b"\n")
        for line in self._lines:
            file.write(line.encode())
        for array in self._arrays:
            file.write(array.data.cast("B"))
        file.flush()

    def _check_levels(self, value: Any, levels: int) -> None:
        """Raise `NotJson` if a value has more levels of lists and objects."""
        entries: Iterable[Any]
        if isinstance(value, TruncatedList):
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
                self._check_levels(entry, levels - 1)

    def _encode(self, value: Any, field: str) -> Any:
        """Return the value with each list replaced by `[encoding, content]`. `field` is its path, for errors."""
        if isinstance(value, dict):
            return {_checked_key(key): self._encode(entry, _path(field, key)) for key, entry in value.items()}
        if isinstance(value, TruncatedList):
            return [LONG, self._encode_table(value)]
        if not isinstance(value, list):
            return _checked_text(value, field) if isinstance(value, str) else value
        if len(value) > self._longest:
            return [LONG, {"length": len(value), "first": [self._cut(entry) for entry in value[:_ENTRIES_KEPT]]}]
        if len(value) <= _MAX_PLAIN_ENTRIES:
            return [PLAIN, [self._encode(entry, field) for entry in value]]
        begin = len(self._lines)
        for at in range(0, len(value), _ENTRIES_PER_LINE):
            line = json.dumps(value[at : at + _ENTRIES_PER_LINE])
            self._count_json(len(line))
            self._lines.append(line)
        return [LINES, [begin, len(self._lines)]]

    def _encode_table(self, value: TruncatedList) -> dict[str, Any]:
        """Return the content of a table: its length, its first row, its faulty rows and the index of its array."""
        table = value.table
        assert table is not None
        encoded: dict[str, Any] = {"length": len(value), "first": [self._cut(value[0])]}
        if table.odd is not None:
            encoded["odd"] = [table.odd[0], self._cut(table.odd[1])]
        if table.bad is not None:
            encoded["bad"] = [*table.bad[:2], self._cut(table.bad[2])]
        if table.numbers_NC is not None:
            encoded["array"] = len(self._arrays)
            self._arrays.append(table.numbers_NC)
        return encoded

    def _cut(self, value: Any) -> Any:
        """Return the start of a value for an error message, encoded as in `_encode`. A list keeps its length."""
        if isinstance(value, str):
            return _cut_text(value)
        if isinstance(value, dict):
            return {_cut_text(key): self._cut(entry) for key, entry in [*value.items()][:_ENTRIES_KEPT]}
        if isinstance(value, list):
            first = [self._cut(entry) for entry in value[:_ENTRIES_KEPT]]
            return [PLAIN, first] if len(value) <= _ENTRIES_KEPT else [LONG, {"length": len(value), "first": first}]
        return value

    def _count_json(self, size: int) -> None:
        """Add to the bytes of JSON; raise `OutOfRange` if there are too many."""
        self._json_bytes += size
        if self._json_bytes > MAX_JSON_BYTES:
            raise OutOfRange(
                f"besides rows of numbers the body has more than {MAX_JSON_BYTES} bytes of JSON",
                field="body",
                expected=f"at most {MAX_JSON_BYTES} bytes of text and labels; a data set may have more",
            )


def _max_rows(value: Any) -> int:
    """Return the rows of the longest table in a value and its nested objects; 0 if there is none."""
    if isinstance(value, TruncatedList):
        return len(value)
    if isinstance(value, dict):
        return max(map(_max_rows, value.values()), default=0)
    return 0


def _cut_text(text: str) -> str:
    return text[:_MAX_TEXT_CHARACTERS]


def _path(field: str, key: str) -> str:
    return f"{field}.{key}" if field else key


def _checked_key(key: str) -> str:
    """Return a key of an object; raise `OutOfRange` if it is too long."""
    if len(key) > _MAX_TEXT_CHARACTERS:
        raise OutOfRange(
            f"a key of an object has {len(key)} characters",
            field=shorten(key),
            expected=f"keys of at most {_MAX_TEXT_CHARACTERS} characters",
        )
    return key


def _checked_text(text: str, field: str) -> str:
    """Return a string; raise `OutOfRange` if it is too long."""
    if len(text) > _MAX_TEXT_CHARACTERS:
        raise OutOfRange(
            f"{shorten(field or 'the body')} has {len(text)} characters",
            field=shorten(field) if field else None,
            given=shorten(text),
            expected=f"at most {_MAX_TEXT_CHARACTERS} characters",
        )
    return text


if __name__ == "__main__":
    main()
