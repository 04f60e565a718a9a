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


@pytest.mark.parametrize("is_proxied", [False, True], ids=["direct", "proxied"])
def test_a_killed_replica_costs_no_more_than_its_requests_in_flight(start: Start, *, is_proxied: bool) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    cluster = start()
    with recorded("kills behind HAProxy" if is_proxied else "kills of replicas", seed) as counts:
        port = cluster.port if is_proxied else None
        load = ReplicaLoad(cluster.apis, seed=draw.getrandbits(64), proxy_port=port)
        try:
            with load:
                for _ in range(KILLS):
                    load.wait(draw.uniform(0.05, _LONGEST_LOAD_SECONDS))
                    number, before = draw.randrange(len(cluster.apis)), load.unanswered
                    in_flight = load.kill(number)
                    load.wait(draw.uniform(0, _LONGEST_LOAD_SECONDS))
                    load.start(number)
                    cluster.wait_until_balanced()
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
        for api in cluster.apis:
            counts["versions checked at the end"] += load.history.check(api.port)
        assert counts["answers compared"] > 10 * KILLS
