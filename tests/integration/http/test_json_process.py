"""The process that reads a large JSON body: what it refuses, how it ends, and what is logged of it."""

import json
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InvalidInput, NotJson, OutOfRange
from adapters.large_json import reader as json_reading
from adapters.large_json.reader import MAX_LEVELS, read_in_process

LONG = "a" * 2**16
NUMBERS = ",".join(["1"] * 2000)


def _nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize("levels", [101, 300, 500, 900, 990])
@pytest.mark.parametrize(
    "form",
    [
        b"%b",
        b'{"a":%b}',
        b'{"m":[[1],%b]}',
        b'{"m":[[1],[%b]]}',
        b'{"m":[%b]}',
        b'{"l":[' + NUMBERS.encode() + b",%b]}",
    ],
)
def test_a_value_that_is_nested_too_deeply_is_refused_as_such(
    form: bytes, levels: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NotJson, match="the body is nested too deeply"):
        read_in_process(form % _nested(levels), longest=10_000)
    assert caplog.text == ""


def test_objects_that_are_nested_too_deeply_are_refused_as_such(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NotJson, match="the body is nested too deeply"):
        read_in_process(b'{"a":' * 900 + b"1" + b"}" * 900, longest=10)
    assert caplog.text == ""


def test_as_many_levels_as_are_accepted_are_given_back() -> None:
    value: Any = read_in_process(b'{"a":1,"b":' + _nested(MAX_LEVELS - 1) + b"}", longest=10)
    levels = 0
    inner = value["b"]
    while len(inner):
        inner, levels = inner[0], levels + 1
    assert levels == MAX_LEVELS - 2


@pytest.mark.parametrize(
    ("value", "field", "said"),
    [
        ({"data": {LONG + "b": 1, LONG + "c": 2}}, "data", "a string in data has 65537 characters"),
        ({"data": {"dataset": LONG + "b"}}, "data.dataset", "data.dataset has 65537 characters"),
        ({"data": {"labels": ["x", LONG + "b"]}}, "data.labels", "data.labels has 65537 characters"),
    ],
)
def test_a_text_that_is_too_long_is_refused_and_not_cut(value: object, field: str, said: str) -> None:
    with pytest.raises(OutOfRange, match=said) as raised:
        read_in_process(json.dumps(value).encode(), longest=10)
    assert raised.value.field == field
    assert "65536 characters" in str(raised.value.expected)


def test_texts_of_the_greatest_length_are_given_back_whole() -> None:
    value = {LONG: LONG, "list": [LONG]}
    assert read_in_process(json.dumps(value).encode(), longest=10) == value


def _process(**streams: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "adapters.large_json.reader"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, **streams)


def test_a_process_whose_answer_nobody_reads_ends_without_a_traceback() -> None:
    process = _process(stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    body = json.dumps([["1"] * 10, *range(100_000)]).encode()
    request = {"length": len(body), "what": "it", "longest": 10**6, "memory_bytes": 2**29, "columns": {}}
    process.stdin.write(json.dumps(request).encode() + b"\n" + body)
    process.stdin.flush()
    assert process.stderr is not None
    said = process.stderr.read()
    assert (process.wait(60), said) == (0, b"")
    process.stderr.close()
    process.stdin.close()


def test_a_lower_limit_of_the_parent_process_is_kept() -> None:
    code = (
        "import resource; from adapters.large_json.reader import _lower_limit as lower\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**29, 2**29)); lower(resource.RLIMIT_DATA, 2**30)\n"
        "print(resource.getrlimit(resource.RLIMIT_DATA)); lower(resource.RLIMIT_DATA, 2**28)\n"
        "print(resource.getrlimit(resource.RLIMIT_DATA))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines() == [str((2**29, 2**29)), str((2**28, 2**28))]


def test_without_memory_for_the_body_it_is_refused_and_nothing_is_logged_as_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Less than the interpreter has when the limit is set.
    monkeypatch.setattr(json_reading, "MEMORY_BYTES", resource.getpagesize())
    with pytest.raises(InvalidInput, match="cannot be read in"):
        read_in_process(b"[" + b" " * 2**21 + b"]", longest=10)
    assert caplog.text == ""


@pytest.mark.parametrize("content", ["print('{', flush=True); 1 / 0", "import os; os.kill(os.getpid(), 11)"])
def test_how_a_process_crashed_is_logged(
    content: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    (tmp_path / "crashing_reader.py").write_text("import sys; sys.stdin.buffer.readline()\n" + content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(json_reading, "_MODULE", "crashing_reader")
    with pytest.raises(InvalidInput, match="cannot be read in"):
        read_in_process(b"[1]", longest=10)
    # A process that was killed is followed by another one.
    record = caplog.records[0]
    assert len(caplog.records) == (4 if "kill" in content else 1)
    assert record.levelno == logging.ERROR
    said = record.getMessage()
    assert ("ZeroDivisionError" in said and "status 1" in said) or "status -11" in said


def test_a_body_is_read_once_more_if_its_process_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "killed_once.py").write_text(
        "import os, pathlib, sys\n"
        f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "if not mark.exists():\n    mark.touch(); os.kill(os.getpid(), 9)\n"
        "from adapters.large_json.reader import main\nmain()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(json_reading.__file__).parents[2]}")
    monkeypatch.setattr(json_reading, "_MODULE", "killed_once")
    assert read_in_process(b"[1]", longest=10) == [1]
