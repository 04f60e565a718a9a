"""Changes of one writer, each acknowledged by one replica, and what another must answer from then on."""

import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from adapters.access.keys import Keys, Scope
from adapters.storage.postgres_database import PostgresDatabase
from tests.support.keys import make_key
from tests.support.replica_client import Answer, Connection, question, sample

SAMPLES = 48
"""Seeds of the adapters that writers upload in turn."""
_LONGEST_HISTORY = 12


def operator_key(database_url: str) -> str:
    """The text of a new key that may do everything."""
    with closing(PostgresDatabase(database_url)) as database:
        return make_key(Keys(database, now=lambda: 0.0), "default", Scope.OPERATOR).text


class Request(NamedTuple):
    """A request with the key that it has, if it is not the usual one."""

    method: str
    path: str
    body: bytes | None = None
    key: str | None = None

    def to(self, connection: Connection) -> Answer:
        """Send it, and return the answer."""
        return connection.ask(self.method, self.path, self.body, key=self.key)

    def send(self, connection: Connection) -> None:
        """Send it."""
        connection.send(self.method, self.path, self.body, key=self.key)


class Case(NamedTuple):
    """A change, and a question whose answer is checked after the change was acknowledged."""

    kind: str
    change: Request
    acknowledge: Callable[[Answer], None]
    """Takes the answer to the change, which must have succeeded."""
    question: Callable[[], Request]
    """Returns the question, once the change is acknowledged."""
    check: Callable[[Answer], str | None]
    """Returns what is wrong with an answer; None if it is the one of the state after the change."""


@dataclass
class Writer:
    """Makes the changes of one name, and has its state."""

    name: str
    draw: random.Random
    seeds: dict[int, int] = field(default_factory=dict)
    """Versions that exist, and the seeds of their adapters."""
    live: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    keys: list[tuple[str, str]] = field(default_factory=list)
    """Id and text of keys that were created, and not revoked yet."""
    _next_seed: int = 0

    def case(self) -> Case:
        """Draw a change that the state allows."""
        if self.live is None:
            return self._publish()
        if len(self.seeds) > _LONGEST_HISTORY:
            return self._delete()
        kinds = [self._publish, self._publish, self._delete, self._create_key]
        if self.keys:
            kinds += [self._revoke] * 2
        if len(self.seeds) > 1:
            kinds += [self._move] * 3
        return self.draw.choice(kinds)()

    def predict(self, *, key: str | None = None) -> Request:
        """Ask for the live version."""
        return Request("POST", "/predict", question(self.name), key)

    def _publish(self) -> Case:
        self._next_seed += 1
        seed = self._next_seed % SAMPLES

        def acknowledge(answer: Answer) -> None:
            assert answer.status == 201, answer
            self.live = answer.body["version"]
            self.seeds[self.live] = seed

        return Case(
            "publish", Request("PUT", f"/adapters/{self.name}", sample(seed).body), acknowledge, *self._is_live()
        )

    def _move(self) -> Case:
        assert self.live is not None
        to = self.draw.choice([number for number in self.seeds if number != self.live])
        kind = "roll back" if to < self.live else "roll forward"

        def acknowledge(answer: Answer) -> None:
            assert answer.status == 200, answer
            self.live = to

        body = json.dumps({"version": to}).encode()
        return Case(kind, Request("PUT", f"/adapters/{self.name}/aliases/live", body), acknowledge, *self._is_live())

    def _delete(self) -> Case:
        def acknowledge(answer: Answer) -> None:
            assert answer.status == 204, answer
            self.live, self.seeds = None, {}

        def check(answer: Answer) -> str | None:
            return None if (answer.status, answer.body["code"]) == (404, "adapter_not_found") else str(answer)

        return Case("delete", Request("DELETE", f"/adapters/{self.name}"), acknowledge, self.predict, check)

    def _create_key(self) -> Case:
        def acknowledge(answer: Answer) -> None:
            assert answer.status == 201, answer
            self.keys.append((answer.body["id"], answer.body["key"]))

        def check(answer: Answer) -> str | None:
            return None if answer.status == 200 else str(answer)

        body = json.dumps({"scopes": ["predict"], "name": self.name}).encode()
        change = Request("POST", "/keys", body)
        return Case("create a key", change, acknowledge, lambda: self.predict(key=self.keys[-1][1]), check)

    def _revoke(self) -> Case:
        identity, text = self.keys[-1]

        def acknowledge(answer: Answer) -> None:
            assert answer.status == 204, answer
            self.keys.remove((identity, text))

        def check(answer: Answer) -> str | None:
            return None if (answer.status, answer.body["code"]) == (401, "unauthenticated") else str(answer)

        change = Request("DELETE", f"/keys/{identity}")
        return Case("revoke a key", change, acknowledge, lambda: self.predict(key=text), check)

    def _is_live(self) -> tuple[Callable[[], Request], Callable[[Answer], str | None]]:
        """The question for the live version, and the check that it is the one that is then acknowledged."""

        def check(answer: Answer) -> str | None:
            assert self.live is not None
            expected = sample(self.seeds[self.live])
            if answer.status != 200:
                return str(answer)
            about = answer.body["adapter"]
            if (about["version"], about["digest"]) != (self.live, expected.digest):
                return f"{about} instead of version {self.live}, {expected.digest}"
            is_right = np.allclose(answer.body["outputs"], expected.outputs, rtol=1e-4, atol=1e-4)
            return None if is_right else f"other outputs than those of version {self.live}"

        return self.predict, check
