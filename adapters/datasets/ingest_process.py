"""The process that reads one uploaded file: a stranger's bytes meet the parsers here, under a limit of memory.

It is told what to do in one line of JSON on standard input, and says in one on standard output what came of it. It
ends with whoever started it.
"""

import errno
import json
import os
import resource
import sys
import threading
import traceback
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pyarrow as pa

from adapters.datasets.convert import convert
from adapters.datasets.readers.formats import Format
from adapters.errors import BadRows, InvalidDataset

_FULL = {errno.ENOSPC, errno.EDQUOT}


def main() -> None:
    """Read one file."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.meta_path.insert(0, _NoPandas())
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    # Whoever waits for an answer goes first.
    os.nice(10)
    _limit(request["memory_bytes"], request["max_bytes"])
    answer = json.dumps(_answer(request))
    sys.stdout.write(answer)
    sys.stdout.flush()


class _NoPandas(MetaPathFinder):
    """Finder that hides pandas.

    If pandas is installed, pyarrow imports it to check for its types, which takes longer than most files and counts
    towards the memory limit.
    """

    def find_spec(self, fullname: str, *_: object) -> None:
        """Raise `ModuleNotFoundError` for pandas."""
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


def _limit(memory_bytes: int, max_bytes: int) -> None:
    # RLIMIT_DATA, not RLIMIT_AS: mapped files and libraries do not count, and their pages can be given back.
    for kind, limit in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_FSIZE, max_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        report = convert(
            request["raw"], Format(request["format"]), Path(request["out"]), max_bytes=request["max_bytes"]
        )
    except BadRows as error:
        return {"bad_rows": [bad._asdict() for bad in error.rows], "detail": error.detail, "field": error.field}
    except InvalidDataset as error:
        given = {} if error.members().get("given") is None else {"given": error.members()["given"]}
        return {
            "invalid": {"detail": error.detail, "field": error.field, "row": error.row, "expected": error.expected}
            | given
        }
    except MemoryError:  # pyarrow's own is one
        return {"out_of_memory": True}
    except OSError as error:
        return {"storage_full": True} if error.errno in _FULL else {"failed": traceback.format_exc()}
    except Exception as error:
        # A parser in C may wrap it.
        if isinstance(error.__cause__ or error.__context__, MemoryError):
            return {"out_of_memory": True}
        return {"failed": traceback.format_exc()}
    return {"report": report.to_json()}


if __name__ == "__main__":
    main()
