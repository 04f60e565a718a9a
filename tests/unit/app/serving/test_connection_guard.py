"""Deadlines of a connection whose client reads or sends nothing."""

from types import SimpleNamespace
from typing import Any

import pytest

from app.serving.connection_guard import BETWEEN_REQUESTS, BODY, HEAD, MESSAGE_SECONDS, GuardedHttpProtocol
from app.serving.connections import Phase

NOW = 1000.0
LONG_AGO = NOW - MESSAGE_SECONDS - 1


def _connection(stage: Phase, *, stalled_since: float | None, is_answered: bool = True) -> Any:
    """A connection whose client has sent nothing for long, and reads nothing since `stalled_since`."""
    connection: Any = GuardedHttpProtocol.__new__(GuardedHttpProtocol)
    connection.transport = SimpleNamespace(stalled_since=lambda _now: stalled_since)
    connection.parser, connection.stage, connection.timeout_keep_alive = object(), stage, 5
    connection.flow = SimpleNamespace(read_paused=False)
    connection.cycle = SimpleNamespace(response_complete=is_answered, waiting_for_100_continue=False)
    connection._silent_since = connection.idle_since = LONG_AGO
    return connection


@pytest.mark.parametrize(
    ("stage", "stalled_since", "is_overdue"),
    [
        (BETWEEN_REQUESTS, None, True),
        (HEAD, None, True),
        (BODY, None, True),
        # While an answer is unread, a body keeps its deadline, and the next head has none yet.
        (BETWEEN_REQUESTS, NOW - 1, False),
        (HEAD, NOW - 1, False),
        (BODY, NOW - 1, True),
        (HEAD, LONG_AGO, True),
    ],
)
def test_a_silent_client_is_overdue(stage: Phase, stalled_since: float | None, is_overdue: bool) -> None:
    connection = _connection(stage, stalled_since=stalled_since)
    assert connection.is_overdue(NOW) is is_overdue
    assert connection.is_overdue(NOW) is is_overdue


def test_the_times_begin_again_once_the_client_has_read_the_answer() -> None:
    connection = _connection(HEAD, stalled_since=NOW - 1)
    assert not connection.is_overdue(NOW)
    connection.transport = SimpleNamespace(stalled_since=lambda _now: None)
    assert not connection.is_overdue(NOW + 1)
    assert connection.is_overdue(NOW + MESSAGE_SECONDS)


@pytest.mark.parametrize("stage", Phase)
@pytest.mark.parametrize("stalled_since", [None, NOW - 1])
@pytest.mark.parametrize("is_answered", [False, True])
def test_a_look_at_the_silence_changes_nothing(stage: Phase, stalled_since: float | None, is_answered: bool) -> None:
    connection = _connection(stage, stalled_since=stalled_since, is_answered=is_answered)
    before = dict(vars(connection))
    connection.silence(NOW)
    assert vars(connection) == before
