"""Traces as OpenTelemetry spans, exported by OTLP over HTTP as the standard `OTEL_*` variables say.

`app.bootstrap.open_tracing` imports this module only if traces are wanted. Spans are made when their work has ended,
from times that were measured anyway:

    tracing = open_tracing(settings, process="trainer-1")
    if tracing is not None:
        job = tracing.add_span("job", began, ended, attributes={"loraplex.job": id})   # seconds since the epoch
        tracing.add_span("epoch", began, ended, within=job)
        tracing.close(1.0)
"""

import threading
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from app.observability.records import LogRecord, RequestRecord

_NANOSECONDS = 1_000_000_000
_SERVER_ERROR = 500
_NO_PARENT = Context()
Attributes = Mapping[str, AttributeValue]


class Tracing:
    """Spans of one process. A thread exports them, and drops spans if the collector is too slow."""

    def __init__(self, process: str) -> None:
        defaults = {"service.name": "loraplex", "service.version": version("loraplex-server")}
        # The environment takes precedence.
        resource = Resource.create(defaults | {"service.instance.id": process}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("loraplex")
        self._propagator = TraceContextTextMapPropagator()

    def close(self, seconds: float) -> None:
        """Export the remaining spans; give up after a time, because the collector may hang."""
        closing = threading.Thread(target=self._provider.shutdown, name="end of traces", daemon=True)
        closing.start()
        closing.join(seconds)

    def trace_request(self, line: LogRecord, record: RequestRecord) -> str | None:
        """Add the spans of a request, below the span of its `traceparent`; return the trace's id if it is sampled."""
        epoch = time.time() - time.perf_counter()
        attributes: dict[str, AttributeValue] = {
            "http.request.method": line.method,
            "http.route": line.route,
            "url.path": line.path,
            "http.response.status_code": line.status,
            "loraplex.request_id": line.request_id.decode("latin-1"),
        }
        if line.code is not None:
            attributes["error.type"] = line.code
        members = {} if line.prediction is None else line.prediction.members()
        attributes |= {f"loraplex.{name}": value for name, value in members.items() if value is not None}
        span = self._tracer.start_span(
            f"{line.method} {line.route}",
            self._parent(record.headers),
            SpanKind.SERVER,
            attributes,
            start_time=_nanoseconds(epoch + line.began),
        )
        if span.is_recording():
            within = set_span_in_context(span, _NO_PARENT)
            for name, began, ended, part_attributes in _parts(record):
                self.add_span(name, epoch + began, epoch + ended, within=within, attributes=part_attributes)
            if line.status >= _SERVER_ERROR:
                span.set_status(Status(StatusCode.ERROR, line.code))
        span.end(_nanoseconds(epoch + line.ended))
        context = span.get_span_context()
        return format_trace_id(context.trace_id) if context.trace_flags.sampled else None

    def add_span(
        self,
        name: str,
        began: float,
        ended: float,
        *,
        within: Context = _NO_PARENT,
        attributes: Attributes | None = None,
        error: str | None = None,
    ) -> Context:
        """Add a span, with times in seconds since the epoch; return the context for the spans below it."""
        span = self._tracer.start_span(name, within, attributes=attributes, start_time=_nanoseconds(began))
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(_nanoseconds(ended))
        return set_span_in_context(span, within)

    def _parent(self, headers: Mapping[bytes, bytes]) -> Context:
        names = (b"traceparent", b"tracestate")
        carrier = {name.decode(): headers[name].decode("latin-1") for name in names if name in headers}
        return self._propagator.extract(carrier, _NO_PARENT) if carrier else _NO_PARENT


def _parts(record: RequestRecord) -> Iterator[tuple[str, float, float, Attributes]]:
    """Yield name, begin, end and attributes of the spans below a request's span."""
    if record.publish is not None:
        yield "publish", record.publish.began, record.publish.ended, {}
    entry = record.entry
    if entry is None or entry.resolved_at is None:
        return
    yield "resolve", entry.submitted_at, entry.resolved_at, {}
    if entry.batch_began_at is None:
        return
    yield "queue", entry.resolved_at, entry.batch_began_at, {}
    if entry.batch is not None:
        attributes = {"loraplex.batch.rows": entry.batch.rows, "loraplex.batch.adapters": entry.batch.adapters}
        yield "forward", entry.batch_began_at, entry.batch.ended, attributes


def _nanoseconds(seconds: float) -> int:
    return round(seconds * _NANOSECONDS)
