"""What happened, as OpenTelemetry spans, exported by OTLP over HTTP as the standard `OTEL_*` variables say."""

import threading
import time
from collections.abc import Mapping
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from app.observability.records import RequestRecord, Timespan
from app.serving.queue_entry import QueueEntry

_NANOSECONDS = 1_000_000_000
_SERVER_ERROR = 500
_EMPTY = Context()
Attributes = Mapping[str, AttributeValue]


class Tracing:
    """One process's spans. Nothing here waits for whoever takes them: a thread does, and drops what is too much."""

    def __init__(self, process: str) -> None:
        named = {"service.name": "loraplex", "service.version": version("loraplex-server")}
        # What the environment says comes on top.
        resource = Resource.create(named | {"service.instance.id": process}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("loraplex")
        self._parents = TraceContextTextMapPropagator()

    def close(self, seconds: float) -> None:
        """Export what waits, for so long at most: a collector that hangs is given up."""
        closing = threading.Thread(target=self._provider.shutdown, name="end of traces", daemon=True)
        closing.start()
        closing.join(seconds)

    def request(
        self,
        answered: RequestRecord,
        headers: Mapping[bytes, bytes],
        ticket: QueueEntry | None,
        publish: Timespan | None,
    ) -> str | None:
        """A request and its parts, below the span that its `traceparent` names; returns the trace's id."""
        epoch = time.time() - time.perf_counter()
        attributes: dict[str, AttributeValue] = {
            "http.request.method": answered.method,
            "http.route": answered.route,
            "url.path": answered.path,
            "http.response.status_code": answered.status,
            "loraplex.request_id": answered.request_id.decode("latin-1"),
        }
        if answered.code is not None:
            attributes["error.type"] = answered.code
        span = self._tracer.start_span(
            f"{answered.method} {answered.route}",
            self._parent(headers),
            SpanKind.SERVER,
            attributes | _of_prediction(answered),
            start_time=_nanoseconds(epoch + answered.began),
        )
        if span.is_recording():
            within = set_span_in_context(span, _EMPTY)
            for name, began, ended, more in _parts(ticket, publish):
                self.span(name, epoch + began, epoch + ended, within=within, attributes=more)
            if answered.status >= _SERVER_ERROR:
                span.set_status(Status(StatusCode.ERROR, answered.code))
        span.end(_nanoseconds(epoch + answered.ended))
        context = span.get_span_context()
        return format_trace_id(context.trace_id) if context.trace_flags.sampled else None

    def span(
        self,
        name: str,
        began: float,
        ended: float,
        *,
        within: Context = _EMPTY,
        attributes: Attributes | None = None,
        failed: str | None = None,
    ) -> Context:
        """Any span, from when to when in seconds since the epoch; what is returned is `within` for those below it."""
        span = self._tracer.start_span(name, within, attributes=attributes, start_time=_nanoseconds(began))
        if failed is not None:
            span.set_status(Status(StatusCode.ERROR, failed))
        span.end(_nanoseconds(ended))
        return set_span_in_context(span, within)

    def _parent(self, headers: Mapping[bytes, bytes]) -> Context:
        names = (b"traceparent", b"tracestate")
        carried = {name.decode(): headers[name].decode("latin-1") for name in names if name in headers}
        return self._parents.extract(carried, _EMPTY) if carried else _EMPTY


def _of_prediction(answered: RequestRecord) -> dict[str, AttributeValue]:
    prediction = answered.prediction
    if prediction is None:
        return {}
    attributes: dict[str, AttributeValue] = {"loraplex.rows": prediction.rows}
    if prediction.by_row:
        return attributes | {"loraplex.adapters": prediction.adapters}
    if prediction.reference is not None:
        attributes["loraplex.adapter"] = str(prediction.reference)
    if prediction.version is not None:
        attributes["loraplex.version"] = prediction.version.version
        attributes["loraplex.digest"] = prediction.version.digest
    return attributes


def _parts(ticket: QueueEntry | None, publish: Timespan | None) -> list[tuple[str, float, float, Attributes]]:
    """The spans below a request's, each from where the one before it ended."""
    parts: list[tuple[str, float, float, Attributes]] = []
    if publish is not None:
        parts.append(("publish", publish.began, publish.ended, {}))
    if ticket is None or ticket.pinned is None:
        return parts
    parts.append(("resolve", ticket.submitted, ticket.pinned, {}))
    if ticket.taken is None:
        return parts
    parts.append(("queue", ticket.pinned, ticket.taken, {}))
    if ticket.ran is not None:
        batch = {"loraplex.batch.rows": ticket.ran.rows, "loraplex.batch.adapters": ticket.ran.adapters}
        parts.append(("forward", ticket.taken, ticket.ran.ended, batch))
    return parts


def _nanoseconds(seconds: float) -> int:
    return round(seconds * _NANOSECONDS)
