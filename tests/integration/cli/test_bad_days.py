"""A bad day: hostile names, closed and full outputs, odd locales, narrow terminals, signals, strangers that answer."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.cli.conftest import DIGITS, ROOT, SECONDS, Ended, Run, hear_ctrl_c, invoke
from tests.integration.cli.test_output import at_a_terminal
from tests.support.service import LORAPLEX, ServiceProcess, environment

Ask = Callable[..., Any]
LABELS = ("größe", "→", "\x1b[31mred", "two\nlines", "[bold]b", "\u202eabc", "\u0645\u06cc\u200c", "x", "y", "z")
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")


def _in_a_shell(line: str, *, url: str, **more: str) -> Ended:
    return subprocess.run(
        ["bash", "-c", line], env=environment(url=url) | more, capture_output=True, text=True, timeout=SECONDS
    )


@contextmanager
def _stranger(status: int, kind: str, body: bytes) -> Iterator[str]:
    """The address of something that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(SECONDS)


@pytest.fixture(scope="module")
def hostile(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of an adapter whose labels steer a terminal."""
    file = tmp_path_factory.mktemp("hostile") / "hostile rows.csv"
    with DIGITS.open(newline="") as opened:
        head, *rows = csv.reader(opened)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow([*head[:-1], "größe[red]"])
        writer.writerows([*row[:-1], LABELS[int(row[-1])]] for row in rows)
    how = ("--method", "adamw", "--loss", "cross_entropy", "--epochs", 20)
    ended = run("train", file, "--name", "hostile", "--target", "größe[red]", *how)
    assert f"next: loraplex predict hostile {shlex.quote(str(file))} --limit 5" in ended.stderr
    return file


def test_labels_do_not_steer_the_terminal(run: Run, ask: Ask, hostile: Path) -> None:
    shown = run("predict", "hostile", hostile, "--limit", 10, "--top-k", 1).stdout
    assert not STEERING.search(shown)
    assert r"\x1b[31mred" in shown
    assert r"two\nlines" in shown
    assert "[bold]b" in shown
    assert LABELS[6] in shown
    asked = json.dumps(ask("predict", "hostile", hostile, "--limit", 10, "--top-k", 10), ensure_ascii=False)
    assert all(json.dumps(label, ensure_ascii=False)[1:-1] in asked for label in LABELS)


def test_neither_do_names_files_columns_and_messages(run: Run, tmp_path: Path) -> None:
    (tmp_path / "columns.csv").write_text(
        ",".join([*(f"x{n}" for n in range(64)), '"\x1b[31m\u202e"']) + "\n1" + ",1" * 64
    )
    for status, arguments in (
        (1, ("predict", "hostile", "\x1b[31m.csv")),
        (1, ("adapter", "\x1b[31m\nx")),
        (1, ("dataset", "put", tmp_path / "columns.csv")),
        (0, ("predict", "--base", tmp_path / "columns.csv", "--inputs", ",".join(f"x{n}" for n in range(64)))),
    ):
        ended = run(*arguments, status=status)
        assert not STEERING.search(ended.stdout + ended.stderr)
        assert r"\x1b[31m" in ended.stderr
    body = json.dumps({"code": "x", "detail": "a\x1b[31m[red]\nb\u202e", "given": "\x9b31m"}).encode()
    with _stranger(400, "application/problem+json", body) as url:
        said = invoke("adapters", url=url).stderr
    assert not STEERING.search(said)
    assert r"a\x1b[31m[red]\nb\u202e" in said


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_any_locale_takes_what_is_said(url: str, hostile: Path, encoding: str) -> None:
    asked = f"{LORAPLEX} predict hostile - --limit 10 < {shlex.quote(str(hostile))}"
    for line in (asked, f"{LORAPLEX} dataset show hostile-rows", f"{LORAPLEX} train --help"):
        ended = subprocess.run(
            ["bash", "-c", line],
            env=environment(url=url) | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=SECONDS,
        )
        assert ended.returncode == 0, ended.stderr
        assert b"Traceback" not in ended.stderr
    answer = json.loads(_in_a_shell(f"{asked} --json", url=url, PYTHONIOENCODING=encoding).stdout)
    assert "größe" in json.dumps(answer, ensure_ascii=False)


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("adapters >&-", 0, ""),
        pytest.param("adapters --json >&-", 0, "", marks=pytest.mark.slow),
        ("adapter nobody 2>&-", 1, ""),
        ("predict acme - <&-", 1, "standard input has no rows"),
        ("delete acme <&-", 2, "add --yes"),
        ("adapters > /dev/full", 1, "No space left"),
        pytest.param("adapters --json > /dev/full", 1, "No space left", marks=pytest.mark.slow),
    ],
)
def test_closed_and_full_outputs_are_no_surprise(url: str, trained: Ended, line: str, status: int, said: str) -> None:
    ended = _in_a_shell(f"{LORAPLEX} {line}", url=url)
    assert ended.returncode == status, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_answers_do_not_overwrite_the_rows(run: Run, trained: Ended, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(DIGITS.read_text())
    (tmp_path / "link.csv").symlink_to(rows)
    for out in (rows, tmp_path / "link.csv"):
        assert "would overwrite" in run("predict", "acme", rows, "--out", out, status=2).stderr
    assert rows.read_text() == DIGITS.read_text()


def test_a_narrow_terminal_loses_no_cell(url: str, trained: Ended, ask: Ask) -> None:
    row = ("predict", "acme", DIGITS, "--limit", 1, "--top-k", 1)
    ((label,),) = (prediction["labels"] for prediction in ask(*row)["predictions"])
    said, status = at_a_terminal(*row, columns=20, url=url)
    assert status == 0
    assert f"{label['probability']:.4g}" in said


@pytest.mark.slow
def test_ids_and_numbers_stay_whole_in_a_terminal_of_80_columns(url: str, trained: Ended, ask: Ask) -> None:
    jobs = [job["id"] for job in ask("jobs", "--adapter", "acme")]
    made = ask("adapter", "acme")["versions"][0]["created_at"][:10]
    outputs = ask("predict", "--base", DIGITS, "--limit", 2)["predictions"]
    numbers = [f"{row['outputs'][0]:.4g}" for row in outputs]
    for whole, *asked in (
        (jobs, "jobs", "--adapter", "acme"),
        (["acme", "accuracy"], "adapters", "acme"),
        ([made, "accuracy"], "adapter", "acme"),
        (numbers, "predict", "--base", DIGITS, "--limit", 2),
    ):
        said, status = at_a_terminal(*asked, columns=80, url=url, no_color="1")
        assert status == 0
        shown = re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines()
        assert max(map(len, shown)) <= 80, said
        for each in whole:
            assert any(each in line.split() for line in shown), (each, said)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (b"a,b\n" + b"1" * 200_000 + b",2\n", "Cannot read standard input"),
        (b"\xff\xfe\x00", "it is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b"a,a\n1,2\n", "two columns are called 'a'"),
    ],
)
def test_rows_that_cannot_be_read_say_why(run: Run, trained: Ended, rows: bytes, said: str) -> None:
    assert said in run("predict", "acme", "-", stdin=rows, status=1).stderr


def test_bytes_on_standard_input_are_refused_by_the_console_script_too(url: str, trained: Ended) -> None:
    ended = subprocess.run(
        [LORAPLEX, "predict", "acme", "-"],
        input=b"\xff\xfe\x00",
        env=environment(url=url),
        capture_output=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 1
    assert "it is not UTF-8" in ended.stderr.decode()
    assert b"Traceback" not in ended.stderr


def test_a_byte_order_mark_is_no_part_of_a_name(run: Run, trained: Ended) -> None:
    ended = run("predict", "acme", "-", "--limit", 1, stdin="\ufeff" + DIGITS.read_text())
    assert ended.stderr.startswith("inputs: pixel_0,")


def test_an_array_file_that_is_broken_says_so(run: Run, trained: Ended, tmp_path: Path) -> None:
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04")
    assert "Cannot read zip.npy" in run("predict", "acme", tmp_path / "zip.npy", status=1).stderr


def test_the_next_step_can_be_taken_with_an_array_file(run: Run, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).random((20, 64))
    np.savez(tmp_path / "rows.npz", x=numbers, digit=np.arange(20) % 10)
    how = ("--method", "adamw", "--loss", "cross_entropy", "--epochs", 1)
    ended = run("train", tmp_path / "rows.npz", "--name", "of-arrays", "--target", "digit", *how)
    assert f"next: loraplex predict of-arrays {tmp_path / 'rows.npz'} --limit 5" in ended.stderr
    run("predict", "of-arrays", tmp_path / "rows.npz", "--limit", 5)


def test_a_folder_is_not_said_to_be_missing(run: Run, tmp_path: Path) -> None:
    assert f"{tmp_path} is no file" in run("dataset", "put", tmp_path, status=1).stderr


def test_one_fraction_a_row_is_no_target_of_a_layer_with_many_outputs(run: Run, tmp_path: Path) -> None:
    head, *rows = DIGITS.read_text().splitlines()
    (tmp_path / "fractions.csv").write_text("\n".join([head, *(f"{row}.0" for row in rows)]) + "\n")
    data = (tmp_path / "fractions.csv", "--name", "fractions", "--target", "digit")
    assert "note: if digit has classes, add --loss cross_entropy" in run("train", *data, status=1).stderr
    run("train", *data, "--loss", "cross_entropy", "--dry-run")


def test_an_address_that_is_none_of_ours_is_asked_about(run: Run, url: str) -> None:
    assert "say it by --url or LORAPLEX_URL" in run("--url", "nonsense", "base", status=2).stderr
    assert "the address of a loraplex service?" in run("--url", f"{url}/path", "base", status=1).stderr
    with _stranger(404, "text/plain", b"no") as elsewhere:
        assert "the address of a loraplex service?" in run("--url", elsewhere, "adapters", status=1).stderr


def test_an_error_in_the_shape_of_the_inference_protocol_is_one_of_ours(run: Run) -> None:
    with _stranger(429, "application/json", json.dumps({"error": "256 rows wait already"}).encode()) as url:
        ended = run("--url", url, "base", status=1)
    assert ended.stderr == "loraplex: 256 rows wait already\nIt is busy: try again in a moment.\n"


def test_what_cannot_be_rolled_back_is_no_bad_file(run: Run) -> None:
    how = ("--method", "adamw", "--loss", "cross_entropy", "--epochs", 1)
    run("train", DIGITS, "--name", "only-one", "--target", "digit", *how)
    ended = run("rollback", "only-one", "--json", status=1)
    assert ended.stdout == ""
    assert json.loads(ended.stderr)["code"] == "version_not_found"


LONG = ("--method", "adamw", "--loss", "cross_entropy", "--epochs", "100000", "--learning-rate", "0.001")


@pytest.fixture
def cancelling(service: ServiceProcess) -> Iterator[None]:
    """Whatever still trains is cancelled afterwards."""
    yield
    for status in ("running", "queued"):
        for job in service.client.get("/jobs", params={"status": status}).json()["data"]:
            service.client.post(f"/jobs/{job['id']}/cancel").raise_for_status()


def test_ctrl_c_is_told_to_machines_as_json(url: str, trained: Ended, ask: Ask, cancelling: None) -> None:
    job = ask("train", "--dataset", "turned-digits", "--name", "long", "--target", "digit", *LONG, "--no-wait")
    with subprocess.Popen(
        [LORAPLEX, "jobs", "--follow", job["id"], "--json"],
        env=environment(url=url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    ) as process:
        assert process.stdout is not None
        json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    problem = json.loads(said)
    assert problem["code"] == "interrupted"
    assert f"loraplex cancel {job['id']}" in problem["detail"]


def test_sigterm_gives_the_cursor_back(url: str, trained: Ended, cancelling: None) -> None:
    data = ("--dataset", "turned-digits", "--name", "ended", "--target", "digit")
    said, status = at_a_terminal("train", *data, *LONG, url=url, ended_after="ended \x1b")  # the bar of that name
    assert status == 128 + signal.SIGTERM
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l")


def test_ctrl_c_before_there_is_a_command_is_silent(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    ended = subprocess.run(
        [LORAPLEX, "base"],
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_help_gives_an_example() -> None:
    for command in ("train", "predict"):
        ended = invoke(command, "--help", url="http://127.0.0.1:9")
        assert f"loraplex {command} " in ended.stdout.partition("Example")[2]


def test_completion_is_silent_where_something_else_answers() -> None:
    with _stranger(200, "text/plain", b"no") as url:
        asked = {"_LORAPLEX_COMPLETE": "complete_bash", "COMP_WORDS": "loraplex adapter a", "COMP_CWORD": "2"}
        for address in (url, f"{url}/a b\x01"):
            ended = invoke(url=address, variables=asked)
            assert (ended.stdout.strip(), ended.stderr) == ("", "")
