"""A replica is stopped (SIGSTOP) in the middle of a write: the others wait no longer than the timeouts of its session.

`FAULT_STOPPED_WRITES` is how often. The short form has shorter timeouts.
"""

import math
import random
import threading
import time
from contextlib import closing, suppress

import psycopg
import pytest

from tests.acceptance.replicas.conftest import Start
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.postgres_server import PostgresServer
from tests.support.replica_client import Answer, Connection, question, sample
from tests.support.service import eventually

SHORT = 1
STOPS = chosen_count("FAULT_STOPPED_WRITES", SHORT)
# Of the service: seconds that a transaction waits for a lock, and that it may be idle.
LOCK_SECONDS, IDLE_SECONDS = (5, 10) if STOPS > SHORT else (1, 3)
_LOCK_IS_HELD = (
    "SELECT 1 FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted AND objsubid = 1"
    " AND classid = 0 AND state = 'idle in transaction'"
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(scaled(240 + 60 * STOPS))]


def test_a_replica_that_is_stopped_in_a_write_blocks_no_other(start: Start, postgres_server: PostgresServer) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    options = f"-c lock_timeout={LOCK_SECONDS}s -c idle_in_transaction_session_timeout={IDLE_SECONDS}s"
    url = postgres_server.new_database()
    replicas = start(database_url=f"{url}?options={options.replace(' ', '%20').replace('=', '%3D')}").apis
    stop = threading.Event()
    own: list[Answer] = []

    def publish() -> None:
        number = 0
        with closing(Connection(replicas[0].port)) as connection:
            while not stop.is_set():
                number += 1
                own.append(connection.ask("PUT", "/adapters/mine", sample(number % 40).body))

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        with (
            recorded("stops in a write", seed) as counts,
            closing(Connection(replicas[1].port)) as other,
            closing(Connection(replicas[1].port)) as reader,
            psycopg.connect(postgres_server.dsn(url.rpartition("/")[2]), autocommit=True) as database,
        ):
            assert other.ask("PUT", "/adapters/other", sample(0).body).status == 201
            while counts["stops"] < STOPS:
                time.sleep(draw.uniform(0, 0.05))
                replicas[0].pause()
                try:
                    time.sleep(0.01)  # what it has sent arrives
                    if not database.execute(_LOCK_IS_HELD).fetchall():
                        continue
                    stopped_at = time.monotonic()
                    refused = 0
                    while True:
                        asked_at = time.monotonic()
                        answer = other.ask("PUT", "/adapters/other", sample(1 + counts["stops"] % 40).body)
                        waited = time.monotonic() - asked_at
                        assert waited < scaled(LOCK_SECONDS + 1), waited
                        counts["ms of a wait at most"] = max(counts["ms of a wait at most"], math.ceil(1e3 * waited))
                        assert reader.ask("POST", "/predict", question("other")).status == 200
                        if answer.status == 201:
                            break
                        assert (answer.status, answer.body["code"]) == (503, "catalog_busy"), answer
                        assert int(answer.headers["retry-after"]) >= 1
                        refused += 1
                    blocked = time.monotonic() - stopped_at
                    assert blocked < scaled(IDLE_SECONDS + LOCK_SECONDS), blocked
                    counts["stops"] += 1
                    counts["publishes refused: catalog_busy"] += refused
                    counts["ms blocked at most"] = max(counts["ms blocked at most"], math.ceil(1e3 * blocked))
                finally:
                    replicas[0].resume()
                # The transaction of the stopped replica has ended without it, so that its change is refused.
                eventually(lambda: any(answer.status == 503 for answer in own), what="the refusal of its change")
                refusals = [answer for answer in own if answer.status != 201 and answer.status != 200]
                assert {answer.body["code"] for answer in refusals} <= {"catalog_busy", "catalog_unavailable"}, refusals
                counts["changes of the stopped replica refused"] += len(refusals)
                own.clear()
                eventually(lambda: any(answer.status == 201 for answer in own), what="another change of it")
    finally:
        with suppress(Exception):
            replicas[0].resume()
        stop.set()
        thread.join()
