"""`kill -9` of a replica under load: no answer is wrong, and no request fails that it did not have in flight.

`FAULT_REPLICA_KILLS` is the number of kills.
"""

import random

import pytest

from tests.acceptance.replicas.conftest import Start
from tests.acceptance.replicas.replica_load import ReplicaLoad
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded

KILLS = chosen_count("FAULT_REPLICA_KILLS", 2)
_LONGEST_LOAD_SECONDS = 1.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(scaled(240 + 30 * KILLS))]


def test_a_killed_replica_costs_no_more_than_its_requests_in_flight(start: Start) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    replicas = start().apis
    with recorded("kills of replicas", seed) as counts:
        load = ReplicaLoad(replicas, seed=draw.getrandbits(64))
        try:
            with load:
                for _ in range(KILLS):
                    load.wait(draw.uniform(0.05, _LONGEST_LOAD_SECONDS))
                    number, before = draw.randrange(len(replicas)), load.unanswered
                    in_flight = load.kill(number)
                    load.wait(draw.uniform(0, _LONGEST_LOAD_SECONDS))
                    load.start(number)
                    unanswered = load.unanswered - before
                    assert unanswered <= in_flight, f"{unanswered} requests failed, {in_flight} were in flight"
                    counts["kills"] += 1
                    counts["requests in flight at a kill"] += in_flight
                    counts["requests without an answer"] += unanswered
                load.wait(_LONGEST_LOAD_SECONDS)
        finally:
            counts.update(load.counts)
            counts["wrong answers"] += len(load.mistakes)
        # No request failed but those of the replicas that were killed.
        assert load.unanswered == counts["requests without an answer"]
        for replica in replicas:
            counts["versions checked at the end"] += load.history.check(replica.port)
        assert counts["answers compared"] > 10 * KILLS
