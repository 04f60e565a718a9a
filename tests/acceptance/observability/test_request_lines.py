"""The log of a service as its users start it."""

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import count

import httpx
import pytest

from tests.support.deadlines import scaled
from tests.support.log_lines import line_of, lines
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

CANARY = 271828.1828
ROWS = [[CANARY, 2.0, 3.0]]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("log")
    with ServiceProcess(folder / "data", base="random:3,2,7", trainers=0) as service:
        body = {"A": [[1], [2]], "B": [[1, 0, 0]]}
        service.client.put("/adapters/acme", json=body).raise_for_status()
        yield service


def predict(service: ServiceProcess, **body: object) -> httpx.Response:
    return service.client.post("/predict", json=body)


def test_every_line_of_the_log_is_one_object_with_a_time_a_level_an_event_and_its_process(
    service: ServiceProcess,
) -> None:
    found = lines(service.log)
    for line in found:
        assert {"timestamp", "level", "event", "logger", "process"} <= set(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"])
        datetime.fromisoformat(line["timestamp"])
    events = {(line["process"], line["event"]) for line in found}
    assert ("worker-1", "Application startup complete.") in events
    assert any(process == "supervisor" and event.startswith("listening on http://") for process, event in events)


def test_a_prediction_s_line_says_what_answered_and_how_long_it_took(service: ServiceProcess) -> None:
    answer = predict(service, adapter="acme@live", inputs=ROWS)

    line = line_of(service.log, answer.headers["x-request-id"])
    answered = answer.json()["adapter"]
    queue_ms, forward_ms = map(float, re.findall(r"dur=([\d.]+)", answer.headers["server-timing"]))
    known = {"route": "/predict", "path": "/predict", "method": "POST", "status": 200, "rows": 1, "level": "info"}
    assert line.items() >= (known | {"adapter": "acme", "version": 1, "digest": answered["digest"]}).items()
    assert line["queue_ms"] == pytest.approx(queue_ms, abs=0.0011)
    assert line["forward_ms"] == pytest.approx(forward_ms, abs=0.0011)
    assert line["ms"] >= line["queue_ms"] + line["forward_ms"]


def test_the_row_form_s_line_says_how_many_adapters_answered(service: ServiceProcess) -> None:
    answer = predict(service, adapters=["acme", None, "acme@1"], inputs=ROWS * 3)
    line = line_of(service.log, answer.headers["x-request-id"])
    assert (line["adapters"], line["rows"]) == (1, 3)
    assert "adapter" not in line


def test_requests_that_the_framework_answers_have_the_same_line(service: ServiceProcess) -> None:
    asked = {"adapter": "acme", "inputs": ROWS}
    # What asks for more than the fast path has is left to the framework.
    answers = [service.client.post("/predict", json=asked, headers={"X-Request-Timeout": "5"})]
    answers.append(service.client.post("/predict", json=asked))
    slow, fast = (line_of(service.log, answer.headers["x-request-id"]) for answer in answers)
    assert slow["digest"] == fast["digest"]
    assert set(slow) == set(fast)


@pytest.mark.parametrize(
    ("adapter", "status", "code"),
    [("nobody", 404, "adapter_not_found"), ("acme@9", 404, "version_not_found"), ("no such", 422, "invalid_name")],
)
def test_a_request_that_fails_has_its_code_in_its_line(
    service: ServiceProcess, adapter: str, status: int, code: str
) -> None:
    for path in ("/predict", f"/v2/models/{adapter}/infer"):
        body: dict[str, object] = {"adapter": adapter, "inputs": ROWS}
        if path != "/predict":
            if "@" in adapter:
                continue
            body = {"inputs": [{"name": "inputs", "shape": [1, 3], "datatype": "FP32", "data": ROWS[0]}]}
        answer = service.client.post(path, json=body)
        line = line_of(service.log, answer.headers["x-request-id"])
        assert (answer.status_code, line["status"], line["code"], line["level"]) == (status, status, code, "warning")


def test_the_route_is_the_template_and_the_path_is_without_its_query(service: ServiceProcess) -> None:
    answers = {
        "/adapters/{name}": service.client.get("/adapters/acme"),
        "/adapters": service.client.get("/adapters?prefix=secret"),
        "/v2/models/{name}/versions/{version}/infer": service.client.post("/v2/models/acme/versions/1/infer", json={}),
        "other": service.client.get("/nowhere/at/all?key=secret"),
        "/predict": service.client.delete("/predict"),
    }
    for route, answer in answers.items():
        assert line_of(service.log, answer.headers["x-request-id"])["route"] == route
    assert "secret" not in service.log.read_text()


def test_neither_inputs_nor_outputs_nor_headers_nor_what_a_refused_body_held_is_logged(service: ServiceProcess) -> None:
    key = {"Authorization": "Bearer canary-key", "X-Api-Key": "canary-key"}
    inner = service.client
    asked = {"adapter": "acme", "inputs": ROWS}
    refused = [
        inner.post("/predict", json=asked | {"inputs": [["canary-text", 1, 2]]}, headers=key),
        inner.post("/predict", json=asked | {"canary-field": 1}, headers=key),
        inner.post("/predict", json={"adapter": "canary name", "inputs": ROWS}, headers=key),
        inner.post("/predict", content=b"canary-body", headers=key | {"content-type": "application/json"}),
        inner.post("/predict", json=asked, headers=key | {"X-Request-Timeout": "canary-header"}),
        inner.put("/adapters/acme", json={"A": "canary-factor", "B": [[1]]}, headers=key),
        inner.post("/adapters", json={"name": "n", "rank": 1, "data": {"inputs": "canary-data"}}, headers=key),
    ]
    answered = inner.post("/predict", json=asked, headers=key)
    last = inner.get("/healthz", headers=key)

    assert [answer.status_code for answer in refused] == [422, 422, 422, 400, 422, 422, 422]
    line_of(service.log, last.headers["x-request-id"])
    text = service.log.read_text()
    assert "canary" not in text
    assert str(CANARY) not in text
    assert str(answered.json()["outputs"][0][0]) not in text


def test_a_client_cannot_write_a_line_of_its_own(service: ServiceProcess) -> None:
    forged = '{"event":"request","request_id":"forged"}'
    answer = service.client.get(f"/adapters/x%0A{forged}%0D%0A%1B[31m%E2%80%A8")
    also = service.client.get("/healthz", headers={"X-Request-Id": "a b", "User-Agent": forged})

    line = line_of(service.log, answer.headers["x-request-id"])
    assert line["path"].startswith(f"/adapters/x\n{forged}")
    assert "\x1b" in line["path"]
    line_of(service.log, also.headers["x-request-id"])
    assert not [line for line in lines(service.log) if line.get("request_id") in ("forged", "a b")]


def test_the_client_s_own_id_is_the_one_in_the_line(service: ServiceProcess) -> None:
    for path in ("/predict", "/adapters/acme"):
        asked = {"adapter": None, "inputs": ROWS}
        given = {"X-Request-Id": f"mine{path.replace('/', '.')}"}
        method, body = ("POST", asked) if path == "/predict" else ("GET", None)
        answer = service.client.request(method, path, json=body, headers=given)
        assert answer.headers["x-request-id"] == given["X-Request-Id"]
        assert line_of(service.log, given["X-Request-Id"])["path"] == path


def test_every_answer_has_an_id_whatever_became_of_the_request(service: ServiceProcess) -> None:
    client = service.client
    job = {"name": "n", "rank": 1, "data": {"inputs": [[1, 2, 3]], "targets": [[1, 2]]}}
    made = client.post("/adapters", json=job).raise_for_status().json()
    client.post(f"/jobs/{made['id']}/cancel").raise_for_status()
    answers = [
        client.get("/nowhere"),
        client.delete("/predict"),
        client.post("/predict", content=b"x" * (5 * 2**20), headers={"content-type": "application/json"}),
        client.post("/predict", content=b"{}", headers={"content-type": "text/plain"}),
        client.get(f"/jobs/{made['id']}/events"),
        client.get("/openapi.json"),
        client.get("/metrics"),
        client.get("/v2/models/nobody/ready"),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 413, 415, 200, 200, 200, 404]
    for answer in answers:
        line = line_of(service.log, answer.headers["x-request-id"])
        assert line["status"] == answer.status_code


# The first body is for the fast path, which leaves the second to ASGI once it has read it, and the third by its head.
@pytest.mark.parametrize(
    ("body", "more"),
    [(b'{"inputs": [[1, 2, 3]]}', b""), (b'{"inputs": nonsense}', b""), (b"{}", b"X-Request-Timeout: 5\r\n")],
)
def test_a_request_is_timed_from_its_head_on(service: ServiceProcess, body: bytes, more: bytes) -> None:
    numbers = count()

    def takes_as_long_as_its_body() -> bool:
        request_id = f"slow-body-{len(body)}-{next(numbers)}"
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {request_id}\r\n".encode()
        length = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head + more + length)
            time.sleep(0.3)
            connection.sendall(body)
            assert connection.recv(4096)
        return float(line_of(service.log, request_id)["ms"]) >= 250

    # Again, where the service was so busy that it read head and body together.
    eventually(takes_as_long_as_its_body, what="a request that is timed from its head on")


def test_what_is_not_http_has_an_id_and_a_line_too(service: ServiceProcess) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        answer = b""
        while part := connection.recv(4096):
            answer += part
    found = re.match(rb"HTTP/1.1 400 .*x-request-id: (\S+)\r\n.*\"code\": \"not_http\"", answer, re.S)
    assert found is not None, answer
    line = line_of(service.log, found[1].decode())
    assert (line["status"], line["code"], line["route"]) == (400, "not_http", "other")


def test_a_client_that_has_gone_is_logged_as_not_answered(service: ServiceProcess) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = b"POST /adapters HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: left-early\r\n"
        connection.sendall(head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    line = line_of(service.log, "left-early")
    assert (line["status"], line["code"]) == (499, "not_answered")


def test_the_lines_of_requests_are_written_before_the_service_ends(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ends")
    with ServiceProcess(folder / "data", base="random:3,2,7", trainers=0, log_requests="failed") as service:
        ids = [predict(service, adapter="nobody", inputs=ROWS).headers["x-request-id"] for _ in range(50)]
        succeeded = predict(service, adapter=None, inputs=ROWS).headers["x-request-id"]
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(scaled(30)) == 0
    logged = [line["request_id"] for line in lines(service.log) if line["event"] == "request"]
    assert [each for each in logged if each in ids] == ids
    assert succeeded not in logged


def test_for_people_the_same_is_text_and_still_one_line_an_event(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("console")
    with ServiceProcess(folder / "data", base="random:3,2,7", trainers=0, log_format="console") as service:
        answer = service.client.get("/adapters/x%0Aforged%1B[31m")
        request_id = answer.headers["x-request-id"]
        found = eventually(lambda: re.findall(rf".*{request_id}.*", service.log.read_text()), what="the line")
    text = service.log.read_text()
    assert "Application startup complete" in text
    assert "listening on http://127.0.0.1:" in text
    assert len(found) == 1
    assert "status=422" in found[0]
    assert not [line for line in text.splitlines() if line.startswith("forged")]
    assert "\x1b" not in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text.splitlines()[0])
