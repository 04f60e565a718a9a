"""Failover to a synchronous standby under load: no acknowledged change is lost, and no answer is stale.

`FAULT_FAILOVERS` is the number of failovers. After each, the former primary becomes a standby of the new one.
"""

import math
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import psycopg
import pytest

from tests.acceptance.replicas.conftest import Start
from tests.acceptance.replicas.replica_load import ReplicaLoad
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.postgres_server import PostgresServer
from tests.support.service import eventually

FAILOVERS = chosen_count("FAULT_FAILOVERS", 1)
_LONGEST_LOAD_SECONDS = 1.5
_STANDBY_STATE = "SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(scaled(240 + 60 * FAILOVERS))]


class Pair:
    """A primary and its synchronous standby."""

    def __init__(self, stack: ExitStack) -> None:
        self.primary = stack.enter_context(closing(PostgresServer(durable=True)))
        database = self.primary.new_database()
        self.standby = stack.enter_context(closing(PostgresServer(durable=True, standby_of=self.primary)))
        self._wait_for_standby()
        name = database.rpartition("/")[2]
        hosts = "&".join(f"host=127.0.0.1:{server.port}" for server in (self.primary, self.standby))
        self.url = f"postgresql+psycopg://loraplex@/{name}?{hosts}"

    def fail_over(self, how: signal.Signals) -> None:
        """Kill the primary, and promote the standby."""
        self.primary.kill(how)
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    def repair(self) -> None:
        """Make the former primary a synchronous standby of the new one."""
        self.standby.follow(self.primary)
        self._wait_for_standby()

    def _wait_for_standby(self) -> None:
        self.primary.change_setting("synchronous_standby_names", "*")
        with psycopg.connect(self.primary.dsn("postgres"), autocommit=True) as connection:
            eventually(
                lambda: connection.execute(_STANDBY_STATE).fetchall() == [("sync",)], what="a synchronous standby"
            )


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack)


def test_a_failover_loses_no_acknowledged_change(start: Start, pair: Pair) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    seconds: list[float] = []
    replicas = start(postgres=pair.primary, database_url=pair.url).apis
    with recorded("failovers", seed) as counts:
        load = ReplicaLoad(replicas, seed=draw.getrandbits(64), may_refuse=True)
        try:
            with load:
                for _ in range(FAILOVERS):
                    load.wait(draw.uniform(0.2, _LONGEST_LOAD_SECONDS))
                    before = load.counts["publishes acknowledged"]
                    pair.fail_over(draw.choice((signal.SIGQUIT, signal.SIGKILL)))
                    seconds += load.seconds_to_answer(time.monotonic())
                    for number in range(len(replicas)):
                        counts["versions checked after a failover"] += load.history.check(replicas[number].port)
                    assert load.counts["publishes acknowledged"] > before
                    pair.repair()
                    counts["failovers"] += 1
                load.wait(_LONGEST_LOAD_SECONDS)
        finally:
            counts.update(load.counts)
            counts["wrong answers"] += len(load.mistakes)
        counts["ms at most, first success after the promotion"] = math.ceil(1e3 * max(seconds))
        counts["requests without an answer"] = load.unanswered
        assert load.unanswered == 0
