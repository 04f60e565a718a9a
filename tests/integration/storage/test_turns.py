"""Turns of maintenance: of all processes of a cluster, one does a task."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from adapters.storage.turns import Task, take_turn
from tests.support.databases import open_database
from tests.support.storage_kinds import on_both_databases

pytestmark = on_both_databases


def test_of_processes_that_ask_at_once_one_has_the_turn(data_folder: Path) -> None:
    data_folder.mkdir(exist_ok=True)
    with closing(open_database(data_folder)) as database, ThreadPoolExecutor(6) as threads:

        def ask(_: int) -> bool:
            return take_turn(database, Task.SWEEP, seconds=60, now=lambda: 1000.0)

        assert sum(threads.map(ask, range(12))) == 1
        assert take_turn(database, Task.EXPIRE, seconds=60, now=lambda: 1000.0)
        assert sum(threads.map(ask, range(12))) == 0


def test_the_next_turn_is_after_its_time_or_after_a_clock_was_set_back(data_folder: Path) -> None:
    data_folder.mkdir(exist_ok=True)
    with closing(open_database(data_folder)) as database:

        def turns(*times: float) -> list[bool]:
            clock = iter(times)
            return [take_turn(database, Task.SWEEP, seconds=60, now=lambda: next(clock)) for _ in times]

        assert turns(1000, 1001, 1059, 1060, 1061) == [True, False, False, True, False]
        assert turns(500, 501) == [True, False]
