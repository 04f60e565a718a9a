"""Small requests in the form that most have, from a connection to the queue and back: no task, no ASGI, no framework.

What is taken here is answered in the bytes with which the ASGI application would answer it. Everything else (a doubt
about the body, a header that asks for something, a full queue) is left to that.
"""

import logging
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

from app.http.errors import InternalError, answer_at, known_failure
from app.http.middleware import NO_ANSWER, request_id_of
from app.http.routes import infer, predict
from app.observability.records import NOT_ANSWERED
from app.service import Service
from app.serving.asgi import Headers, Small
from app.serving.queue_entry import Ticket
from app.serving.response import BYTES_AT_ONCE, NUMBERS_AT_ONCE

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


class Asked(NamedTuple):
    """A request that is in the queue."""

    small: Small
    ticket: Ticket
    request_id: bytes
    path: str
    began: float
    headers: Mapping[bytes, bytes]


class Direct:
    """One worker's, for all of its connections."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._batcher = service.batcher
        self._observer = service.observer
        self._accepts_host, self._accepted_hosts = service.host_policy.accepts, service.host_policy.accepted
        self.bodies = service.bodies
        routes = predict.ROUTE, infer.ROUTE, infer.VERSION_ROUTE
        self._briefs = {route: service.observer.brief(route, "POST", 200) for route in routes}
        settings = service.settings
        self._most_bytes = min(BYTES_AT_ONCE, settings.max_predict_json_bytes, settings.max_body_bytes)
        self._most_rows = NUMBERS_AT_ONCE // service.base.out_features

    def may_take(self, url: bytes, headers: Headers) -> Mapping[bytes, bytes] | None:
        """Return the headers by their names if a POST with this head is worth reading here, otherwise None."""
        named = dict(headers)
        length = named.get(b"content-length", b"")
        is_ours = (
            (url == predict.URL or infer.PLAIN_URL.fullmatch(url) is not None)
            and len(named) == len(headers)
            and _ASKING_FOR_MORE.isdisjoint(named)
            and (named.get(b"host") in self._accepted_hosts or self._accepts_host(named.get(b"host")))
            and length.isdigit()
            and len(length) <= _MOST_DIGITS
            and int(length) <= self._most_bytes
            and self._batcher.has_room()
        )
        return named if is_ours else None

    def ask(self, url: bytes, named: Mapping[bytes, bytes], body: bytes, began: float) -> Asked | None:
        """Put a request, whose head was there when it `began`, into the queue; None where it is not for here."""
        read = predict.read_small if url == predict.URL else infer.read_small
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
        return Asked(small, ticket, request_id_of(named), url.decode(), began, named)

    def answer(self, asked: Asked, given: Headers, *, keep_alive: bool) -> bytes | None:
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

    def _observe(self, asked: Asked, status: int, code: str | None) -> None:
        small, ticket, request_id, path, began, headers = asked
        self._observer.answered(small.route, "POST", status, began, request_id, path, code, ticket, headers)
