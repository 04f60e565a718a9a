"""Traces of a service as its users start it, taken by a collector that reads OTLP."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.acceptance.observability.otlp_collector import Collector, attributes, collecting
from tests.support.deadlines import scaled
from tests.support.log_lines import line_of, lines
from tests.support.service import ServiceProcess, environment, eventually

pytestmark = pytest.mark.slow

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
CANARY = 271828.1828
ROWS = [[CANARY, 2.0, 3.0]]
FACTORS = {"A": [[1], [2]], "B": [[1, 0, 0]]}
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}


class World(NamedTuple):
    service: ServiceProcess
    collector: Collector


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patched, collecting() as collector:
        for name, value in (SOON | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}).items():
            patched.setenv(name, value)
        data = tmp_path_factory.mktemp("traces") / "data"
        with ServiceProcess(data, base="random:3,2,7", traces=True) as service:
            service.client.put("/adapters/acme", json=FACTORS).raise_for_status()
            yield World(service, collector)


def spans_of(collector: Collector, request_id: str) -> dict[str, Span]:
    """A request's span, under `request`, and those below it by their names."""

    def found() -> dict[str, Span]:
        spans = list(collector.spans)
        for span in spans:
            if attributes(span.attributes).get("loraplex.request_id") == request_id:
                return {"request": span} | {each.name: each for each in spans if each.parent_span_id == span.span_id}
        return {}

    spans: dict[str, Span] = eventually(found, what=f"the spans of {request_id}")
    return spans


def job_span(collector: Collector, job_id: str) -> Span:
    """The one span of a job, once it is there."""

    def found() -> list[Span]:
        return [span for span in collector.named("job") if attributes(span.attributes)["loraplex.job"] == job_id]

    spans: list[Span] = eventually(found, what="the job's span")
    (span,) = spans
    return span


# The header leaves the second to ASGI, and the third is what the first one is in the other protocol.
@pytest.mark.parametrize(
    ("path", "headers"), [("/predict", {}), ("/predict", {"X-Request-Timeout": "5"}), ("/v2/models/acme/infer", {})]
)
def test_a_prediction_is_a_span_with_its_parts_in_their_order_below_it(
    world: World, path: str, headers: dict[str, str]
) -> None:
    protocol = {"inputs": [{"name": "inputs", "shape": [1, 3], "datatype": "FP32", "data": ROWS[0]}]}
    body = {"adapter": "acme", "inputs": ROWS} if path == "/predict" else protocol
    before = time.time_ns()
    answer = world.service.client.post(path, json=body, headers=headers | SAMPLED)
    after = time.time_ns()
    assert answer.status_code == 200

    spans = spans_of(world.collector, answer.headers["x-request-id"])
    route = path.replace("acme", "{name}")
    request, parts = spans["request"], [spans["resolve"], spans["queue"], spans["forward"]]
    assert request.name == f"POST {route}"
    assert request.kind == Span.SPAN_KIND_SERVER
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert {part.trace_id for part in parts} == {request.trace_id}
    seen = attributes(request.attributes)
    assert seen["http.route"] == route
    assert seen["http.response.status_code"] == 200
    assert (seen["loraplex.adapter"], seen["loraplex.version"], seen["loraplex.rows"]) == ("acme", 1, 1)
    assert attributes(parts[-1].attributes) == {"loraplex.batch.rows": 1, "loraplex.batch.adapters": 1}
    times = [request.start_time_unix_nano]
    for part in parts:
        times += [part.start_time_unix_nano, part.end_time_unix_nano]
    times.append(request.end_time_unix_nano)
    assert times == sorted(times)
    slack = 50_000_000
    assert before - slack < times[0]
    assert times[-1] < after + slack
    assert line_of(world.service.log, answer.headers["x-request-id"])["trace_id"] == TRACE


def test_an_upload_s_span_has_its_publish_below_it(world: World) -> None:
    answer = world.service.client.put("/adapters/other", json=FACTORS)
    spans = spans_of(world.collector, answer.headers["x-request-id"])
    request, publish = spans["request"], spans["publish"]
    assert request.name == "PUT /adapters/{name}"
    assert request.parent_span_id == b""
    assert request.start_time_unix_nano <= publish.start_time_unix_nano
    assert publish.end_time_unix_nano <= request.end_time_unix_nano


def test_a_training_s_epochs_are_spans_below_its_job(world: World) -> None:
    asked = {"name": "trained", "rank": 1, "data": {"inputs": [[1, 2, 3]], "targets": [[1, 2]]}}
    asked["training"] = {"method": "adamw", "epochs": 5}
    job = world.service.client.post("/adapters", json=asked).raise_for_status().json()

    def found_below() -> list[Span]:
        below = [each for each in list(world.collector.spans) if each.parent_span_id == span.span_id]
        return below if len(below) >= 6 else []

    span = job_span(world.collector, job["id"])
    below = eventually(found_below, what="the spans below it")
    assert sorted(each.name for each in below) == ["epoch"] * 5 + ["publish"]
    for each in below:
        assert span.start_time_unix_nano <= each.start_time_unix_nano
        assert each.start_time_unix_nano <= each.end_time_unix_nano <= span.end_time_unix_nano


def test_what_failed_says_why_and_only_ours_is_an_error(world: World) -> None:
    answer = world.service.client.post("/predict", json={"adapter": "nobody", "inputs": ROWS})
    spans = spans_of(world.collector, answer.headers["x-request-id"])
    assert attributes(spans["request"].attributes)["error.type"] == "adapter_not_found"
    assert spans["request"].status.code == Status.STATUS_CODE_UNSET
    assert set(spans) == {"request"}


def test_a_path_of_any_length_is_as_short_as_in_the_log(world: World) -> None:
    answer = world.service.client.get("/adapters/" + "x" * 1000)
    request_id = answer.headers["x-request-id"]
    told = attributes(spans_of(world.collector, request_id)["request"].attributes)["url.path"]
    assert told == line_of(world.service.log, request_id)["path"] == "/adapters/" + "x" * 190


@pytest.mark.parametrize(
    "given", ["nonsense", f"00-{TRACE}-{PARENT}", "00-" + "0" * 32 + f"-{PARENT}-01", "ÿ" * 100, "", f"00-{TRACE}-x-01"]
)
def test_a_traceparent_that_is_none_begins_a_new_trace(world: World, given: str) -> None:
    headers = {b"traceparent": given.encode("latin-1")}
    answer = world.service.client.post("/predict", json={"adapter": None, "inputs": ROWS}, headers=headers)
    assert answer.status_code == 200
    request = spans_of(world.collector, answer.headers["x-request-id"])["request"]
    assert request.parent_span_id == b""
    assert request.trace_id.hex() not in (TRACE, "0" * 32)


def test_a_trace_that_its_caller_does_not_keep_is_not_kept_here(world: World) -> None:
    other = "5" * 32
    headers = {"traceparent": f"00-{other}-{PARENT}-00"}
    asked = {"adapter": None, "inputs": ROWS}
    unkept = world.service.client.post("/predict", json=asked, headers=headers)
    kept = world.service.client.post("/predict", json=asked)
    spans_of(world.collector, kept.headers["x-request-id"])
    assert not [span for span in world.collector.spans if span.trace_id.hex() == other]
    assert "trace_id" not in line_of(world.service.log, unkept.headers["x-request-id"])


def test_the_processes_are_told_apart_and_nothing_holds_inputs_or_headers(world: World) -> None:
    key = {"Authorization": "Bearer canary-key"}
    asked = {"adapter": "acme", "inputs": [["canary-text", 1, 2]]}
    answer = world.service.client.post("/predict?canary=query", json=asked, headers=key)
    spans_of(world.collector, answer.headers["x-request-id"])
    trained = {"name": "told-apart", "rank": 1, "data": {"inputs": ROWS, "targets": [[1, 2]]}}
    job = world.service.client.post("/adapters", json=trained).raise_for_status().json()
    job_span(world.collector, job["id"])
    raw = b"".join(world.collector.raw)
    assert b"canary" not in raw
    assert str(CANARY).encode() not in raw
    assert {resource["service.name"] for resource in world.collector.resources} == {"loraplex"}
    assert {resource["service.instance.id"] for resource in world.collector.resources} == {"worker-1", "trainer-1"}


def test_where_no_traces_are_wanted_neither_sdk_nor_exporter_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import app.processes.worker, app.processes.trainer\n"
        "from app.http.application import create_app; from app.service import Service\n"
        "from app.settings import Settings\n"
        f"service = Service(Settings(data_dir=Path({str(tmp_path)!r}), base='zeros:3,2')); create_app(service)\n"
        "service.close()\n"
        # FastAPI imports the API, which does nothing by itself.
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("trouble", ["down", "hangs", "refuses", "talks nonsense"])
def test_a_collector_in_trouble_holds_up_neither_answers_nor_the_end(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        if trouble == "hangs":
            collector.go_on.clear()
        collector.status = 503 if trouble == "refuses" else 200
        collector.answer = b"\xff" * 1000 if trouble == "talks nonsense" else b""
        url = "http://127.0.0.1:9" if trouble == "down" else collector.url
        for name, value in (SOON | {"OTEL_EXPORTER_OTLP_ENDPOINT": url}).items():
            monkeypatch.setenv(name, value)
        with ServiceProcess(
            tmp_path / "data", base="random:3,2,7", traces=True, trainers=0, shutdown_grace_seconds=6
        ) as service:
            for _ in range(20):
                answer = service.client.post("/predict", json={"adapter": None, "inputs": ROWS})
                assert answer.status_code == 200
            line_of(service.log, answer.headers["x-request-id"])
            begun = time.monotonic()
            service.process.terminate()
            assert service.process.wait(scaled(30)) == 0
            assert time.monotonic() - begun < scaled(5)
        assert not [line for line in lines(service.log) if "is killed" in line["event"]]
