"""PostgreSQL ends without a warning and comes back, under load; and answers from memory meanwhile, if they are allowed.

`FAULT_DATABASE_RESTARTS` is the number of restarts, and `FAULT_STALE_SECONDS` the value of `MAX_STALE_SECONDS`.
"""

import math
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from tests.acceptance.replicas.conftest import Start
from tests.acceptance.replicas.replica_load import PREDICT, ReplicaLoad
from tests.support.cluster import Cluster, Replica
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.postgres_server import PostgresServer
from tests.support.replica_client import Connection, question, sample

RESTARTS = chosen_count("FAULT_DATABASE_RESTARTS", 2)
STALE_SECONDS = chosen_count("FAULT_STALE_SECONDS", 3)
_LONGEST_LOAD_SECONDS, _LONGEST_OUTAGE_SECONDS = 1.0, 2.0
_SECONDS_TO_ANSWER = 2.0
# A request may be under way when the server is killed or when the time ends.
_MARGIN_SECONDS = 1.0
_NEEDED = ("/adapters", "/jobs", "/readyz")
_NOT_NEEDED = ("/healthz", "/base")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(scaled(240 + 30 * RESTARTS + 2 * STALE_SECONDS))]


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with closing(PostgresServer(durable=True)) as started:
        yield started


def test_while_postgresql_is_away_answers_are_503_and_nothing_acknowledged_is_lost(
    start: Start, server: PostgresServer
) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    seconds: list[float] = []
    cluster = start(postgres=server)
    replicas = cluster.apis
    with recorded("restarts of PostgreSQL", seed) as counts:
        load = ReplicaLoad(replicas, seed=draw.getrandbits(64), may_refuse=True)
        try:
            with load:
                for _ in range(RESTARTS):
                    load.wait(draw.uniform(0.1, _LONGEST_LOAD_SECONDS))
                    server.kill(draw.choice((signal.SIGQUIT, signal.SIGKILL)))
                    killed_at = time.monotonic()
                    load.wait(draw.uniform(0.1, _LONGEST_OUTAGE_SECONDS))
                    _check_paths(replicas)
                    counts[f"answers of HAProxy: {_check_proxy(cluster)}"] += 1
                    counts["answers meanwhile, each 503"] += load.check_refusals(killed_at, time.monotonic())
                    server.start()
                    seconds += load.seconds_to_answer(time.monotonic())
                    counts["restarts"] += 1
                load.wait(_LONGEST_LOAD_SECONDS)
        finally:
            counts.update(load.counts)
            counts["wrong answers"] += len(load.mistakes)
        counts["requests without an answer"] = load.unanswered
        counts["ms at most, first success, 99 of 100"] = math.ceil(1e3 * _percentile_99(seconds))
        assert load.unanswered == 0
        assert _percentile_99(seconds) < scaled(_SECONDS_TO_ANSWER), seconds
        for number in range(len(replicas)):
            counts["versions checked at the end"] += load.history.check(replicas[number].port)


def _percentile_99(seconds: Sequence[float]) -> float:
    """The smallest that 99 of 100 do not exceed."""
    return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


def _check_paths(replicas: Sequence[Replica]) -> None:
    """Compare other calls while the database is away: they answer unless they need it."""
    for number in range(len(replicas)):
        with closing(Connection(replicas[number].port)) as connection:
            for path in _NEEDED:
                answer = connection.ask("GET", path)
                assert (answer.status, answer.body["code"]) == (503, "catalog_unavailable"), answer
                assert int(answer.headers["retry-after"]) >= 1
            for path in _NOT_NEEDED:
                assert connection.ask("GET", path).status == 200


def _check_proxy(cluster: Cluster) -> str:
    """Check that the proxy refuses too; return the code, which is `not_ready` if it has noticed the outage itself."""
    with closing(Connection(cluster.port)) as connection:
        answer = connection.ask("GET", "/adapters")
    assert (answer.status, answer.headers["retry-after"]) == (503, "1"), answer
    code: str = answer.body["code"]
    assert code in ("catalog_unavailable", "not_ready"), answer
    return code


def test_with_max_stale_seconds_adapters_in_memory_answer_for_that_long_and_say_their_age(
    start: Start, server: PostgresServer
) -> None:
    seed = chosen_seed()
    replicas = start(postgres=server, max_stale_seconds=STALE_SECONDS).apis
    with recorded("answers from memory", seed) as counts:
        load = ReplicaLoad(replicas, seed=seed, publishes=False, may_refuse=True)
        with load:
            cold = Connection(replicas[0].port)
            assert cold.ask("PUT", "/adapters/cold", sample(7).body).status == 201
            load.wait(0.2)
            server.kill()
            killed_at = time.monotonic()
            load.wait(_MARGIN_SECONDS)
            with closing(Connection(replicas[1].port)) as other, closing(cold):
                # Of a name that the replica has not resolved, and of a change, nothing is in memory.
                for answer in (
                    other.ask("POST", "/predict", question("cold")),
                    other.ask("PUT", "/adapters/new", sample(8).body),
                ):
                    assert (answer.status, answer.body["code"]) == (503, "catalog_unavailable"), answer
            load.wait(STALE_SECONDS + 2 * _MARGIN_SECONDS - (time.monotonic() - killed_at))
            ended_at = time.monotonic()
            server.start()
            returned_at = time.monotonic()
            load.wait(_MARGIN_SECONDS)
        from_memory = [one for one in load.outcomes if one.sent_at > killed_at and one.ended_at < ended_at]
        allowed = [one for one in from_memory if one.ended_at < killed_at + STALE_SECONDS - _MARGIN_SECONDS]
        too_late = [one for one in from_memory if one.sent_at > killed_at + STALE_SECONDS]
        assert {one.status for one in allowed} == {200}
        ages = [int(one.age or "-1") for one in allowed]
        assert 1 <= min(ages) <= max(ages) <= STALE_SECONDS, (min(ages), max(ages))
        assert {one.status for one in too_late} == {503}
        last = load.outcomes[-1]
        assert (last.kind, last.status, last.age) == (PREDICT, 200, None)
        assert last.sent_at > returned_at
        counts["seconds"] = STALE_SECONDS
        counts["answers 200 with Age"] = len(allowed)
        counts["answers 503 after that"] = len(too_late)
        counts["seconds of age at most"] = max(ages)
