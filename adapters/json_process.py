"""Process that reads one large JSON body under a memory limit, so that a hostile body cannot exhaust the service.

Standard input has one line of JSON, the request, and then the body. It must stay open until the answer is read: the
process exits when it is closed. Standard output has one line of JSON, the head, then the long lists as JSON texts and
then the arrays as raw float32. `adapters.json_reading` starts the process and joins the parts of the answer.
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
"""Most bytes of JSON in an answer, arrays excluded. The service parses it all at once and without this memory limit."""
PLAIN, LINES, LONG = range(3)
"""Encoding of a list: entries in the head, entries in the lines after the head, or a `LongList`."""
_MOST_PLAIN = 1000
_ENTRIES_PER_LINE = 5000
_ENTRIES_KEPT = 100
"""Entries that are kept of a list that is cut, which is enough for an error message."""
_LONGEST_TEXT = 2**16
"""Characters that are kept of a string."""


def main() -> None:
    """Read one request and its body from standard input, and write the answer to standard output."""
    gc.disable()
    request = json.loads(sys.stdin.buffer.readline())
    # Lower the priority: the service's short requests must not wait for a large body.
    os.nice(10)
    for kind, limit in ((resource.RLIMIT_DATA, request["memory_bytes"]), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    writer = Answer(longest=request["longest"])
    try:
        body = sys.stdin.buffer.read(request["length"])
        threading.Thread(target=_exit_on_closed_input, daemon=True).start()
        text = decode(body, what=request["what"])
        del body
        head = writer.head(read_large(text, columns=request["columns"], what=request["what"]))
    except LoraplexError as error:
        given = {} if "given" not in error.members() else {"given": error.members()["given"]}
        members = {"detail": error.members()["detail"], "field": error.field, "row": error.row}
        head = {"error": type(error).__name__, "members": members | given | {"expected": error.expected}}
        writer = Answer(longest=0)
    except MemoryError:
        head, writer = {"out_of_memory": True}, Answer(longest=0)
    except Exception:
        head, writer = {"failed": traceback.format_exc()}, Answer(longest=0)
    writer.write(head, sys.stdout.buffer)


def _exit_on_closed_input() -> None:
    """Exit when standard input is closed, which also happens if the parent process dies."""
    while os.read(0, 1024):
        pass
    os._exit(0)


class Answer:
    """Encoder of one value for the parent process.

    Call `head`, then `write`. A list longer than `longest`, and than the longest table, is cut to its first entries.
    """

    def __init__(self, *, longest: int) -> None:
        self._longest = longest
        self._lines: list[str] = []
        self._arrays: list[Float32] = []
        self._json_bytes = 0

    def head(self, value: object) -> dict[str, Any]:
        """Encode a value and return the head; raise `OutOfRange` for more than `MOST_SMALL_BYTES` without arrays."""
        # A list with an entry for each row, such as labels, is as long as the table.
        self._longest = max(self._longest, _most_rows(value))
        encoded = self._encode(value)
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

    def _encode(self, value: Any) -> Any:
        """Return the value with each list replaced by `[encoding, content]`, and with strings cut."""
        if isinstance(value, dict):
            return {_cut_text(key): self._encode(entry) for key, entry in value.items()}
        if isinstance(value, LongList):
            return [LONG, self._encode_table(value)]
        if not isinstance(value, list):
            return _cut_text(value) if isinstance(value, str) else value
        if len(value) > self._longest:
            return [LONG, {"length": len(value), "first": [self._cut(entry) for entry in value[:_ENTRIES_KEPT]]}]
        if len(value) <= _MOST_PLAIN:
            return [PLAIN, [self._encode(entry) for entry in value]]
        begin = len(self._lines)
        for at in range(0, len(value), _ENTRIES_PER_LINE):
            line = json.dumps(value[at : at + _ENTRIES_PER_LINE])
            self._count_json(len(line))
            self._lines.append(line)
        return [LINES, [begin, len(self._lines)]]

    def _encode_table(self, value: LongList) -> dict[str, Any]:
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
        if self._json_bytes > MOST_SMALL_BYTES:
            raise OutOfRange(
                f"besides rows of numbers the body has more than {MOST_SMALL_BYTES} bytes of JSON",
                field="body",
                expected=f"at most {MOST_SMALL_BYTES} bytes of text and labels; a data set may have more",
            )


def _most_rows(value: Any) -> int:
    """Return the rows of the longest table in a value and its nested objects; 0 if there is none."""
    if isinstance(value, LongList):
        return len(value)
    if isinstance(value, dict):
        return max(map(_most_rows, value.values()), default=0)
    return 0


def _cut_text(text: str) -> str:
    return text[:_LONGEST_TEXT]


if __name__ == "__main__":
    main()
