"""What the service has acknowledged, and what it may make of what it has not."""

import random
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.acceptance.crash.oracle import Floats, Upload, make_upload, recipes


@dataclass(frozen=True, slots=True)
class State:
    """An adapter, as its only client knows it."""

    versions: Mapping[int, str] = field(default_factory=dict)
    """Digest of each number; empty where there is no adapter."""
    live: int | None = None
    next_number: int = 1

    def after_upload(self, digest: str) -> "State":
        """With one more version, unless live has these bytes already."""
        if self.live is not None and self.versions[self.live] == digest:
            return self
        number = self.next_number
        return State({**self.versions, number: digest}, number, number + 1)

    def after_roll_back(self, number: int) -> "State":
        """With another live version."""
        return replace(self, live=number)

    def after_delete(self) -> "State":
        """A tombstone: the numbers are not given out again."""
        return State({}, None, self.next_number)


@dataclass(slots=True)
class Uploaded:
    """A name that one thread uploads to."""

    name: str
    state: State = field(default_factory=State)
    in_flight: State | None = None
    """Where the call that was not answered leads."""
    history: list[State] = field(default_factory=lambda: [State()])
    """The states that were acknowledged, the oldest first."""


@dataclass(slots=True)
class Submitted:
    """A job that was acknowledged."""

    name: str
    doomed: bool
    """Whether its client means to cancel it."""
    cancelled: bool | None = False
    """None: a cancel was not answered."""
    deleted: bool | None = False
    """Whether its adapter was deleted since; None: a deletion was not answered."""
    ended: dict[str, Any] | None = None
    """The job, once it was seen to have ended."""


class Ledger:
    """Everything that is known about one data folder, through all its crashes."""

    def __init__(self, draw: random.Random, *, writers: int, names: int) -> None:
        self.uploaded = [[Uploaded(f"up-{writer}-{n}") for n in range(names)] for writer in range(writers)]
        self.trained = [[f"job-{kind}-{n}" for kind in recipes()] for n in range(2)]
        self.jobs: dict[str, Submitted] = {}
        self.counts: Counter[str] = Counter()
        self._uploads: dict[str, Upload] = {}
        self._owners: dict[tuple[str, int], tuple[str, str | None]] = {}
        self._published: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self._draw = draw

    def new_upload(self) -> Upload:
        """Factors that are known before the service sees them."""
        with self._lock:
            upload = make_upload(self._draw)
            self._uploads[upload.digest] = upload
            return upload

    def upload(self, digest: str) -> Upload:
        """What was uploaded, by its digest; a digest that nobody uploaded was torn, or made up."""
        assert digest in self._uploads, f"the service answers from {digest}, which nobody uploaded"
        return self._uploads[digest]

    def delta(self, name: str, digest: str) -> Floats:
        """The ΔW that a version of this name and digest must have."""
        return recipes()[name.split("-")[1]].delta if name.startswith("job-") else self.upload(digest).delta

    def see(self, version: Mapping[str, Any]) -> None:
        """A number means the same bytes for ever, and a job publishes once."""
        with self._lock:
            place = (version["adapter"], version["version"])
            mine = (version["digest"], version["job"])
            assert self._owners.setdefault(place, mine) == mine, f"{place} was {self._owners[place]}, is {mine}"
            if version["job"] is not None:
                published = self._published.setdefault(version["job"], place)
                assert published == place, f"job {version['job']} published {published} and {place}"

    def count(self, what: str) -> None:
        """One more of something, for the report."""
        with self._lock:
            self.counts[what] += 1
