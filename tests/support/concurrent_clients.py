"""Many clients at once, each on a connection of its own, and adapters for them to ask for."""

# N rows · I in_features · O out_features
import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx
import numpy as np

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Publication, Source
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from tests.support.dense_oracle import Float64

T = TypeVar("T")
_SECONDS = 60.0
JSON = {"Content-Type": "application/json"}


class Crowd:
    """Clients of one service in one event loop; nobody waits for anybody else's answer or connection."""

    def __init__(self, base_url: httpx.URL | str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=base_url, timeout=_SECONDS, limits=limits, headers=JSON)
        self._begun: list[asyncio.Task[httpx.Response]] = []

    async def __aenter__(self) -> "Crowd":
        return self

    async def __aexit__(self, *_: object) -> None:
        # Those whose answer nobody came to read, because a check failed first.
        for task in self._begun:
            task.cancel()
        await asyncio.gather(*self._begun, return_exceptions=True)
        await self._client.aclose()

    async def ask(self, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
        """`POST /predict`; `x_request_timeout="1"` sends `X-Request-Timeout: 1`."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self._client.post("/predict", content=content, headers=names)

    def begin(self, body: bytes | dict[str, Any], **headers: str) -> asyncio.Task[httpx.Response]:
        """Begin to `ask`, and go on."""
        self._begun.append(asyncio.create_task(self.ask(body, **headers)))
        return self._begun[-1]

    async def get(self, path: str) -> httpx.Response:
        """`GET`."""
        return await self._client.get(path)


def together(
    base_url: httpx.URL | str, scene: Callable[[Crowd], Coroutine[Any, Any, T]], *, seconds: float = _SECONDS
) -> T:
    """What `scene` returns, played by one crowd."""

    async def play() -> T:
        async with asyncio.timeout(seconds), Crowd(base_url) as crowd:
            return await scene(crowd)

    return asyncio.run(play())


def post_duplicates(
    urls: Sequence[httpx.URL | str], body: Any, *, key: str, count: int, path: str = "/adapters"
) -> list[httpx.Response]:
    """The answers to one request with one idempotency key, sent many times at once to these services in turn.

    Each is sent on a connection of its own when all are open. httpx would take minutes for a thousand connections.
    """
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Idempotency-Key: {key}"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(content)}", "", ""]
    request = "\r\n".join(lines).encode() + content

    async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> httpx.Response:
        writer.write(request)
        answer = await reader.read()
        writer.close()
        head, _, received = answer.partition(b"\r\n\r\n")
        status, *fields = head.decode("latin-1").split("\r\n")
        pairs = [(name, value.strip()) for name, _, value in (field.partition(":") for field in fields)]
        return httpx.Response(int(status.split()[1]), headers=pairs, content=received)

    async def post_all() -> list[httpx.Response]:
        ports = [httpx.URL(urls[number % len(urls)]).port for number in range(count)]
        async with asyncio.timeout(4 * _SECONDS):
            streams = [await asyncio.open_connection("127.0.0.1", port) for port in ports]
            return await asyncio.gather(*(post(*stream) for stream in streams))

    return asyncio.run(post_all())


def check_duplicates(answers: Sequence[httpx.Response], job_id: str, *, is_busy: bool = False) -> Counter[str]:
    """Check that one answer queued the job, and that the others have it or are refused; count these three.

    If the database may be busy, 503 is a refusal too.
    """
    accepted = [answer for answer in answers if answer.status_code == 202]
    replayed = [answer for answer in accepted if answer.headers.get("Idempotent-Replayed") == "true"]
    refused = [code(answer) for answer in answers if answer.status_code != 202]
    assert {answer.json()["id"] for answer in accepted} == {job_id}
    assert len(accepted) - len(replayed) == 1
    busy = {(503, "catalog_busy")} if is_busy else set()
    assert set(refused) <= {(409, "idempotency_in_progress")} | busy, Counter(refused)
    return Counter(queued=1, replayed=len(replayed), refused=len(refused))


async def leave(tasks: Sequence[asyncio.Task[httpx.Response]]) -> None:
    """Let clients go away: each that has no answer yet closes its connection."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def publish(catalog: Catalog, base: BaseLayer, adapters: dict[str, Adapter]) -> None:
    """Make each of them the live version of its name, in one transaction."""
    catalog.publish(
        [
            Publication(name=name, adapter=adapter, base=base, source=Source.UPLOAD)
            for name, adapter in adapters.items()
        ],
        tenant="default",
    )


def outputs(answer: httpx.Response) -> Float64:
    """(N, O): the rows of an answer, which must be a 200."""
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["outputs"], dtype=np.float64)


def code(answer: httpx.Response) -> tuple[int, str]:
    """The status of an answer and its problem's code, which is empty where there is none."""
    problem = answer.status_code >= 400
    return answer.status_code, answer.json()["code"] if problem else ""


def check_rate(measure: Callable[[], float], rate: float, *, tolerance: float) -> None:
    """Check a rate that is accepted: never more, and no less once the machine had the time for enough requests."""
    for _ in range(3):
        accepted = measure()
        assert accepted <= (1 + tolerance) * rate, accepted
        if accepted >= (1 - tolerance) * rate:
            return
    raise AssertionError(f"{accepted} a second is less than {rate}")
