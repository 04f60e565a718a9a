"""Values that a thread loads: each key once, and the keys of each tenant in turn."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from app.serving.adapter_loader import SingleFlight


def test_a_key_waits_for_two_calls_and_not_for_the_backlog_of_another_tenant() -> None:
    has_requested, calls = threading.Event(), list[Sequence[str]]()

    def load(keys: Sequence[str]) -> Iterator[tuple[str, str | Exception]]:
        assert has_requested.wait(60)
        calls.append(keys)
        yield from ((key, key.upper()) for key in keys)

    async def scene() -> list[str]:
        with ThreadPoolExecutor(1) as thread:
            flight = SingleFlight(load, thread, keys_at_once=4)
            busy = [flight.get(f"b{number}", tenant="busy") for number in range(20)]
            await asyncio.sleep(0)
            # Two calls have been passed to the thread, which is in the first.
            quiet = [flight.get(key, tenant="quiet") for key in ("q0", "q1", "q0")]
            assert quiet[0] is quiet[2]
            has_requested.set()
            return await asyncio.gather(*busy, *quiet)

    values = asyncio.run(scene())
    assert values == [*(f"B{number}" for number in range(20)), "Q0", "Q1", "Q0"]
    assert calls[:3] == [["b0", "b1", "b2", "b3"], ["b4", "b5", "b6", "b7"], ["b8", "q0", "b9", "q1"]]
    assert sorted(key for keys in calls for key in keys) == sorted(
        {*(f"b{number}" for number in range(20)), "q0", "q1"}
    )
