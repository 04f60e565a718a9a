"""The service's own TLS: a real handshake, both serving paths, limits on silent clients, and mistakes in the files."""

import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from app.processes.tls import tls_context
from app.service import Service
from app.serving import connection_guard
from app.settings import Settings, SettingsError, load_settings
from tests.support.certificates import make_certificate, trusting
from tests.support.service import environment, serving

Running = tuple[httpx.Client, Service]
FACTORS = {"A": [[1.0], [2.0]], "B": [[1.0] * 4]}
BODY = {"adapter": "a", "inputs": [[1.0, 2.0, 3.0, 4.0]]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def running(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service") / "data"
    with serving(Settings(base="zeros:4,2", data_dir=folder, tls_cert=pair[0], tls_key=pair[1])) as (client, service):
        client.put("/adapters/a", json=FACTORS).raise_for_status()
        yield client, service


def _connect(client: httpx.Client, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=20)
    return context.wrap_socket(plain, server_hostname="localhost")


def test_both_serving_paths_answer_over_tls(running: Running) -> None:
    client, _ = running
    fast = client.post("/predict", json=BODY).raise_for_status()
    slow = client.post("/predict", json=BODY, headers={"Expect": "", "X-Other": "1" * 9000}).raise_for_status()
    assert fast.json()["outputs"] == slow.json()["outputs"] == [[10.0, 20.0]]
    assert client.get("/ui/adapters").status_code == 200


def test_a_large_answer_and_pipelined_requests_arrive_whole(running: Running, pair: tuple[Path, Path]) -> None:
    client, _ = running
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
    with _connect(client, trusting(pair[0])) as connection, connection.makefile("rb") as answer:
        connection.sendall(request % b"" + request % b"Connection: close\r\n")
        received = answer.read()
    document = client.get("/openapi.json").content
    assert received.count(document) == 2


def test_a_client_that_does_not_trust_the_certificate_gets_no_answer(running: Running) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(running[0].base_url.join("/healthz"))


def test_old_versions_of_tls_and_plain_http_are_refused(running: Running, pair: tuple[Path, Path]) -> None:
    client, _ = running
    old = trusting(pair[0])
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _connect(client, old)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{client.base_url.port}/healthz")


_HALF_HEAD = b"GET / HTTP/1.1\r\nHost: loc"
_HALF_BODY = (
    b"PUT /adapters/b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Type: application/json\r\n\r\n{"
)


@pytest.mark.parametrize("sent", [_HALF_HEAD, _HALF_BODY], ids=["head", "body"])
def test_a_client_that_stops_in_a_request_is_closed(
    running: Running, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connection_guard, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(connection_guard, "MESSAGE_SECONDS", 0.2)
    with _connect(running[0], trusting(pair[0])) as connection:
        connection.sendall(sent)
        # A time-out of the socket is another error.
        with suppress(ssl.SSLEOFError, ConnectionResetError):
            assert not connection.recv(1)


def test_a_malformed_request_is_answered_before_the_connection_closes(
    running: Running, pair: tuple[Path, Path]
) -> None:
    with _connect(running[0], trusting(pair[0])) as connection, connection.makefile("rb") as answer:
        connection.sendall(b"GET / HTTP/1.1\r\nbroken line\r\n\r\n")
        assert answer.readline().startswith(b"HTTP/1.1 400 ")
        assert b"not_http" in answer.read()


def test_only_answers_over_tls_ask_browsers_to_stay_with_it(running: Running, tmp_path: Path) -> None:
    assert running[0].get("/ui/adapters").headers["Strict-Transport-Security"] == "max-age=31536000"
    with serving(Settings(base="zeros:4,2", data_dir=tmp_path / "data")) as (plain, _):
        assert "Strict-Transport-Security" not in plain.get("/ui/adapters").headers


def test_the_command_line_trusts_a_private_authority(running: Running, pair: tuple[Path, Path]) -> None:
    command = [str(Path(sys.executable).with_name("loraplex")), "adapters"]
    variables = environment(url=str(running[0].base_url).replace("127.0.0.1", "localhost"))
    trusted = variables | {"SSL_CERT_FILE": str(pair[0])}
    assert subprocess.run(command, env=trusted, capture_output=True, timeout=60).returncode == 0
    refused = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr


def test_unusable_files_are_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, key = pair
    (tmp_path / "other").mkdir()
    _, other_key = make_certificate(tmp_path / "other")
    locked = tmp_path / "locked.pem"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", str(key), "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    text = Path(shutil.copy(__file__, tmp_path / "text.pem"))
    for files, said in [
        ((tmp_path / "no.pem", key), "LORAPLEX_TLS_CERT is .*no.pem, which cannot be read: No such file"),
        ((certificate, tmp_path), "LORAPLEX_TLS_KEY is .*, which cannot be read: Is a directory"),
        ((certificate, other_key), "do not belong together"),
        ((certificate, locked), "without a passphrase"),
        ((text, key), "must be PEM files"),
    ]:
        with pytest.raises(SettingsError, match=said):
            tls_context(Settings(data_dir=tmp_path, tls_cert=files[0], tls_key=files[1]))


@pytest.mark.parametrize(("given", "missing"), [("tls_cert", "TLS_KEY"), ("tls_key", "TLS_CERT")])
def test_one_file_without_the_other_is_refused(given: str, missing: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=missing):
        load_settings({given: tmp_path / "file.pem"})
