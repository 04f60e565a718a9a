"""What all processes print, whoever logs it."""

import json
from typing import Any

import httpx
import pytest

from app.observability import request_log
from app.service import Service
from app.settings import LogRequests
from tests.conftest import Serve
from tests.integration.observability.memory_log import Kept
from tests.support.fork_server import run_code
from tests.support.service import eventually


def logged(script: str, form: str = "json") -> str:
    """Standard error of a process that logs in this form."""
    head = (
        "import logging, warnings\nfrom app.observability import logs\nfrom app.settings import LogFormat\n"
        f"logs.configure(LogFormat({form!r}), process='worker-1')\nlog = logging.getLogger('app.somewhere')\n"
    )
    done = run_code(head + script)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    return done.stderr.decode()


def objects(script: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged(script).splitlines()]


def test_what_the_standard_library_uvicorn_alembic_and_warnings_say_are_objects_too() -> None:
    found = objects(
        "log.info('job %s', 'abc', extra={'request_id': 'r1'})\n"
        "logging.getLogger('uvicorn.error').info('Started [%d]', 3, extra={'color_message': 'x'})\n"
        "logging.getLogger('alembic.runtime').info('chatter')\n"
        "logging.getLogger('alembic.runtime').warning('trouble')\n"
        "warnings.warn('beware', stacklevel=1)\n"
        "log.debug('unseen')\n"
    )
    assert [line["event"] for line in found[:3]] == ["job abc", "Started [3]", "trouble"]
    assert "beware" in found[3]["event"]
    assert len(found) == 4
    assert found[0]["request_id"] == "r1"
    assert "color_message" not in found[1]
    assert [line["level"] for line in found] == ["info", "info", "warning", "warning"]
    assert {line["process"] for line in found} == {"worker-1"}
    assert list(found[0])[:5] == ["timestamp", "level", "event", "logger", "process"]


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_is_there_without_the_values_of_its_variables(form: str) -> None:
    text = logged(
        "def fail(inputs):\n    raise RuntimeError('boom')\n"
        "try:\n    fail('can' + 'ary')\nexcept RuntimeError:\n    log.exception('it failed')\n",
        form,
    )
    assert "boom" in text
    assert "in fail" in text
    assert "canary" not in text
    if form == "json":
        assert len(text.splitlines()) == 1


def test_what_nothing_catches_is_one_object_too() -> None:
    script = "import threading\nthread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()\n"
    (line,) = objects(script)
    assert line["level"] == "critical"
    assert "ZeroDivisionError" in line["exception"]


def test_what_is_logged_cannot_begin_a_line_or_speak_to_a_terminal() -> None:
    hostile = (
        "log.warning('path %s', 'a\\n{\"event\":\"forged\"}\\r\\x1b[2J\\x9b\\u2028', extra={'name_': 'b\\nforged'})"
    )
    text = logged(hostile, "console")
    assert len(text.splitlines()) == 1
    assert not set("\x1b\x9b\u2028\r") & set(text)
    assert len(logged(hostile).splitlines()) == 1


def test_a_value_that_json_has_no_form_for_is_logged_all_the_same() -> None:
    (line,) = objects("log.info('x', extra={'number': 2**70, 'text': '\\ud800', 'thing': object})")
    assert line["number"] == 2**70
    assert line["text"] == "\ud800"
    assert "object" in line["thing"]


@pytest.mark.parametrize("headers", [{}, {"X-Request-Timeout": "5"}], ids=["direct", "asgi"])
def test_a_failure_of_ours_is_told_once_with_the_id_of_its_request(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, headers: dict[str, str]
) -> None:
    client, service = serve()

    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(service.batcher, "_forward", fail)
    answer = client.post("/predict", json={"adapter": None, "inputs": [[0.0] * 10]}, headers=headers)
    assert answer.status_code == 500
    (record,) = [record for record in caplog.records if record.exc_info is not None]
    assert vars(record)["request_id"] == answer.headers["x-request-id"]
    assert "boom" in caplog.text


def figures(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_requests_and_batches_are_counted_where_they_are_answered(serve: Serve) -> None:
    client, _ = serve(base="random:3,2,7", cache_bytes=50)
    body = {"A": [[1], [2]], "B": [[1, 0, 0]]}
    for alpha, name in enumerate(("one", "two", "three", "four", "five"), 1):
        client.put(f"/adapters/{name}", json=body | {"alpha": alpha}).raise_for_status()
    asked = {"inputs": [[1, 2, 3]]}
    for name in ("one", "two", "three", "four", "five", "one"):
        client.post("/predict", json=asked | {"adapter": name}).raise_for_status()
    for _ in range(3):
        client.post("/predict", json=asked | {"adapter": "five"}, headers={"X-Request-Timeout": "5"})
    client.post("/predict", json=asked | {"adapter": "nobody"})
    client.post("/v2/models/one/infer", json={})

    def counted() -> dict[str, float] | None:
        seen = figures(client)
        done = seen.get('loraplex_requests_total{method="POST",route="/v2/models/{name}/infer",status="422"}') == 1
        return seen if done else None

    seen = eventually(counted, what="the count")
    predict = 'loraplex_requests_total{method="POST",route="/predict",status="%d"}'
    assert (seen[predict % 200], seen[predict % 404]) == (9, 1)
    assert seen['loraplex_request_seconds_count{route="/predict"}'] == 10
    assert seen["loraplex_queue_seconds_count"] == seen["loraplex_batch_rows_count"] == seen["loraplex_batch_rows_sum"]
    assert seen["loraplex_batch_rows_count"] == 9
    assert seen["loraplex_residency_hits_total"] + seen["loraplex_residency_misses_total"] == 9
    # Two of 20 bytes each fit. Five and then the first again were read, and then the fifth was there.
    assert seen["loraplex_residency_misses_total"] == seen["loraplex_residency_loads_total"] == 6
    assert seen["loraplex_residency_evictions_total"] == 4
    assert (seen["loraplex_resident_bytes"], seen["loraplex_resident_adapters"]) == (40, 2)
    assert seen['loraplex_adapters_published_total{source="upload"}'] == 5


def test_what_is_observed_is_handed_on_although_nobody_scrapes(serve: Serve) -> None:
    client, service = serve()
    handed: list[int] = []
    service.metrics.record_requests = lambda *given: handed.append(len(given[-1]))  # type: ignore[method-assign]
    for _ in range(3):
        client.post("/predict", json={"adapter": None, "inputs": [[0.0] * 10]}).raise_for_status()
    eventually(lambda: sum(handed) == 3, what="the handing on")


def test_closing_twice_is_closing_once(serve: Serve) -> None:
    service: Service = serve()[1]
    service.observer.close()
    service.observer.close()


def test_each_of_very_many_requests_is_counted_and_those_without_a_line_are_said(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "MAX_LINES_PER_SECOND", 10)
    client, service = serve(log_requests=LogRequests.ALL)
    kept = Kept()
    service.observer._request_log._writer = kept
    body = {"adapter": None, "inputs": [[0.0] * 10]}
    for _ in range(200):
        client.post("/predict", json=body).raise_for_status()
    for _ in range(3):
        client.post("/predict", json=body | {"adapter": "nobody"})

    def written(status: int) -> int:
        lines = [line for line in kept.of("request") if line["route"] == "/predict"]
        return sum(line["status"] == status for line in lines)

    eventually(lambda: written(404) == 3, what="the lines of those that failed")
    seen = figures(client)
    assert seen['loraplex_requests_total{method="POST",route="/predict",status="200"}'] == 200
    assert seen["loraplex_queue_seconds_count"] == 200
    service.observer.close()
    others = sum(line["route"] != "/predict" for line in kept.of("request"))
    left_out = sum(line["left_out"] for line in kept.of("requests left out"))
    # The scrape, too, has a line or is left out.
    assert written(200) + left_out + others == 201
    assert left_out > 100
