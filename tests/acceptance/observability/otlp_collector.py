"""A collector that takes traces by OTLP over HTTP, as the exporter sends them."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(ThreadingHTTPServer):
    """Keeps every span and every resource that it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.status = 200
        self.answer = b""
        self.go_on = threading.Event()
        """Until it is set, nobody is answered."""
        self.go_on.set()

    @property
    def url(self) -> str:
        """For `OTEL_EXPORTER_OTLP_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def named(self, name: str) -> list[Span]:
        """The spans of this name so far."""
        return [span for span in list(self.spans) if span.name == name]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.go_on.wait()
        if self.path == "/v1/traces" and self.server.status == 200 and not self.server.answer:
            self.server.raw.append(body)
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.server.resources.append(attributes(part.resource.attributes))
                self.server.spans += [span for scope in part.scope_spans for span in scope.spans]
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector, until the end of the block."""
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield collector
        finally:
            collector.go_on.set()
            collector.shutdown()
            thread.join()


def attributes(given: Any) -> dict[str, Any]:
    """Attributes as a dictionary."""
    return {each.key: _value(each.value) for each in given}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)
