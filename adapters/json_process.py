"""The process that reads one large JSON body, under a limit of memory that ends with the process.

It gets one line of JSON and the body on standard input. Its answer is one line of JSON, then lists as JSON lines, then
arrays as raw float32: `adapters.json_reading` puts them together again.
"""

# N rows · C columns
import gc
import json
import os
import resource
import sys
import threading
import traceback
from typing import Any, BinaryIO

from adapters.errors import LoraplexError, OutOfRange
from adapters.large_json import read_large
from adapters.matrices import Float32, LongList
from adapters.strict_json import decode

MOST_SMALL_BYTES = 2**24
"""JSON that an answer may have besides arrays: whoever gets it parses it at once."""
PLAIN, LINES, LONG = range(3)
"""How a list is told: as it is, as lines that follow, or as a `LongList`."""
_MOST_PLAIN = 1000
_ENTRIES_A_LINE = 5000
_KEPT = 100
"""Entries of a list, and characters of a text in it, that suffice to show it."""
_LONGEST_TEXT = 2**16


def main() -> None:
    """Read one body."""
    gc.disable()
    request = json.loads(sys.stdin.buffer.readline())
    # Whoever waits for an answer goes first.
    os.nice(10)
    for kind, limit in ((resource.RLIMIT_DATA, request["memory_bytes"]), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    writer = Answer(longest=request["longest"])
    try:
        body = sys.stdin.buffer.read(request["length"])
        threading.Thread(target=_end_with_parent, daemon=True).start()
        text = decode(body, what=request["what"])
        del body
        head = writer.head(read_large(text, columns=request["columns"], what=request["what"]))
    except LoraplexError as error:
        given = {} if "given" not in error.members() else {"given": error.members()["given"]}
        about = {"detail": error.members()["detail"], "field": error.field, "row": error.row}
        head = {"error": type(error).__name__, "members": about | given | {"expected": error.expected}}
        writer = Answer(longest=0)
    except MemoryError:
        head, writer = {"out_of_memory": True}, Answer(longest=0)
    except Exception:
        head, writer = {"failed": traceback.format_exc()}, Answer(longest=0)
    writer.write(head, sys.stdout.buffer)


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


class Answer:
    """A value on its way to the process that asked for it."""

    def __init__(self, *, longest: int) -> None:
        self._longest = longest
        self._lines: list[str] = []
        self._arrays: list[Float32] = []
        self._small_bytes = 0

    def head(self, value: object) -> dict[str, Any]:
        """Return the first line; raise `OutOfRange` for a value that is large without its arrays."""
        self._longest = max(self._longest, _longest_table(value))
        told = self._tell(value)
        self._count(len(json.dumps(told)))
        return {
            "value": told,
            "lines": [len(line) for line in self._lines],
            "arrays": [array.shape for array in self._arrays],
        }

    def write(self, head: dict[str, Any], file: BinaryIO) -> None:
        """Write everything."""
        file.write(json.dumps(head).encode() + b"\n")
        for line in self._lines:
            file.write(line.encode())
        for array in self._arrays:
            file.write(array.data.cast("B"))
        file.flush()

    def _tell(self, value: Any) -> Any:
        """Return the value with each list as a pair: how it is told, and what is told."""
        if isinstance(value, dict):
            return {_cut_text(key): self._tell(entry) for key, entry in value.items()}
        if isinstance(value, LongList):
            return [LONG, self._tell_table(value)]
        if not isinstance(value, list):
            return _cut_text(value) if isinstance(value, str) else value
        if len(value) > self._longest:
            return [LONG, {"length": len(value), "first": [self._cut(entry) for entry in value[:_KEPT]]}]
        if len(value) <= _MOST_PLAIN:
            return [PLAIN, [self._tell(entry) for entry in value]]
        begin = len(self._lines)
        for at in range(0, len(value), _ENTRIES_A_LINE):
            line = json.dumps(value[at : at + _ENTRIES_A_LINE])
            self._count(len(line))
            self._lines.append(line)
        return [LINES, [begin, len(self._lines)]]

    def _tell_table(self, value: LongList) -> dict[str, Any]:
        table = value.table
        assert table is not None
        told: dict[str, Any] = {"length": len(value), "first": [self._cut(value[0])]}
        if table.odd is not None:
            told["odd"] = [table.odd[0], self._cut(table.odd[1])]
        if table.bad is not None:
            told["bad"] = [*table.bad[:2], self._cut(table.bad[2])]
        if table.numbers_NC is not None:
            told["array"] = len(self._arrays)
            self._arrays.append(table.numbers_NC)
        return told

    def _cut(self, value: Any) -> Any:
        """Return enough of a value to show it, told as `_tell` does; of a list also its length."""
        if isinstance(value, str):
            return _cut_text(value)
        if isinstance(value, dict):
            return {_cut_text(key): self._cut(entry) for key, entry in [*value.items()][:_KEPT]}
        if isinstance(value, list):
            first = [self._cut(entry) for entry in value[:_KEPT]]
            return [PLAIN, first] if len(value) <= _KEPT else [LONG, {"length": len(value), "first": first}]
        return value

    def _count(self, size: int) -> None:
        self._small_bytes += size
        if self._small_bytes > MOST_SMALL_BYTES:
            raise OutOfRange(
                f"besides rows of numbers the body has more than {MOST_SMALL_BYTES} bytes of JSON",
                field="body",
                expected=f"at most {MOST_SMALL_BYTES} bytes of text and labels; a data set may have more",
            )


def _longest_table(value: Any) -> int:
    if isinstance(value, LongList):
        return len(value)
    if isinstance(value, dict):
        return max(map(_longest_table, value.values()), default=0)
    return 0


def _cut_text(text: str) -> str:
    return text[:_LONGEST_TEXT]


if __name__ == "__main__":
    main()
