"""Random streams of requests, with what each must be answered with, known from how it was made."""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

IN = 4
VICTIM = "victim"
MAX_HEAD_BYTES = 4096
NOT_OURS = "smuggled"
"""In the id of every request that only a body holds."""
_ROW = [1.0, 2.0, 3.0, 4.0]
_PREDICT = json.dumps({"adapter": None, "inputs": [_ROW]}).encode()
_INFER = json.dumps(
    {"inputs": [{"name": "inputs", "shape": [1, IN], "datatype": "FP32", "data": _ROW}], "id": "i"}
).encode()
_JSON = b"Content-Type: application/json"
_UPGRADES = (
    (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"),
    (b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
    (b"Upgrade: TLS/1.0", b"Connection: Upgrade"),
    (b"Upgrade: h2c",),
    (b"Connection: upgrade",),
)
_TRAILERS = (
    b"",
    b"X-Checksum: 1\r\n",
    b"Content-Type: text/plain\r\nX-Request-Id: smuggled-trailer\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
)
_AMBIGUOUS = (
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    b"Content-Length: 5\r\nContent-Length: 5",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 5, 5",
    b"Content-Length: +5",
    b"Content-Length: 0x5",
    b"Content-Length: -5",
    b"Content-Length:",
    b"Content-Length: 99999999999999999999999",
    b"Content-Length : 5",
    b"Content-Length:\r\n 5",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, gzip",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: xchunked",
    b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding:\r\n chunked",
    b"X: a\r\n b",
    b"X: a\nContent-Length: 5",
    b"X: a\rContent-Length: 5",
    b"X: a\0b",
    b" X: a",
    b"no colon",
    b": no name",
)
_BAD_TARGETS = (
    b"http://[::1",
    b"http://a:99999999/",
    b"http://x",
    b"http://x?a=b",
    b"http:///adapters/victim",
    b"http://x:y/",
    b"/\x80",
)
_BAD_CHUNKS = (
    b"0x5\r\nhello",
    b"-5\r\nhello",
    b"5\nhello",
    b"5 \r\nhello",
    b"4\r\nhello",
    b"5\r\nhello\n0\r\n\r\n",
    b"x\r\n",
    b"ffffffffffffffffff\r\n",
    b'5;a="\r\n"\r\nhello',
    b"0\r\nContent-Length: 5\r\n\r\n",
    b"5;a\nhello",
)

REFUSED = (*_AMBIGUOUS, *_BAD_TARGETS, *_BAD_CHUNKS)
"""Of these each is refused for a reason of its own."""


@dataclass
class Expected:
    """One answer. Without an id, it is to something that was not read as far as its id, or is refused for its head."""

    status: int
    request_id: bytes | None
    has_body: bool = True


@dataclass
class Stream:
    """What one connection sends, and what comes back before it is closed."""

    sent: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    is_cut: bool = False
    """Whether the last request is not complete: the service waits for the rest."""


class Maker:
    """Makes streams, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._count = 0

    def stream(self) -> Stream:
        """Return the next stream: one to four requests, cut into pieces."""
        stream, draw = Stream(), self._random
        is_open = True
        for _ in range(draw.choice((1, 1, 2, 3))):
            is_bad = is_open and draw.random() < 0.2
            is_open = self._add_bad(stream) if is_bad else self._add_good(stream, is_open)
        if is_open:
            if draw.random() < 0.15:
                message, _, _ = self._good(reads_body=True)
                stream.sent += message[: draw.randrange(1, len(message))]
                stream.is_cut = True
            else:
                self._add_good(stream, True, last=True)
        cuts = draw.choice((0, 0, 1, 2, 3, 8))
        places = sorted({0, len(stream.sent), *(draw.randrange(len(stream.sent)) for _ in range(cuts))})
        stream.pieces = [stream.sent[begin:end] for begin, end in pairwise(places)]
        return stream

    def _add_good(self, stream: Stream, is_open: bool, *, last: bool = False) -> bool:
        message, expected, closes = self._good(last=last)
        stream.sent += message
        if is_open:
            stream.expected.append(expected)
        return is_open and not closes

    def _good(self, *, last: bool = False, reads_body: bool = False) -> tuple[bytes, Expected, bool]:
        """Return a request that is one, its answer, and whether the connection is closed after it.

        If it `reads_body`, it is not answered before all of it is there.
        """
        draw = self._random
        after_body = (
            (b"POST", b"/predict", _PREDICT, 200),
            (b"POST", b"/predict", _PREDICT, 200),
            (b"POST", b"/predict", self._body_like_requests(), 400),
            (b"POST", b"/v2/models/__base__/infer", _INFER, 200),
            (b"POST", b"/v2/models/__base__/infer", self._body_like_requests(), 400),
            (b"PUT", b"/adapters/new", self._body_like_requests(), 400),
        )
        at_once = (
            (b"POST", b"/nothing", self._body_like_requests(), 404),
            (b"DELETE", b"/adapters/absent", self._body_like_requests(), 404),
            (b"DELETE", b"/adapters/absent", b"", 404),
            (b"GET", b"/healthz", b"", 200),
            (b"GET", b"/healthz?a=b", self._body_like_requests(), 200),
            (b"GET", b"http://x/adapters/absent", b"", 404),
            (b"HEAD", b"/nothing", b"", 404),
            (b"OPTIONS", b"/predict", b"", 405),
        )
        method, path, body, status = draw.choice(after_body if reads_body else after_body + at_once)
        request_id, version, closes = self._id(), b"1.1", last
        headers = [b"Host: x", b"X-Request-Id: " + request_id]
        if body:
            headers.append(_JSON)
        upgrade = draw.random() < 0.3
        if upgrade:
            headers += draw.choice(_UPGRADES)
        elif draw.random() < 0.1:
            headers.append(b"Connection: keep-alive")
        if draw.random() < 0.1 and body:
            headers.append(b"Expect: 100-continue")
        if last or draw.random() < 0.05:
            headers.append(b"Connection: close")
            closes = True
        chunked = bool(body) and draw.random() < 0.4
        if draw.random() < 0.05 and not chunked:
            version, closes = b"1.0", True
        if chunked:
            headers.append(draw.choice((b"Transfer-Encoding: chunked", b"transfer-encoding:  CHUNKED ")))
            content = self._chunks(body)
        else:
            content = body
            if body or draw.random() < 0.2:
                headers.append(
                    draw.choice((b"Content-Length: %d", b"content-length:%d", b"CONTENT-LENGTH: 0%d ")) % len(body)
                )
        draw.shuffle(headers)
        head = b"%b %b HTTP/%b\r\n%b\r\n\r\n" % (method, path, version, b"\r\n".join(headers))
        before = draw.choice((b"", b"", b"", b"\r\n"))
        return before + head + content, Expected(status, request_id, method != b"HEAD"), closes

    def _add_bad(self, stream: Stream) -> bool:
        """Add something that is refused; return False, because nothing after it is read."""
        draw = self._random
        kind = draw.randrange(7)
        request_id = self._id()
        method, path = draw.choice(((b"POST", b"/predict"), (b"DELETE", b"/adapters/" + VICTIM.encode())))
        line = b"%b %b HTTP/1.1\r\nHost: x\r\n" % (method, path)
        upgrade = b"\r\n".join((*draw.choice(_UPGRADES), b"")) if draw.random() < 0.3 else b""
        tail = b"5\r\nhello\r\n0\r\n\r\n" + self._body_like_requests()
        if kind <= 1:
            stream.sent += line + upgrade + draw.choice(_AMBIGUOUS) + b"\r\n\r\n" + tail
            stream.expected.append(Expected(400, None))
        elif kind == 2:
            head = b"POST /predict HTTP/1.1\r\nHost: x\r\n" + upgrade + _JSON + b"\r\nTransfer-Encoding: chunked\r\n"
            stream.sent += head + b"X-Request-Id: %b\r\n\r\n" % request_id + draw.choice(_BAD_CHUNKS) + b"\r\n" + tail
            stream.expected.append(Expected(400, request_id))
        elif kind == 3:
            stream.sent += b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n" + self._body_like_requests()
            stream.expected.append(Expected(400, None))
        elif kind == 4:
            size = draw.choice((MAX_HEAD_BYTES + 1, 2 * MAX_HEAD_BYTES, 5 * MAX_HEAD_BYTES))
            filler = b"".join(b"X-%d: %b\r\n" % (n, b"x" * 90) for n in range(size // 90))
            header = draw.choice((filler, b"X-Long: %b\r\n" % (b"x" * size)))
            stream.sent += line + upgrade + header + b"\r\n" + self._body_like_requests()
            stream.expected.append(Expected(431, None))
        elif kind == 5:
            request = b"%b %b HTTP/1.1\r\nHost: x\r\n" % (method, draw.choice(_BAD_TARGETS))
            stream.sent += request + upgrade + b"Content-Length: 5\r\n\r\n" + tail
            stream.expected.append(Expected(400, None))
        else:
            stream.sent += draw.choice(
                (b"nonsense\r\n\r\n", b"GET /\r\nHost: x\r\n\r\n", b"\0\1\2", b"GET / HTTP/1.1\nHost: x\n\n")
            )
            stream.expected.append(Expected(400, None))
        return False

    def _chunks(self, body: bytes) -> bytes:
        draw, at, parts = self._random, 0, []
        while at < len(body):
            size = draw.choice((1, 7, len(body)))
            part = body[at : at + size]
            at += size
            extension = draw.choice((b"", b"", b";a", b";a=b", b';a="b c"'))
            parts.append(b"%x%b\r\n%b\r\n" % (len(part), extension, part))
        return b"".join(parts) + b"0\r\n" + draw.choice(_TRAILERS) + b"\r\n"

    def _body_like_requests(self) -> bytes:
        """Return requests that nobody has sent as such: a victim's deletion and a prediction."""
        first = b"DELETE /adapters/%b HTTP/1.1\r\nHost: x\r\nX-Request-Id: %b-%b\r\n\r\n" % (
            VICTIM.encode(),
            NOT_OURS.encode(),
            self._id(),
        )
        second = b"GET /healthz HTTP/1.1\r\nX-Request-Id: %b-%b\r\n\r\n" % (NOT_OURS.encode(), self._id())
        return self._random.choice((first, first + second))

    def _id(self) -> bytes:
        self._count += 1
        return b"r%d" % self._count
