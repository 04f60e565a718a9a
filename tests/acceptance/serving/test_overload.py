"""More work than one worker has time for: who is refused, who goes first, and who is dropped.

Work is made slow by an adapter of a rank far past what anybody trains, and by small batches: its bodies stay small,
and nothing depends on how fast this machine is, only on how long one piece of work takes beside another.
"""

# N rows · I in_features · O out_features · R rank
import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.catalog.catalog import Catalog
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import load_base_layer
from tests.support import dense_oracle as dense
from tests.support.concurrent_clients import JSON, Crowd, code, leave, outputs, publish, together
from tests.support.dense_oracle import Float64, random_adapter
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.timing

BASE = load_base_layer("random:256,4,7")
I, O = BASE.in_features, BASE.out_features
HEAVY_RANK = 2**13
QUEUE_ROWS, BATCH_ROWS = 1024, 2
SHARES = 8
"""Requests that together fill the queue to its last row."""
TOLERANCE = 1e-5

ADAPTERS: dict[str | None, Adapter | None] = {
    None: None,
    "light": random_adapter(O, I, 4),
    "heavy": random_adapter(O, I, HEAVY_RANK, alpha=HEAVY_RANK**0.5),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One worker with a short queue, small batches, and a heavy adapter that is in memory."""
    folder = tmp_path_factory.mktemp("service") / "data"
    catalog = Catalog(folder, now=time.time)
    publish(catalog, BASE, {name: adapter for name, adapter in ADAPTERS.items() if name and adapter})
    catalog.database.close()
    settings: dict[str, Any] = {
        "base": BASE.source,
        "queue_rows": QUEUE_ROWS,
        "max_batch_rows": BATCH_ROWS,
        "max_rank": HEAVY_RANK,
    }
    with ServiceProcess(folder, trainers=0, **settings) as started:
        for name in ("light", "heavy"):
            Question(name, 1).check(started.client.post("/predict", content=Question(name, 1).body, headers=JSON))
        yield started


class Question:
    """Rows for one adapter, and what they must answer."""

    def __init__(self, name: str | None, rows: int, *, seed: int = 0) -> None:
        self.x_NI = np.random.default_rng(seed).integers(0, 10, (rows, I))
        self.body = json.dumps({"adapter": name, "inputs": self.x_NI.tolist()}).encode()
        self._layer_OI, self._shift_O = LAYERS[name]

    def check(self, answer: httpx.Response) -> None:
        """Every row, against float64."""
        wanted_NO = self.x_NI @ self._layer_OI.T + self._shift_O
        assert dense.relative_error(outputs(answer), wanted_NO) < TOLERANCE


def _layer(adapter: Adapter | None) -> tuple[Float64, Float64]:
    weight_OI = BASE.weight_OI.double().numpy()
    shift_O = np.zeros(O) if BASE.bias_O is None else BASE.bias_O.double().numpy()
    return weight_OI if adapter is None else weight_OI + dense.delta(adapter), shift_O


LAYERS = {name: _layer(adapter) for name, adapter in ADAPTERS.items()}
SHARE = Question("heavy", QUEUE_ROWS // SHARES, seed=1)
WHOLE_QUEUE = Question(None, QUEUE_ROWS, seed=2)
SINGLES = [Question(name, 1, seed=3) for name in ("light", None)]


def _is_refused(answer: httpx.Response) -> bool:
    """Whether it was: then properly, and otherwise it is a 200."""
    if answer.status_code == 200:
        return False
    assert code(answer) == (429, "queue_full"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    return True


def _check_it_is_idle(service: ServiceProcess) -> None:
    """It answers as if nothing had been: small requests, and one that needs all of the queue."""
    for question in [*SINGLES, WHOLE_QUEUE]:
        question.check(service.client.post("/predict", content=question.body, headers=JSON))


async def _fill(crowd: Crowd) -> list[asyncio.Task[httpx.Response]]:
    """Ask for more than the queue holds; returns, once it has refused something, all that it has taken."""
    asked = [crowd.begin(SHARE.body) for _ in range(SHARES + SHARES // 2)]
    waiting = set(asked)
    refused: set[asyncio.Task[httpx.Response]] = set()
    # On a busy machine something may have been answered meanwhile.
    while not refused:
        assert waiting, "the queue was never full"
        answered, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        refused = {task for task in answered if _is_refused(task.result())}
    return [task for task in asked if task not in refused]


def test_a_full_queue_refuses_what_it_has_no_room_for_and_answers_the_rest(service: ServiceProcess) -> None:
    burst = [Question(name, QUEUE_ROWS // 10, seed=seed) for seed, name in enumerate(("light", None) * 8)]

    async def scene(crowd: Crowd) -> tuple[int, int]:
        backlog = await _fill(crowd)
        refused = answered = 0
        for _ in range(4):
            answers = await asyncio.gather(*(crowd.ask(question.body) for question in burst))
            for question, answer in zip(burst, answers, strict=True):
                if _is_refused(answer):
                    refused += 1
                else:
                    question.check(answer)
                    answered += 1
        in_time = [answer for answer in await asyncio.gather(*backlog) if not _is_refused(answer)]
        assert len(in_time) >= SHARES
        for answer in in_time:
            SHARE.check(answer)
        return refused, answered

    refused, answered = together(service.client.base_url, scene)
    print(f"{refused} refused, {answered} answered")
    assert refused > len(burst) / 4
    _check_it_is_idle(service)


def test_a_refusal_does_not_wait_for_the_body(service: ServiceProcess) -> None:
    head = (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )

    async def scene(crowd: Crowd) -> bytes:
        backlog = await _fill(crowd)
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(head)
        status = await asyncio.wait_for(reader.readline(), 30)
        writer.close()
        await asyncio.gather(*backlog)
        return status

    assert together(service.client.base_url, scene).split()[1] == b"429"


def test_a_request_larger_than_the_queue_is_answered_when_nobody_waits(service: ServiceProcess) -> None:
    for name in ("light", None):
        question = Question(name, 3 * QUEUE_ROWS)
        question.check(service.client.post("/predict", content=question.body, headers=JSON))


def test_single_rows_pass_a_large_request_and_do_not_wait_for_its_end(service: ServiceProcess) -> None:
    large = [Question("heavy", QUEUE_ROWS // 3, seed=seed) for seed in range(2)]

    async def scene(crowd: Crowd) -> tuple[float, list[float]]:
        begin = time.perf_counter()
        asked = [crowd.begin(question.body) for question in large]
        waits = []
        # The time of the first to end: until then, every single row has met both of them.
        ended = asyncio.ensure_future(asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED))
        while not ended.done():
            for question in SINGLES:
                asked_at = time.perf_counter()
                question.check(await crowd.ask(question.body))
                if not ended.done():
                    waits.append(time.perf_counter() - asked_at)
        seconds = time.perf_counter() - begin
        for question, task in zip(large, asked, strict=True):
            question.check(await task)
        return seconds, waits

    seconds, waits = together(service.client.base_url, scene)
    typical, slow = np.quantile(waits, [0.5, 0.9])
    print(f"{len(waits)} single rows in {seconds:.2f} s: {typical * 1e3:.1f} ms, slow {slow * 1e3:.1f} ms")
    # Hundreds of batches were computed; the bounds leave room for whoever else uses this machine's cores.
    assert len(waits) > 10
    assert typical < seconds / 10
    assert slow < seconds / 4


async def _seconds_to_room(crowd: Crowd) -> float:
    """How long it takes until there is room for as many rows as the queue has."""
    begin = time.perf_counter()
    while _is_refused(answer := await crowd.ask(WHOLE_QUEUE.body)):
        pass
    WHOLE_QUEUE.check(answer)
    return time.perf_counter() - begin


@pytest.mark.parametrize("because", ["their clients went away", "their time is up"])
def test_requests_that_nobody_waits_for_leave_the_queue(service: ServiceProcess, because: str) -> None:
    async def scene(crowd: Crowd) -> tuple[float, float]:
        begin = time.perf_counter()
        await asyncio.gather(*await _fill(crowd))
        whole = time.perf_counter() - begin
        if because == "their clients went away":
            await leave(await _fill(crowd))
            return whole, await _seconds_to_room(crowd)
        begin = time.perf_counter()
        brief = {"x_request_timeout": f"{whole / 10:.4f}"}
        for answer in await asyncio.gather(*(crowd.ask(SHARE.body, **brief) for _ in range(SHARES))):
            assert code(answer) == (503, "request_timeout"), answer.text
            assert int(answer.headers["retry-after"]) >= 1
        assert time.perf_counter() - begin < 0.75 * whole
        return whole, await _seconds_to_room(crowd)

    whole, to_room = together(service.client.base_url, scene)
    print(f"the whole backlog takes {whole:.2f} s; without those who left there is room after {to_room:.2f} s")
    assert to_room < whole / 2
    _check_it_is_idle(service)


def test_a_client_that_waits_only_briefly_costs_those_behind_it_nothing(service: ServiceProcess) -> None:
    patient = SINGLES[0]

    async def scene(crowd: Crowd) -> None:
        backlog = [crowd.begin(SHARE.body) for _ in range(SHARES // 2)]
        brief = crowd.ask(SHARE.body, x_request_timeout="0.001")
        answers = await asyncio.gather(brief, crowd.ask(patient.body, x_request_timeout="60"))
        assert code(answers[0]) == (503, "request_timeout")
        patient.check(answers[1])
        for answer in await asyncio.gather(*backlog):
            SHARE.check(answer)

    together(service.client.base_url, scene)
