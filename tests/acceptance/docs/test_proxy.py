"""The page about a proxy: real nginx in front of a real service does what it says."""

import os
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.docs.executable_pages import blocks, check_output
from tests.acceptance.docs.nginx import ASKING, CONFIG, PAGE, PASSWORD, Proxy
from tests.conftest import Serve
from tests.support.certificates import make_certificate, trusting
from tests.support.service import eventually

pytestmark = pytest.mark.slow

SHORT = {"client_header_timeout 10s": "client_header_timeout 1s", "client_body_timeout   30s": "client_body_timeout 1s"}


def _sh(script: str, folder: Path) -> str:
    command = ["bash", "-euo", "pipefail", "-c", script]
    env = os.environ | {name: str(folder / "fullchain.pem") for name in ("CURL_CA_BUNDLE", "SSL_CERT_FILE")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True, env=env).stdout


@pytest.fixture
def service(serve: Serve) -> httpx.Client:
    """The bundled digits, with a trainer."""
    return serve(base="digits", trainer=True)[0]


@pytest.fixture
def proxy(service: httpx.Client, tmp_path: Path) -> Proxy:
    """Set up as on the page, not running yet."""
    proxy = Proxy(tmp_path, f"127.0.0.1:{service.base_url.port}")
    make_certificate(tmp_path)
    _sh(proxy.here(blocks(PAGE)[0].code), tmp_path)
    return proxy


@pytest.fixture
def through(proxy: Proxy) -> Iterator[httpx.Client]:
    """A client of the page's configuration, with slow clients given up sooner."""
    site = CONFIG
    for said, ours in SHORT.items():
        assert said in site
        site = site.replace(said, ours)
    with proxy.running(site), proxy.client() as client:
        yield client


def test_the_commands_run_as_written(proxy: Proxy, through: httpx.Client) -> None:
    _, looks, uses = blocks(PAGE)
    check_output(_sh(proxy.here(looks.code), proxy.folder), looks.output)
    (proxy.folder / "examples").symlink_to(Path(__file__).parents[3] / "examples")
    _sh(proxy.here(uses.code), proxy.folder)
    assert through.get("/adapters/acme").json()["live"]["version"] == 1


def test_nobody_gets_in_without_a_password(proxy: Proxy, through: httpx.Client) -> None:
    with proxy.client(auth=None) as stranger:
        paths = ["/", "/base", "/predict", "/adapters", "/jobs/1/events", "/datasets/a", "/v2", "/openapi.json"]
        assert {stranger.get(path).status_code for path in paths} == {401}
        assert stranger.put("/datasets/a", content=b"x").status_code == 401
        assert stranger.get("/readyz").status_code == 200
    assert through.get("/metrics").status_code == 404
    moved = httpx.get(f"http://127.0.0.1:{proxy.plain_port}/base?a=b", headers={"Host": "localhost"})
    assert (moved.status_code, moved.headers["Location"]) == (308, "https://localhost/base?a=b")


def test_another_site_cannot_change_anything_with_the_browser_s_password(through: httpx.Client) -> None:
    for site, status in (("cross-site", 403), ("same-origin", 404), ("none", 404)):
        answer = through.post("/jobs/7/cancel", headers={"Sec-Fetch-Site": site})
        assert answer.status_code == status, site


def test_the_service_sees_the_host_that_the_client_asked_for(proxy: Proxy, through: httpx.Client) -> None:
    refused = through.get("/base", headers={"Host": "elsewhere.example"})
    assert (refused.status_code, refused.json()["code"]) == (403, "host_not_allowed")
    # The page's own requests are of the proxy's host, and of another scheme and port than the service's.
    for origin, status in ((proxy.url, 404), ("https://elsewhere.example", 403)):
        assert through.post("/jobs/7/cancel", headers={"Origin": origin}).status_code == status


def test_a_request_id_goes_through_and_into_the_log(proxy: Proxy, through: httpx.Client) -> None:
    assert through.get("/base", headers={"X-Request-Id": "order-4711"}).headers["X-Request-Id"] == "order-4711"
    made = through.get("/base", headers={"X-Request-Id": "not one id"}).headers["X-Request-Id"]
    assert len(made) == 32
    # nginx writes the line after the answer.
    log = eventually(
        lambda: made in (text := (proxy.folder / "loraplex.log").read_text()) and text, what="the line of the request"
    )
    assert "alice [" in log
    assert " 200 " in log
    assert "order-4711" in log


def test_bodies_are_bounded_as_the_service_bounds_them(through: httpx.Client) -> None:
    large = b"0" * (64 * 2**20 + 1)
    assert through.put("/adapters/acme", content=large, headers={"Content-Type": "application/json"}).status_code == 413
    # A data set may be larger than that: the service reads it, and refuses it for what it is.
    sent = through.put("/datasets/a", content=large, headers={"Content-Type": "text/csv"}, timeout=60)
    assert sent.json()["code"] in ("invalid_dataset", "bad_rows")


def test_events_come_one_by_one(through: httpx.Client, service: httpx.Client) -> None:
    rows = {"inputs": [[0] * 64] * 64, "targets": [0] * 64}
    training = {"method": "adamw", "loss": "cross_entropy", "epochs": 100_000, "max_seconds": 60}
    job = service.post("/adapters", json={"name": "a", "rank": 1, "data": rows, "training": training}).json()
    with through.stream("GET", f"/jobs/{job['id']}/events") as stream:
        # The job is still going on: a proxy that kept events back would have sent nothing yet.
        assert next(stream.iter_lines()).startswith("event: ")
        assert service.get(f"/jobs/{job['id']}").json()["status"] in ("queued", "running")
        service.post(f"/jobs/{job['id']}/cancel").raise_for_status()


def _told(proxy: Proxy, sent: bytes) -> bytes:
    """What the proxy says to a client that sends this and no more, until the proxy hangs up."""
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as plain,
        trusting(proxy.folder / "fullchain.pem").wrap_socket(plain, server_hostname="localhost") as connection,
        connection.makefile("rb") as answer,
    ):
        connection.sendall(sent)
        # A time-out of the socket would be an error.
        return answer.read()


@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-A"], ids=["nothing", "half"])
def test_a_client_that_does_not_send_its_headers_is_let_go(proxy: Proxy, through: httpx.Client, sent: bytes) -> None:
    assert _told(proxy, sent) == b""


def test_a_client_that_does_not_send_its_body_is_let_go(proxy: Proxy, through: httpx.Client) -> None:
    headers = through.build_request("POST", "/predict", content=b"0" * 100).headers
    headers["Authorization"] = f"Basic {b64encode(':'.join(PASSWORD).encode()).decode()}"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    # nginx says so where the client still listens; where it does not, it hangs up.
    told = _told(proxy, f"POST /predict HTTP/1.1\r\n{lines}\r\n{{".encode())
    assert told.startswith(b"HTTP/1.1 408 ") or not told


def test_who_may_do_what_can_be_asked_elsewhere(proxy: Proxy) -> None:
    asked: list[tuple[str | None, ...]] = []

    class Who(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            names = ("Authorization", "X-Original-Method", "X-Original-URI")
            asked.append(tuple(self.headers.get(name) for name in names))
            self.send_response(204 if asked[-1][1] == "GET" else 403)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    asker = ThreadingHTTPServer(("127.0.0.1", 0), Who)
    thread = threading.Thread(target=asker.serve_forever)
    thread.start()
    try:
        lines = [line for line in CONFIG.splitlines(keepends=True) if not line.strip().startswith("auth_basic  ")]
        lines = [line for line in lines if not line.strip().startswith("auth_basic_user_file")]
        site = "".join(lines).replace("auth_basic off", "auth_request off")
        site = site.replace("    # nginx handles slow", f"{ASKING}\n    # nginx handles slow")
        site = site.replace("127.0.0.1:9000", f"127.0.0.1:{asker.server_port}")
        with proxy.running(site), proxy.client(auth=None) as client:
            token = {"Authorization": "Bearer 1"}
            assert client.get("/base?a=1", headers=token).status_code == 200
            assert client.delete("/adapters/acme", headers=token).status_code == 403
            assert client.get("/readyz").status_code == 200
    finally:
        asker.shutdown()
        thread.join()
        asker.server_close()
    assert asked == [("Bearer 1", "GET", "/base?a=1"), ("Bearer 1", "DELETE", "/adapters/acme")]


def test_the_password_is_the_one_that_the_page_sets() -> None:
    assert "alice:%s" in blocks(PAGE)[0].code
    assert PASSWORD[1] in blocks(PAGE)[0].code
