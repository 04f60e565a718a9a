"""Load on replicas: clients that predict and publish through those that are up, and compare every answer.

An answer is wrong if its outputs are not those of the version that it names, if a version has two digests, or if it is
older than the newest version that was acknowledged before the request was sent.
"""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import NamedTuple

from tests.acceptance.replicas.acknowledged_changes import SAMPLES
from tests.support.cluster import Replica
from tests.support.fault_results import RESULTS
from tests.support.replica_client import Answer, Connection, is_right, question, sample
from tests.support.service import eventually

PREDICT, PUBLISH = "predict", "publish"
_PAUSE_SECONDS = 0.01
_IS_LONG = RESULTS in os.environ
"""Whether `make fault` sends as much as it can. In the short forms, each client pauses after each request."""


class Outcome(NamedTuple):
    """One request that was answered."""

    kind: str
    replica: int
    status: int
    sent_at: float
    ended_at: float
    """Monotonic times."""
    age: str | None
    """`Age` of the answer."""


@dataclass
class _Target:
    """A replica as the clients see it. The lock guards the members."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    is_up: bool = True
    starts: int = 0
    in_flight: int = 0
    """Requests that were sent, or are about to be, and have not ended."""
    unanswered: int = 0
    """Requests that ended without an answer."""


class History:
    """What is known of the versions of each name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.acknowledged: dict[str, int] = {}
        """Newest acknowledged version of each name."""
        self._digests: dict[tuple[str, int], str] = {}

    def is_consistent(self, name: str, version: int, digest: str) -> bool:
        """Remember the digest of a version; return whether no other one is known."""
        with self._lock:
            return self._digests.setdefault((name, version), digest) == digest

    def acknowledge(self, name: str, version: int, digest: str) -> None:
        """Remember that a version is acknowledged."""
        assert self.is_consistent(name, version, digest), f"{name}@{version} has two digests"
        with self._lock:
            assert version > self.acknowledged.get(name, 0), f"{name}@{version} was acknowledged before"
            self.acknowledged[name] = version

    def check(self, port: int) -> int:
        """Check that a replica has every acknowledged version; return their number."""
        connection = Connection(port)
        for name, newest in self.acknowledged.items():
            live = connection.ask("GET", f"/adapters/{name}").body["live"]["version"]
            assert live >= newest, f"{name}: live is {live}, and version {newest} was acknowledged"
        versions = [(*key, digest) for key, digest in self._digests.items()]
        for name, version, digest in versions:
            answer = connection.ask("GET", f"/adapters/{name}/versions/{version}")
            assert (answer.status, answer.body.get("digest")) == (200, digest), f"{name}@{version}: {answer}"
        connection.close()
        return len(versions)


class ReplicaLoad:
    """Clients that predict, and one that publishes. Use it as a context; it ends with the first wrong answer."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        seed: int,
        names: int = 4,
        clients: int = 4,
        publishes: bool = True,
        may_refuse: bool = False,
    ) -> None:
        """Begin with a version of each name. If `may_refuse`, answers may also be 503.

        Such an answer needs `Retry-After`, unless its outcome is unknown.
        """
        self.history = History()
        self.counts: Counter[str] = Counter()
        self.mistakes: list[str] = []
        self.outcomes: list[Outcome] = []
        self._replicas = replicas
        self._may_refuse = may_refuse
        self._targets = [_Target() for _ in replicas]
        self._names = [f"name-{number}" for number in range(names)]
        self._outputs = {sample(number).digest: sample(number).outputs for number in range(SAMPLES)}
        self._seed = names
        self._stop = threading.Event()
        draw = random.Random(seed)
        works = [*[self._publish] * publishes, *[self._predict] * clients]
        self._threads = [
            threading.Thread(target=self._run, args=(work, random.Random(draw.getrandbits(64)))) for work in works
        ]

    def __enter__(self) -> "ReplicaLoad":
        connection = Connection(self._replicas[0].port)
        for seed, name in enumerate(self._names):
            answer = connection.ask("PUT", f"/adapters/{name}", sample(seed).body)
            self.history.acknowledge(name, answer.body["version"], answer.body["digest"])
        connection.close()
        for number in range(len(self._replicas)):
            connection = Connection(self._replicas[number].port)
            for name in self._names:
                assert connection.ask("POST", "/predict", question(name)).status == 200
            connection.close()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, seconds: float) -> None:
        """Let the load go on; raise if an answer was wrong."""
        give_up = time.monotonic() + seconds
        while not self.mistakes and time.monotonic() < give_up:
            self._stop.wait(min(0.05, max(0.0, give_up - time.monotonic())))
        assert not self.mistakes, self.mistakes

    def kill(self, number: int) -> int:
        """Kill a replica; return its requests in flight at that moment, once they have ended."""
        target = self._targets[number]
        with target.lock:
            target.is_up = False
            self._replicas[number].kill()
            in_flight = target.in_flight
        eventually(lambda: target.in_flight == 0, what="the end of the requests to a replica that was killed")
        return in_flight

    def start(self, number: int) -> None:
        """Start a replica again."""
        self._replicas[number].start()
        self._replicas[number].wait_until_ready()
        target = self._targets[number]
        with target.lock:
            target.is_up, target.starts = True, target.starts + 1

    def seconds_to_answer(self, returned_at: float) -> list[float]:
        """Wait until each replica has predicted and published again; return the seconds that each of these took."""
        first: dict[tuple[str, int], float] = {}
        begin = len(self.outcomes) - 1
        while begin > 0 and self.outcomes[begin].ended_at > returned_at:
            begin -= 1

        def all_answer() -> bool:
            assert not self.mistakes, self.mistakes
            for outcome in self.outcomes[begin:]:
                if outcome.status < 300 and outcome.ended_at > returned_at:
                    first.setdefault((outcome.kind, outcome.replica), outcome.ended_at - returned_at)
            return len(first) == 2 * len(self._targets)

        eventually(all_answer, what="an answer of each kind from each replica")
        return list(first.values())

    def check_refusals(self, since: float, until: float) -> int:
        """Check that all that was sent and answered between two moments was refused; return the number."""
        within = [outcome for outcome in self.outcomes if outcome.sent_at > since and outcome.ended_at < until]
        assert {outcome.status for outcome in within} <= {503}, [one for one in within if one.status != 503][:3]
        return len(within)

    @property
    def unanswered(self) -> int:
        """The requests that got no answer from any replica, so far."""
        return sum(target.unanswered for target in self._targets)

    def _run(self, work: Callable[["_Client"], None], draw: random.Random) -> None:
        client = _Client([replica.port for replica in self._replicas], self._targets, draw)
        try:
            while not self._stop.is_set() and not self.mistakes:
                work(client)
                if not _IS_LONG:
                    self._stop.wait(_PAUSE_SECONDS)
        except BaseException as error:
            self.mistakes.append(f"{type(error).__name__}: {error}")
            raise
        finally:
            client.close()

    def _predict(self, client: "_Client") -> None:
        name = client.draw.choice(self._names)
        floor = self.history.acknowledged[name]
        answer = self._ask(client, PREDICT, "POST", "/predict", question(name))
        if answer is None:
            return
        about = answer.body["adapter"]
        if not is_right(answer, self._outputs):
            self.mistakes.append(f"other outputs than those of {about}")
        if not self.history.is_consistent(name, about["version"], about["digest"]):
            self.mistakes.append(f"{about} had another digest before")
        if about["version"] < floor:
            self.mistakes.append(f"{about} is older than the acknowledged version {floor}")
        self.counts["answers compared"] += 1

    def _publish(self, client: "_Client") -> None:
        self._seed = (self._seed + 1) % SAMPLES
        name = client.draw.choice(self._names)
        answer = self._ask(client, PUBLISH, "PUT", f"/adapters/{name}", sample(self._seed).body)
        if answer is not None and answer.status == 201:
            self.history.acknowledge(name, answer.body["version"], answer.body["digest"])
            self.counts["publishes acknowledged"] += 1

    def _ask(self, client: "_Client", kind: str, method: str, path: str, body: bytes) -> Answer | None:
        """Return the answer if it is a success; None if there is none, or if it is refused and may be."""
        sent_at = time.monotonic()
        replica, answer = client.ask(method, path, body)
        if answer is None:
            return None
        self.outcomes.append(
            Outcome(kind, replica, answer.status, sent_at, time.monotonic(), answer.headers.get("age"))
        )
        if answer.status < 300:
            return answer
        self.counts[f"{kind}: {answer.status} {answer.body['code']}"] += 1
        is_unknown = kind == PUBLISH and answer.body.get("outcome") == "unknown"
        self.counts["publishes with an unknown outcome"] += is_unknown
        if not (self._may_refuse and answer.status == 503 and is_unknown != ("retry-after" in answer.headers)):
            self.mistakes.append(f"{kind}: {answer}")
        time.sleep(_PAUSE_SECONDS)
        return None


class _Client:
    """Connections to the replicas of one thread."""

    def __init__(self, ports: Sequence[int], targets: Sequence[_Target], draw: random.Random) -> None:
        self.draw = draw
        self._ports = ports
        self._targets = targets
        self._connections: dict[int, tuple[int, Connection]] = {}

    def ask(self, method: str, path: str, body: bytes) -> tuple[int, Answer | None]:
        """Send a request to a replica that is up; return its number, and the answer if there is one."""
        number = self._choose()
        target = self._targets[number]
        try:
            return number, self._connection(number).ask(method, path, body)
        except (OSError, HTTPException):
            with target.lock:
                target.unanswered += 1
            return number, None
        finally:
            with target.lock:
                target.in_flight -= 1

    def _choose(self) -> int:
        """Choose a replica that is up, and count a request for it: in one step, so that none is sent after a kill."""
        while True:
            number = self.draw.randrange(len(self._targets))
            target = self._targets[number]
            with target.lock:
                if target.is_up:
                    target.in_flight += 1
                    return number
            time.sleep(0)

    def _connection(self, number: int) -> Connection:
        starts = self._targets[number].starts
        of_start, connection = self._connections.get(number, (-1, None))
        if connection is None or of_start != starts:
            if connection is not None:
                connection.close()
            connection = Connection(self._ports[number])
            self._connections[number] = starts, connection
        return connection

    def close(self) -> None:
        """Close them."""
        for _, connection in self._connections.values():
            connection.close()
