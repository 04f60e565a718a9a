"""Fast path: small plain requests from a connection to the queue and back, without a task, ASGI or FastAPI.

Its answers have the same bytes as those of the ASGI application. A request takes it only if every header is on the
allow-list of its endpoint. All other requests fall back to ASGI, and a metric counts them by reason.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from adapters.access.grants import OPEN_GRANT, Grant
from adapters.access.keys import Scope
from adapters.access.rates import Rate
from adapters.errors import LoraplexError, RateLimited
from adapters.names import Reference
from app.http.endpoints import ENDPOINTS, INFERENCE_HEADER, REQUEST_ID
from app.http.errors import InternalError, answer_at, known_failure
from app.http.middleware import request_id_of
from app.observability.metrics.definitions import FAST_PATH_FALLBACKS
from app.observability.records import NO_ANSWER, RequestRecord
from app.service import Service
from app.serving.asgi import JSON_TYPE, MAX_INLINE_BYTES, TIMING, Headers, result_headers
from app.serving.oip.request import InferHeader, check_model_name, parse_model, read_exactly, read_infer_fast
from app.serving.oip.response import write_infer_response
from app.serving.oip.routes import BINARY_TYPE, INFERENCE_HEADER_NAME, is_small, parse_length
from app.serving.request import InferenceRequest, read_fast
from app.serving.response import MAX_INLINE_NUMBERS, write_numbers, write_response

PREDICT, INFER, INFER_VERSION = "/predict", "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"
_PREDICT_URL = PREDICT.encode()
# URLs of infer calls in which nothing has to be decoded and no name is invalid.
_INFER_URL = re.compile(rb"/v2/models/([A-Za-z0-9._-]{1,128})(?:/versions/([0-9]{1,20}))?/infer")
_MAX_LENGTH_DIGITS = 12
# Headers of the endpoint table that the fast path honours itself.
_IMPLEMENTED_HEADERS = frozenset({REQUEST_ID, INFERENCE_HEADER})
# Headers that change no answer of the endpoints with a fast path, in lower case.
_PASSIVE_HEADERS = frozenset(
    {
        # Read here: `host` by the host policy, `connection` by the HTTP parser, `authorization` by the grants.
        *("host", "connection", "content-type", "content-length", "authorization"),
        # They describe the client. Every answer has one type and no encoding, whatever the client accepts.
        *("user-agent", "accept", "accept-encoding", "accept-language", "accept-charset", "cache-control", "pragma"),
        *("referer", "priority", "dnt", "cookie", "keep-alive", "from"),
        # Added by proxies.
        *("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto"),
        *("x-forwarded-prefix", "x-forwarded-server", "x-forwarded-scheme", "x-forwarded-ssl", "x-real-ip"),
        *("x-scheme", "x-original-forwarded-for", "x-envoy-external-address"),
        # Traces: the observer reads `traceparent` and `tracestate`.
        *("traceparent", "tracestate", "baggage", "b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid"),
        *("x-b3-sampled", "x-b3-flags", "x-amzn-trace-id", "x-cloud-trace-context", "uber-trace-id"),
    }
)
# Allow-list of each endpoint with a fast path, by its path.
ALLOWED_HEADERS: Mapping[str, frozenset[bytes]] = {
    endpoint.path: frozenset(
        name.lower().encode()
        for name in (_PASSIVE_HEADERS - {header.lower() for header in endpoint.request_headers})
        | (_IMPLEMENTED_HEADERS & {*endpoint.request_headers})
    )
    for endpoint in ENDPOINTS
    if endpoint.asgi is not None
}

_JSON_LINES = b"content-type: %b\r\n" % JSON_TYPE
# To be formatted with the length of the JSON.
_BINARY_LINES = b"content-type: %b\r\n%b: %%d\r\n" % (BINARY_TYPE, INFERENCE_HEADER_NAME)
_TIMED_LINES = b"%bserver-timing: " + TIMING + b"\r\n"
# Members of enumerations that every request needs: looking one up in its class takes 50 ns.
_PREDICT_SCOPE, _REQUESTS, _ROWS = Scope.PREDICT, Rate.REQUESTS, Rate.ROWS

log = logging.getLogger(__name__)


class Fallback(StrEnum):
    """Reason why a request to an endpoint with a fast path is left to ASGI."""

    HEADER = "header"
    """A header is not on the allow-list, or there twice."""
    KEY = "key"
    """The request has no key that this worker has verified since the last revocation, or one without the scope."""
    HOST = "host"
    """The host policy does not accept the `Host` header."""
    LENGTH = "length"
    """The body has no Content-Length, or is too large for the event loop."""
    CONNECTION = "connection"
    """The connection closes, waits for an earlier answer, or its client reads too slowly, or the service drains."""
    QUEUE = "queue"
    """The queue is full."""
    MEMORY = "memory"
    """Too many bytes of bodies are in memory."""
    BODY = "body"
    """The body needs the exact parser, is invalid, or asks for more than outputs."""
    ROWS = "rows"
    """The answer has too many numbers to write it on the event loop."""


@dataclass(slots=True, eq=False)
class FastPathRequest(RequestRecord):
    """A request that the fast path has accepted: its record, which is complete when it is answered."""

    grant: Grant = OPEN_GRANT
    match: re.Match[bytes] | None = None
    """Match of `_INFER_URL`; None for `/predict`."""
    infer: tuple[InferHeader, str] | None = None
    """Header and model name of an infer request; None for `/predict`."""
    refusal: RateLimited | None = None
    """Error of a request that a limit of its tenant refuses. It gets no entry."""


class FastPath:
    """Fast path of one worker, shared by all of its connections."""

    def __init__(self, service: Service) -> None:
        self._batcher = service.batcher
        self._observer = service.observer
        self.count_fallback = service.observer.count_fallback
        self._host_policy = service.host_policy
        self._accepted_hosts = service.host_policy.accepted
        self._grants = service.grants
        self._rates = service.rates
        self.bodies = service.bodies
        self._base, self._parser = service.base, service.parser
        settings = service.settings
        self._max_request_rows = settings.max_rows
        self._max_bytes = min(MAX_INLINE_BYTES, settings.max_predict_json_bytes, settings.max_body_bytes)
        self._max_rows = MAX_INLINE_NUMBERS // service.base.out_features
        # The constant headers of all answers, and their lines.
        self._default_headers: Headers = ()
        self._default_lines = b""
        # A counter that does not exist yet cannot be told from one that nothing exports.
        for reason in Fallback:
            service.metrics.add(FAST_PATH_FALLBACKS, 0, reason)

    def accept(
        self, url: bytes, headers: Headers, *, is_idle: bool, http_version: Callable[[], str]
    ) -> FastPathRequest | None:
        """Return a POST whose head is complete if it may take the fast path, otherwise None.

        `url` has the bytes of the request target, with the query. The names of `headers` are in lower case. `is_idle`
        is whether the connection stays open, and can send the answer as soon as there is one. The reason of a fallback
        is counted; a URL without a fast path is not.
        """
        if url == _PREDICT_URL:
            match, route, allowed = None, PREDICT, ALLOWED_HEADERS[PREDICT]
        else:
            match, allowed = _INFER_URL.fullmatch(url), ALLOWED_HEADERS[INFER]
            if match is None:
                return None
            route = INFER if match[2] is None else INFER_VERSION
        named = dict(headers)
        host, length = named.get(b"host"), named.get(b"content-length", b"")
        grant = self._grants.of_header(named.get(b"authorization")) if self._grants.has_keys else OPEN_GRANT
        # HTTP/1.1 is the only version that keeps a connection open without a `Connection` header, so its text, which
        # takes 0.3 µs, is made only if there is one.
        if not is_idle or (b"connection" in named and http_version() != "1.1"):
            reason = Fallback.CONNECTION
        elif len(named) != len(headers) or not allowed.issuperset(named):
            reason = Fallback.HEADER
        elif host not in self._accepted_hosts and not self._host_policy.accepts(host):
            reason = Fallback.HOST
        elif grant is None or (grant is not OPEN_GRANT and not self._may_predict(grant)):
            reason = Fallback.KEY
        elif not length.isdigit() or len(length) > _MAX_LENGTH_DIGITS or int(length) > self._max_bytes:
            reason = Fallback.LENGTH
        elif not self._batcher.has_room(grant.caller.tenant):
            reason = Fallback.QUEUE
        else:
            began = time.perf_counter()
            return FastPathRequest(route, "POST", url.decode(), named, b"", began, grant=grant, match=match)
        self.count_fallback(reason)
        return None

    def _may_predict(self, grant: Grant) -> bool:
        """Return whether a grant has the scope, and was verified since the last revocation."""
        return grant.caller.may(_PREDICT_SCOPE) and self._grants.is_current(grant)

    def enqueue(self, request: FastPathRequest, body: bytes, on_end: Callable[[], None]) -> bool:
        """Put a request into the queue, or return False if its body needs ASGI.

        `on_end` is called when the entry has ended, and `respond` can be called then. A refused request has no entry:
        `on_end` is not called, and `respond` can be called immediately.
        """
        grant = request.grant
        tenant = grant.caller.tenant
        reason = None
        try:
            has_rates = self._rates.take(tenant, _REQUESTS)
            inference = self._read(request, body)
            if inference is None:
                reason = Fallback.BODY
            else:
                rows = len(inference.inputs_NI)
                if rows > self._max_rows:
                    reason = Fallback.ROWS
                elif not self._batcher.has_room(tenant, rows):
                    reason = Fallback.QUEUE
                else:
                    if has_rates:
                        self._rates.take(tenant, _ROWS, rows)
                    request.entry = self._batcher.enqueue(inference, grant, on_end)
        except RateLimited as error:
            self._rates.refresh()
            # If its key has been revoked, the answer is 401.
            reason = None if self._grants.is_current(grant) else Fallback.KEY
            # The traceback refers to this frame, which refers to the error: a cycle with the body in it.
            request.refusal = error.with_traceback(None)
        except Exception as error:
            reason = Fallback.BODY
            if not isinstance(error, LoraplexError):
                log.exception("the fast path could not read a request to %r", request.path[:100])
        if reason is not None:
            self.count_fallback(reason)
            if request.refusal is None:  # ASGI counts it again
                self._rates.give_back(tenant, _REQUESTS)
            return False
        request.request_id = request_id_of(request.headers)
        return True

    def respond(self, request: FastPathRequest, default_headers: Headers, *, keep_alive: bool) -> bytes | None:
        """Return the whole answer of a request that is refused or whose entry has ended.

        Return None if the client has disconnected. Releases the entry and records the request. Must be called once.
        """
        entry = request.entry
        if entry is not None:
            self._batcher.release(entry)
            if entry.is_cancelled:
                request.code = NO_ANSWER
                self._observer.finish_request(request)
                return None
        request.status = 200
        try:
            body, lines = _write(request)
        except Exception as error:
            known = known_failure(error)
            if known is None:
                request_id = request.request_id.decode()
                log.exception("POST %s failed", request.route, extra={"request_id": request_id})
                known = InternalError(f"the service failed on request {request_id}; its log says why")
            response = answer_at(request.path, known.with_traceback(None))
            request.status, request.code, body = response.status_code, known.code, bytes(response.body)
            # The length is written below.
            lines = _write_headers([header for header in response.raw_headers if header[0] != b"content-length"])
        self._observer.finish_request(request)
        if default_headers is not self._default_headers:  # uvicorn makes another list each second, for the date
            self._default_headers, self._default_lines = default_headers, _write_headers(default_headers)
        return b"%bcontent-length: %d\r\n%b%bx-request-id: %b\r\n%b%b" % (
            STATUS_LINE[request.status],
            len(body),
            self._default_lines,
            lines,
            request.request_id,
            b"\r\n" if keep_alive else b"connection: close\r\n\r\n",
            body,
        )

    def _read(self, request: FastPathRequest, body: bytes) -> InferenceRequest | None:
        """Return what a request asks for, or None if its body is not plain; set `infer`."""
        columns, max_rows, parser = self._base.in_features, self._max_request_rows, self._parser
        match = request.match
        if match is None:
            is_json = request.headers.get(b"content-type") == JSON_TYPE
            return read_fast(body, self._base, max_rows=max_rows, parser=parser) if is_json else None
        model, reference = _parse_model(match[1], match[2])
        length = request.headers.get(INFERENCE_HEADER_NAME)
        if length is None:
            parsed = read_infer_fast(body, columns, max_rows, parser=parser)
        else:
            header_length = parse_length(length)
            is_inline = is_small(body, header_length)
            parsed = read_exactly(body, header_length, columns, max_rows) if is_inline else None
        if parsed is None or not parsed[0].is_plain:
            return None
        header, inputs_NI = parsed
        check_model_name(header, model)
        request.infer = header, model
        return InferenceRequest(inputs_NI, [reference])


# Cached, because most requests repeat the references of earlier ones.
@lru_cache(2**15)
def _parse_model(name: bytes, version: bytes | None) -> tuple[str, Reference | None]:
    """Return the name of a model in an infer URL, and its reference; raise what `parse_model` raises."""
    model = name.decode()
    return model, parse_model(model, None if version is None else version.decode())


def _write_headers(headers: Headers) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def _write(request: FastPathRequest) -> tuple[bytes, bytes]:
    """Return the body and the header lines of a 200; raise the refusal, or the error of the entry."""
    entry = request.entry
    if entry is None:
        assert request.refusal is not None
        raise request.refusal
    result = entry.result()
    type_lines = _JSON_LINES
    if request.infer is None:
        body = write_response(entry.request, result, write_numbers(result.outputs_NO))
    else:
        header, model = request.infer
        data = None if header.binary_output else write_numbers(result.outputs_NO.reshape(-1))
        body, json_length = write_infer_response(header, model, result.versions[0], result.outputs_NO, data)
        if json_length is not None:
            type_lines = _BINARY_LINES % json_length
    if result.age_seconds:
        return body, type_lines + _write_headers(result_headers(result))
    return body, _TIMED_LINES % (type_lines, result.queue_seconds * 1e3, result.forward_seconds * 1e3)
