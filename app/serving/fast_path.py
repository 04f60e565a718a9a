"""Small requests in the form that most have, from a connection to the queue and back: no task, no ASGI, no framework.

What is taken here is answered in the bytes with which the ASGI application would answer it. Everything else (a doubt
about the body, a header that asks for something, a full queue) is left to that.
"""

import logging
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

from adapters.arrays import Float32
from adapters.errors import LoraplexError
from app.http.bodies import JSON
from app.http.errors import InternalError, answer_at, known_failure
from app.http.middleware import NO_ANSWER, request_id_of
from app.observability.records import NOT_ANSWERED
from app.service import Service
from app.serving import asgi
from app.serving.asgi import BYTES_AT_ONCE, Headers, Small
from app.serving.oip import routes
from app.serving.oip.models import reference_of
from app.serving.oip.request import Header, check_named, read_infer_fast, read_request
from app.serving.oip.response import write_answer as write_infer_answer
from app.serving.queue_entry import InferenceResult, QueueEntry
from app.serving.request import InferenceRequest, read_fast
from app.serving.response import NUMBERS_AT_ONCE, write_answer, write_numbers

PREDICT_URL = asgi.ROUTE.encode()
PLAIN_URL = re.compile(rb"/v2/models/([A-Za-z0-9._-]{1,128})(?:/versions/([0-9]{1,20}))?/infer")
"""Of these, the ones with nothing in them to decode or to refuse."""
_MOST_DIGITS = 12
_ASKING_FOR_MORE = frozenset(
    {
        *(b"content-encoding", b"expect", b"transfer-encoding", b"upgrade", b"x-feature-space", b"x-request-timeout"),
        # Of a web page: `HostPolicy.check` decides.
        *(b"origin", b"sec-fetch-site"),
    }
)
_STATUS_LINE = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}

log = logging.getLogger(__name__)


class FastPathRequest(NamedTuple):
    """A request that is in the queue."""

    small: Small
    ticket: QueueEntry
    request_id: bytes
    path: str
    began: float
    headers: Mapping[bytes, bytes]


class FastPath:
    """One worker's, for all of its connections."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._batcher = service.batcher
        self._observer = service.observer
        self._accepts_host, self._accepted_hosts = service.host_policy.accepts, service.host_policy.accepted
        self.bodies = service.bodies
        known = asgi.ROUTE, routes.ROUTE, routes.VERSION_ROUTE
        self._briefs = {route: service.observer.brief(route, "POST", 200) for route in known}
        settings = service.settings
        self._most_bytes = min(BYTES_AT_ONCE, settings.max_predict_json_bytes, settings.max_body_bytes)
        self._most_rows = NUMBERS_AT_ONCE // service.base.out_features

    def may_take(self, url: bytes, headers: Headers) -> Mapping[bytes, bytes] | None:
        """Return the headers by their names if a POST with this head is worth reading here, otherwise None."""
        named = dict(headers)
        length = named.get(b"content-length", b"")
        is_ours = (
            (url == PREDICT_URL or PLAIN_URL.fullmatch(url) is not None)
            and len(named) == len(headers)
            and _ASKING_FOR_MORE.isdisjoint(named)
            and (named.get(b"host") in self._accepted_hosts or self._accepts_host(named.get(b"host")))
            and length.isdigit()
            and len(length) <= _MOST_DIGITS
            and int(length) <= self._most_bytes
            and self._batcher.has_room()
        )
        return named if is_ours else None

    def ask(self, url: bytes, named: Mapping[bytes, bytes], body: bytes, began: float) -> FastPathRequest | None:
        """Put a request, whose head was there when it `began`, into the queue; None where it is not for here."""
        read = _read_predict if url == PREDICT_URL else _read_infer
        try:
            small = read(self._service, url, named, body)
        except Exception:
            log.exception("a request to %r could not be read at once", url[:100])
            return None
        if small is None:
            return None
        rows = len(small.question.inputs_NI)
        if rows > self._most_rows or not self._batcher.has_room(rows):
            return None
        ticket = self._batcher.enter(small.question)
        return FastPathRequest(small, ticket, request_id_of(named), url.decode(), began, named)

    def answer(self, asked: FastPathRequest, given: Headers, *, keep_alive: bool) -> bytes | None:
        """The whole answer of one whose future is done, with the headers that are `given`; None where nobody waits."""
        self._batcher.leave(asked.ticket)
        if asked.ticket.future.cancelled():
            self._observe(asked, NOT_ANSWERED, NO_ANSWER)
            return None
        status, code = 200, None
        try:
            outcome = asked.ticket.future.result()
            body, headers = asked.small.written(outcome)
        except Exception as error:
            request_id = asked.request_id.decode()
            known = known_failure(error)
            if known is None:
                log.exception("POST %s failed", asked.small.route, extra={"request_id": request_id})
                known = InternalError(f"the service failed on request {request_id}; its log says why")
            code = known.code
            response = answer_at(asked.path, known)
            # Its length is among its headers, and is written below.
            status, body = response.status_code, bytes(response.body)
            headers = [header for header in response.raw_headers if header[0] != b"content-length"]
        if code is None and self._observer.is_brief:
            seconds, queued = self._briefs[asked.small.route]
            seconds.append(time.perf_counter() - asked.began)
            queued.append(outcome.queue_seconds)
        else:
            self._observe(asked, status, code)
        lines = [b"%b: %b\r\n" % header for header in (*given, *headers)]
        end = b"\r\n" if keep_alive else b"connection: close\r\n\r\n"
        return b"%bcontent-length: %d\r\n%bx-request-id: %b\r\n%b%b" % (
            _STATUS_LINE[status],
            len(body),
            b"".join(lines),
            asked.request_id,
            end,
            body,
        )

    def _observe(self, asked: FastPathRequest, status: int, code: str | None) -> None:
        small, ticket, request_id, path, began, headers = asked
        self._observer.answered(small.route, "POST", status, began, request_id, path, code, ticket, headers)


def _read_predict(service: Service, _url: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Small | None:
    """A small `POST /predict`, where it has the form that most have."""
    if headers.get(b"content-type") != JSON.encode():
        return None
    question = read_fast(body, service.base, max_rows=service.settings.max_rows, parser=service.parser)
    if question is None:
        return None
    return Small(
        question,
        lambda outcome: (
            write_answer(question, outcome, write_numbers(outcome.outputs_NO)),
            asgi.response_headers(outcome),
        ),
        asgi.ROUTE,
    )


def _read_infer(service: Service, url: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Small | None:
    """A small infer request, where it has the form that most have."""
    named = PLAIN_URL.fullmatch(url)
    if named is None:
        return None
    model, version = named[1].decode(), None if named[2] is None else named[2].decode()
    try:
        reference = reference_of(model, version)
        read = _read_header_and_rows(service, headers.get(routes.HEADER_LENGTH_NAME), body)
        if read is None or not read[0].plain:
            return None
        header, inputs_NI = read
        check_named(header, model)
    except LoraplexError:
        return None

    def written(outcome: InferenceResult) -> tuple[bytes, Headers]:
        data = None if header.binary_output else write_numbers(outcome.outputs_NO.reshape(-1))
        content, text_length = write_infer_answer(header, model, outcome.versions[0], outcome.outputs_NO, data)
        return content, routes.response_headers(outcome, text_length)

    return Small(
        InferenceRequest(inputs_NI, [reference]), written, routes.ROUTE if version is None else routes.VERSION_ROUTE
    )


def _read_header_and_rows(service: Service, length: bytes | None, body: bytes) -> tuple[Header, Float32] | None:
    columns, max_rows = service.base.in_features, service.settings.max_rows
    if length is None:
        return read_infer_fast(body, columns, max_rows, parser=service.parser)
    header_length = routes.whole_number(length)
    return read_request(body, header_length, columns, max_rows) if routes.is_quick(body, header_length) else None
