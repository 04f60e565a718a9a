"""Requests that wait together run together, and each gets what it would have got alone."""

# N rows · I in_features · O out_features
import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from adapters.access.grants import OPEN_GRANT, Caller, Grant
from adapters.errors import QueueFull
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.names import Reference
from app.service import Service
from app.serving.queue_entry import EntrySlice, InferenceResult
from app.serving.request import InferenceRequest as Rows
from app.settings import Settings
from tests.support import dense_oracle as dense
from tests.support.concurrent_clients import Crowd, outputs, publish, together
from tests.support.dense_oracle import Float64, random_adapter
from tests.support.service import serving

TOLERANCE = 1e-5
RANKS = [1, 2, 3, 4, 5, 8, 13, 16, 31, 32, 63, 64]
ROWS = [1, 1, 1, 1, 2, 3, 7, 40]
ROUNDS, CLIENTS = 3, 32
Body = dict[str, Any]


class Tenants:
    """A service with two adapters of each rank, one of them with a bias, and what each must answer."""

    def __init__(self, client: httpx.Client, service: Service) -> None:
        self.url, self.client, self.service = client.base_url, client, service
        base = service.base
        # Scaled so that no term drowns the others.
        adapters = {
            f"rank-{rank}-{bias}": random_adapter(
                base.out_features,
                base.in_features,
                rank,
                alpha=rank**0.5 * (1 + rank % 3),
                rslora=rank % 2 == 1,
                bias=bias,
                seed=rank,
            )
            for rank in RANKS
            for bias in (False, True)
        }
        publish(service.catalog, base, adapters)
        ones_II, zero_1I = torch.eye(base.in_features), torch.zeros(1, base.in_features)
        self.layers: dict[str | None, tuple[Float64, Float64]] = {}
        """For each name (None: the base) the dense layer, (I, O) and (O,)."""
        for name in (None, *adapters):
            adapter = None if name is None else adapters[name]
            shift_O = dense.answer(base, zero_1I, adapter)[0]
            self.layers[name] = dense.answer(base, ones_II, adapter) - shift_O, shift_O

    def together(self, bodies: Sequence[Body]) -> list[httpx.Response]:
        """Ask all of these at once, each over a connection of its own."""

        async def scene(crowd: Crowd) -> list[httpx.Response]:
            return await asyncio.gather(*map(crowd.ask, bodies))

        return together(self.url, scene)


class Question:
    """A request whose rows ask for adapters drawn at random."""

    def __init__(self, tenants: Tenants, draw: random.Random, *, rows: int | None = None) -> None:
        self.tenants = tenants
        rows = draw.choice(ROWS) if rows is None else rows
        names = list(tenants.layers)
        self.by_row = draw.random() < 0.5
        self.name_N = draw.choices(names, k=rows) if self.by_row else [draw.choice(names)] * rows
        # Quarters: exact in float32, and short in JSON.
        width = tenants.service.base.in_features
        self.x_NI = np.random.default_rng(draw.getrandbits(62)).integers(-20, 20, (rows, width)) / 4

    def body(self) -> Body:
        """As it is sent."""
        which: Body = {"adapters": self.name_N} if self.by_row else {"adapter": self.name_N[0]}
        return which | {"inputs": self.x_NI.tolist()}

    def check(self, answer: httpx.Response) -> None:
        """Its own rows in its own order, each by the adapter that it asked for."""
        y_NO, said = outputs(answer), answer.json()
        if self.by_row:
            named = [None if place is None else said["adapters"][place]["name"] for place in said["row_adapters"]]
        else:
            named = [said["adapter"] and said["adapter"]["name"]] * len(self.name_N)
        assert named == self.name_N
        assert self.worst(y_NO, np.array([self._row(*pair) for pair in zip(self.x_NI, self.name_N, strict=True)])) < 1

    def worst(self, given_NO: Float64, wanted_NO: Float64) -> float:
        """The largest error, in tolerances of what was added up for its row."""
        assert given_NO.shape == wanted_NO.shape
        plain_NO = np.array([self._row(x_I, None) for x_I in self.x_NI])
        scale_N = np.abs(plain_NO).max(axis=1) + np.abs(wanted_NO - plain_NO).max(axis=1)
        return float((np.abs(given_NO - wanted_NO).max(axis=1) / scale_N).max()) / TOLERANCE

    def _row(self, x_I: Float64, name: str | None) -> Float64:
        layer_IO, shift_O = self.tenants.layers[name]
        return x_I @ layer_IO + shift_O


@pytest.fixture(scope="module", params=["random:64,10,7", "identity:96", "random:384,384,3"])
def tenants(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Tenants]:
    with serving(Settings(base=request.param, data_dir=tmp_path_factory.mktemp("data"))) as running:
        yield Tenants(*running)


def test_every_request_of_a_crowd_gets_its_own_rows(tenants: Tenants) -> None:
    draw = random.Random(1)
    for _ in range(ROUNDS):
        # One that is larger than a batch may be, among many that are not.
        questions = [Question(tenants, draw, rows=300), *(Question(tenants, draw) for _ in range(CLIENTS))]
        draw.shuffle(questions)
        answers = tenants.together([question.body() for question in questions])
        for question, answer in zip(questions, answers, strict=True):
            question.check(answer)


def test_a_request_has_the_same_answer_alone_and_in_a_crowd(tenants: Tenants) -> None:
    draw = random.Random(2)
    one, others = Question(tenants, draw, rows=9), [Question(tenants, draw) for _ in range(CLIENTS)]
    alone = outputs(tenants.client.post("/predict", json=one.body()))
    first, *_, last = tenants.together([question.body() for question in [one, *others, one]])
    assert max(one.worst(outputs(answer), alone) for answer in (first, last)) < 1


def _only_these_fail(tenants: Tenants, bad: Sequence[tuple[Body, dict[str, Any]]]) -> None:
    """Ask for each of `bad`, which have these problems, three times in the middle of a crowd that has none."""
    draw = random.Random(3)
    questions = [Question(tenants, draw) for _ in range(CLIENTS)]
    asked: list[tuple[Body, Question | dict[str, Any]]] = [(question.body(), question) for question in questions]
    asked += [*bad] * 3
    draw.shuffle(asked)
    for (_, wanted), answer in zip(asked, tenants.together([body for body, _ in asked]), strict=True):
        if isinstance(wanted, Question):
            wanted.check(answer)
        else:
            problem = answer.json()
            assert {member: problem.get(member) for member in wanted} == wanted


def test_an_output_that_is_not_finite_is_the_error_of_its_request_alone(tenants: Tenants) -> None:
    base = tenants.service.base
    plain = random_adapter(base.out_features, base.in_features, 4)
    huge = Adapter(plain.a_OR * 1e30, plain.b_RI * 1e30, None, alpha=4.0)
    publish(tenants.service.catalog, base, {"huge": huge})
    ones, large = [1.0] * base.in_features, [3e38] * base.in_features
    problem = {"status": 422, "code": "output_not_finite", "field": "inputs", "row": 2}
    by_row = {"adapters": [None, "rank-8-True", "huge", "rank-64-False"], "inputs": [ones] * 4}
    first = {"adapter": "huge", "inputs": [ones] * 2}
    by_inputs = {"adapter": "rank-64-False", "inputs": [ones, ones, large]}
    _only_these_fail(tenants, [(by_row, problem), (first, problem | {"row": 0}), (by_inputs, problem)])


def _harm(service: Service, name: str) -> None:
    file = service.catalog.blobs.local(service.catalog.find(Reference(name), tenant="default").file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_an_adapter_that_cannot_answer_is_the_error_of_its_request_alone(tenants: Tenants) -> None:
    service, base = tenants.service, tenants.service.base

    def make(name: str, *, on: BaseLayer = base) -> None:
        publish(service.catalog, on, {name: random_adapter(base.out_features, base.in_features, 3, seed=len(name))})

    for name in ("deleted", "corrupt"):
        make(name)
    make("foreign", on=load_base_layer(f"zeros:{base.in_features},{base.out_features}"))
    service.catalog.delete("deleted", tenant="default")
    _harm(service, "corrupt")
    wrong = {
        "nobody": (404, "adapter_not_found"),
        "deleted": (404, "adapter_not_found"),
        "deleted@1": (404, "adapter_not_found"),
        "rank-8-True@1000": (404, "version_not_found"),
        "rank-8-True@nothing": (404, "alias_not_found"),
        "corrupt": (503, "blob_corrupt"),
        "foreign": (409, "base_mismatch"),
        "no name": (422, "invalid_name"),
    }
    ones = [1.0] * base.in_features
    bad: list[tuple[Body, dict[str, Any]]] = []
    for name, (status, problem_code) in wrong.items():
        problem: dict[str, Any] = {"status": status, "code": problem_code}
        where = {} if name == "corrupt" else {"field": "adapters", "row": 2}
        by_row = {"adapters": ["rank-8-True", None, name, name], "inputs": [ones] * 4}
        bad += [(by_row, problem | where), ({"adapter": name, "inputs": [ones] * 4}, problem)]
    _only_these_fail(tenants, bad)


def _grant(tenant: str) -> Grant:
    return Grant(Caller(None, tenant, frozenset()))


def test_a_full_queue_still_takes_the_requests_of_a_quiet_tenant(tmp_path: Path) -> None:
    service = Service(Settings(data_dir=tmp_path, base="identity:4", queue_rows=8, max_batch_rows=4))
    batcher, order = service.batcher, list[str]()

    async def ask(tenant: str, rows: int = 1) -> None:
        await batcher.infer(Rows(np.ones((rows, 4), np.float32), [None]), _grant(tenant))
        order.append(tenant)

    async def scene() -> None:
        # As if a batch were being computed all the time.
        batcher._is_running = True
        asked = [asyncio.create_task(ask("busy")) for _ in range(8)]
        await asyncio.sleep(0)
        assert not batcher.has_room("busy")
        # One request of any size, then more up to its share: a half.
        assert batcher.has_room("quiet", 100)
        asked += [asyncio.create_task(ask("quiet", rows)) for rows in (2, 1)]
        await asyncio.sleep(0)
        assert batcher.has_room("quiet")
        assert not batcher.has_room("quiet", 2)
        with pytest.raises(QueueFull):
            await batcher.admit("busy")
        batcher._is_running = False
        batcher._schedule()
        await asyncio.gather(*asked)
        assert batcher.state().rows == 0

    asyncio.run(scene())
    service.close()
    # Two rows of each tenant in each batch, as long as both have some.
    assert sorted(order[:4]) == ["busy", "busy", "quiet", "quiet"]
    assert order[4:] == ["busy"] * 6


def test_requests_that_wait_share_a_batch_equally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(Settings(data_dir=tmp_path, base="identity:4", max_batch_rows=9))
    batcher = service.batcher
    draw = np.random.default_rng(1)
    inputs = [draw.normal(size=(rows, 4)).astype(np.float32) for rows in (20, 5, 1)]
    batches: list[dict[int, tuple[int, int]]] = []
    run = batcher._run

    def record(slices: list[EntrySlice]) -> None:
        batches.append({part.entry.rows: (part.begin, part.end) for part in slices})
        run(slices)

    monkeypatch.setattr(batcher, "_run", record)

    async def ask_together() -> list[InferenceResult]:
        return await asyncio.gather(*(batcher.infer(Rows(x_NI, [None]), OPEN_GRANT) for x_NI in inputs))

    outcomes = asyncio.run(ask_together())
    service.close()

    # A request that needs less than its share leaves the rest of it to the others.
    assert batches == [{20: (0, 4), 5: (0, 4), 1: (0, 1)}, {20: (4, 12), 5: (4, 5)}, {20: (12, 20)}]
    for x_NI, outcome in zip(inputs, outcomes, strict=True):
        np.testing.assert_allclose(outcome.outputs_NO, x_NI, rtol=TOLERANCE)
