"""Conditional moves of an alias that race over two machines: of those that saw one version, one wins."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import pytest

from tests.support.catalog_factories import as_upload, make_adapter
from tests.support.databases import place_bucket, place_database
from tests.support.object_server import ObjectServer, new_url
from tests.support.postgres_server import PostgresServer
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.slow

RACES, RACERS = 100, 4


def test_of_racing_moves_of_live_on_two_machines_one_wins_each_time(
    tmp_path: Path, postgres_server: PostgresServer, s3: ObjectServer
) -> None:
    assert s3.process.poll() is None
    database, bucket = postgres_server.new_database(), new_url()
    with ExitStack() as stack:
        machines = []
        for name in ("one", "other"):
            place_database(tmp_path / name, database)
            place_bucket(tmp_path / name, bucket)
            machine = ServiceProcess(tmp_path / name, base="random:10,2,42", trainers=0)
            machines.append(stack.enter_context(machine))
        clients = [stack.enter_context(machines[number % 2].connect()) for number in range(RACERS)]
        for seed in (1, 2):
            clients[0].put("/adapters/acme", json=as_upload(make_adapter(seed))).raise_for_status()
        tags = [f'"{make_adapter(seed).digest}"' for seed in (1, 2)]
        threads = stack.enter_context(ThreadPoolExecutor(RACERS))
        barrier = Barrier(RACERS)

        def move(number: int, race: int) -> int:
            # Even races move live back to version 1, and odd ones to version 2.
            target, live = (1, tags[1]) if race % 2 == 0 else (2, tags[0])
            barrier.wait()
            url, headers = "/adapters/acme/aliases/live", {"If-Match": live}
            return clients[number].put(url, json={"version": target}, headers=headers).status_code

        for race in range(RACES):
            statuses = threads.map(move, range(RACERS), [race] * RACERS)
            assert Counter(statuses) == {200: 1, 412: RACERS - 1}, f"race {race}"
            asked = clients[race % RACERS].get("/adapters/acme").json()
            assert asked["aliases"] == {"live": 1 if race % 2 == 0 else 2}
