"""A change that one replica has acknowledged is in every later answer of another.

`FAULT_CHANGES` is the number of changes. Each is acknowledged by one replica, and then asked for on another.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest

from tests.acceptance.replicas.acknowledged_changes import Case, Writer, operator_key
from tests.acceptance.replicas.conftest import Start
from tests.support.cluster import Cluster
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.process_tree import WORKER, Process, the
from tests.support.replica_client import Answer, Connection, question, sample

CHANGES = chosen_count("FAULT_CHANGES", 100)
_WRITERS = 3
_ROUND_TRIP_SECONDS = 0.001
_LONGEST_STOP_SECONDS = 0.03
_MOST_SHOWN = 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(scaled(240 + CHANGES))]


def test_no_acknowledged_change_is_missing_on_the_other_replica(start: Start) -> None:
    with recorded("coherence", chosen_seed()) as counts:
        _change_and_ask(start(auth="keys"), counts)


def test_no_acknowledged_change_is_missing_with_a_slow_network(start: Start) -> None:
    with recorded("slow coherence", chosen_seed()) as counts:
        _change_and_ask(start(auth="keys", delay_seconds=_ROUND_TRIP_SECONDS), counts)


def _change_and_ask(cluster: Cluster, counts: Counter[str]) -> None:
    """Let several writers at once make changes on either replica and ask the other."""
    key = operator_key(cluster.database_url)
    draw = random.Random(chosen_seed())
    wrong: list[str] = []

    def write(number: int, seed: int) -> Counter[str]:
        mine: Counter[str] = Counter()
        writer = Writer(f"name-{number}", random.Random(seed))
        with ExitStack() as stack:
            ends = [stack.enter_context(closing(Connection(api.port, key))) for api in cluster.apis]
            for _ in range(CHANGES // _WRITERS + 1):
                changes_on, asks_on = writer.draw.sample(ends, 2)
                case = writer.case()
                answer = case.change.to(changes_on)
                while _is_busy(answer):
                    # A writer that gets no processor time keeps the lock for seconds. Nothing was stored.
                    mine["changes refused: catalog_busy"] += 1
                    answer = case.change.to(changes_on)
                case.acknowledge(answer)
                _count(case, case.check(case.question().to(asks_on)), mine, wrong)
        return mine

    with ThreadPoolExecutor(_WRITERS) as threads:
        for mine in threads.map(write, range(_WRITERS), [draw.getrandbits(64) for _ in range(_WRITERS)]):
            counts.update(mine)
    assert not wrong, wrong[:_MOST_SHOWN]
    assert counts["cases"] >= CHANGES


def test_no_acknowledged_change_is_missing_on_a_replica_that_was_stopped(start: Start) -> None:
    """It is stopped before, during or after the change, under load, and asked before or after it goes on."""
    cluster = start(auth="keys")
    key = operator_key(cluster.database_url)
    draw = random.Random(chosen_seed())
    writer = Writer("name", random.Random(draw.getrandbits(64)))
    worker = the(cluster.apis[1].process.pid, WORKER)
    wrong: list[str] = []
    with recorded("stopped coherence", chosen_seed()) as counts:
        with ExitStack() as stack:
            first, other = (
                stack.enter_context(closing(Connection(cluster.apis[number].port, key))) for number in range(2)
            )
            stack.enter_context(_load(cluster, key, counts))
            while counts["cases"] < CHANGES:
                case = writer.case()
                answer = _change_around_a_stop(case, first, other, worker, draw, counts)
                _count(case, answer, counts, wrong)
        assert not wrong, wrong[:_MOST_SHOWN]
        assert counts["answers to the load"] > 0


def _change_around_a_stop(
    case: Case, first: Connection, other: Connection, worker: Process, draw: random.Random, counts: Counter[str]
) -> str | None:
    """Stop the second replica around a change of the first; return what is wrong with its answer."""
    other.connect()
    how = draw.choice(("stopped before the change", "stopped during the change", "stopped after the change"))
    counts[how] += 1
    if how == "stopped before the change":
        worker.suspend()
    try:
        case.change.send(first)
        if how == "stopped during the change":
            time.sleep(draw.uniform(0, 0.01))
            worker.suspend()
        answer = first.receive()
        if _is_busy(answer):
            # The replica was stopped while it held the lock, and nothing was stored.
            counts["changes refused: catalog_busy"] += 1
            worker.resume()
            answer = case.change.to(first)
        case.acknowledge(answer)
        if how == "stopped after the change":
            worker.suspend()
        is_asked_before = draw.random() < 0.5
        if is_asked_before:
            case.question().send(other)
            counts["asked while stopped"] += 1
        time.sleep(draw.uniform(0, _LONGEST_STOP_SECONDS))
    finally:
        worker.resume()
    if not is_asked_before:
        case.question().send(other)
    return case.check(other.receive())


def _is_busy(answer: Answer) -> bool:
    return answer.status == 503 and answer.body["code"] == "catalog_busy" and "retry-after" in answer.headers


def _count(case: Case, mistake: str | None, counts: Counter[str], wrong: list[str]) -> None:
    counts["cases"] += 1
    counts[case.kind] += 1
    counts["stale answers"] += mistake is not None
    if mistake is not None:
        wrong.append(f"{case.kind}: {mistake}")


@contextmanager
def _load(cluster: Cluster, key: str, counts: Counter[str], *, number: int = 1) -> Iterator[None]:
    """Ask a replica without a pause meanwhile, so that there is a reading of the revision at any moment."""
    stop = threading.Event()
    names: Sequence[str] = ("load-0", "load-1")

    def ask(name: str) -> int:
        connection, answers = Connection(cluster.apis[number].port, key), 0
        while not stop.is_set():
            answer = connection.ask("POST", "/predict", question(name))
            assert answer.status == 200, answer
            answers += 1
        connection.close()
        return answers

    publisher = Connection(cluster.apis[0].port, key)
    for seed, name in enumerate(names):
        assert publisher.ask("PUT", f"/adapters/{name}", sample(seed).body).status == 201
    publisher.close()
    with ThreadPoolExecutor(len(names)) as threads:
        asking = [threads.submit(ask, name) for name in names]
        try:
            yield
        finally:
            stop.set()
        counts["answers to the load"] += sum(each.result(scaled(30)) for each in asking)
