"""The fitter on Ray with a cluster that is played: the tasks that it submits, and what follows from their items."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import FitFailed
from adapters.storage.blob_location import BlobLocation
from adapters.training.execution.fit_client import (
    Done,
    Failed,
    FitRequest,
    FitterDied,
    Frame,
    Note,
    Outcomes,
    Progress,
    Trained,
)
from adapters.training.execution.fit_task import OUT_OF_MEMORY, FitProcess, ItemKind, frame_to_bytes
from adapters.training.execution.mailbox import Item
from tests.support.catalog_factories import training_job
from tests.support.external_programs import skip_or_fail

MEMORY = 2**30
PROCESS = FitProcess(
    base={"source": "zeros:2,2"}, blobs=BlobLocation(folder=Path()), threads=1, memory_bytes=MEMORY, stopped_seconds=9.0
)
ALONE = FitRequest(job=replace(training_job(), memory_bytes=2**28), base="", feature_space=None, data="blob")
FLEET = replace(ALONE, job=replace(ALONE.job, is_fleet=True, adapters=6, positions=6), done=(5,))


class _Task:
    """A task that was submitted, with its arguments."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        _, self.number, _, self.request, self.share, done, self.checkpoint, self.shares = arguments
        self.done = [*done]
        self.has_ended = self.is_cancelled = False
        self.error: Exception | None = None


class _PlayedCluster:
    """The calls of ray that the fitter makes. A poll returns at once what is in the mailbox."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self.items: list[Item] = []
        self.options: Mapping[str, Any] = {}
        self.node: dict[str, float] = {"CPU": 1.0, "memory": MEMORY}
        self.mailbox = SimpleNamespace(take=SimpleNamespace(remote=lambda _seconds: "poll"))

    def remote(self, _function: object) -> Any:
        return self

    def options_of(self, **options: Any) -> Any:
        self.options = options
        return SimpleNamespace(remote=self._submit)

    def _submit(self, *arguments: Any) -> _Task:
        self.tasks.append(_Task(arguments))
        return self.tasks[-1]

    def put(self, content: bytes) -> bytes:
        return content

    def wait(self, refs: Sequence[Any], **_options: float) -> tuple[list[Any], list[Any]]:
        return [ref for ref in refs if ref == "poll" or ref.has_ended], []

    def get(self, ref: Any) -> Any:
        if ref == "poll":
            items, self.items = self.items, []
            return items
        if ref.error is not None:
            raise ref.error
        return None

    def cancel(self, task: _Task, **_options: object) -> None:
        task.is_cancelled = True

    def cluster_resources(self) -> Mapping[str, float]:
        return self.node

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.node}]

    def send(self, task: _Task, *frames: Frame) -> None:
        for frame in frames:
            self.items.append(Item(task.number, task.share[0], ItemKind.FRAME, frame_to_bytes(frame)))

    def end(self, task: _Task, error: Exception | None = None) -> None:
        task.has_ended, task.error = True, error


def _stack(*positions: int) -> Outcomes:
    return Outcomes(
        trained=[Trained(position, {}) for position in positions], failed=[], contents=[b"adapter"] * len(positions)
    )


def _next(fitter: Any) -> Frame:
    frame: Frame | None = fitter.next_frame(1.0)
    assert frame is not None
    return frame


def _positions(frame: Frame) -> list[int]:
    assert isinstance(frame, Outcomes)
    return [trained.position for trained in frame.trained]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> _PlayedCluster:
    if find_spec("ray") is None:
        skip_or_fail("ray is not installed")
    from adapters.training.execution import ray_fitter

    played = _PlayedCluster()
    calls = ("wait", "get", "put", "cancel", "cluster_resources", "nodes")
    remote = SimpleNamespace(options=played.options_of)
    functions = {name: getattr(played, name) for name in calls} | {"remote": lambda _function: remote}
    monkeypatch.setattr(ray_fitter, "ray", SimpleNamespace(**functions))
    return played


@pytest.fixture
def fitter(cluster: _PlayedCluster) -> Any:
    from adapters.training.execution.ray_fitter import RayFitter

    fitter = RayFitter(PROCESS, gpus=0.5)
    fitter._mailbox = cluster.mailbox
    return fitter


def test_a_fit_is_one_task_that_asks_for_its_estimate(fitter: Any, cluster: _PlayedCluster, tmp_path: Path) -> None:
    checkpoint = tmp_path / "job.1.safetensors"
    checkpoint.write_bytes(b"earlier")
    cluster.node["GPU"] = 1.0
    fitter.begin(ALONE, checkpoint=checkpoint)
    (task,) = cluster.tasks
    assert cluster.options == {"num_cpus": 1, "memory": 2**28, "num_gpus": 0.5, "max_retries": 0}
    assert (task.share, task.done, task.checkpoint) == ((0, 1), [], b"earlier")
    assert FitRequest.from_json(json.loads(task.request)) == ALONE
    assert fitter.next_frame(0.0) is None
    cluster.send(task, Progress(step=3), Done(metrics={"loss": 0.5}, contents=[b"adapter"]))
    cluster.items.insert(0, Item(task.number, 0, ItemKind.CHECKPOINT, b"later"))
    assert isinstance(_next(fitter), Progress)
    assert checkpoint.read_bytes() == b"later"
    done = _next(fitter)
    assert isinstance(done, Done)
    assert done.contents == [b"adapter"]


def test_a_fit_that_no_node_can_run_says_so_in_the_log_of_its_job(fitter: Any, cluster: _PlayedCluster) -> None:
    fitter.begin(ALONE)
    note = _next(fitter)
    assert isinstance(note, Note)
    assert "num_gpus=0.5" in note.text


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_the_death_of_its_process_ends_a_fit(fitter: Any, cluster: _PlayedCluster, out_of_memory: bool) -> None:
    cluster.node["GPU"] = 1.0
    fitter.begin(ALONE)
    content = OUT_OF_MEMORY if out_of_memory else b""
    cluster.items.append(Item(cluster.tasks[0].number, 0, ItemKind.DIED, content))
    with pytest.raises(FitterDied) as death:
        fitter.next_frame(1.0)
    assert death.value.out_of_memory == out_of_memory


def test_what_a_dead_task_had_sent_is_taken_before_its_death(fitter: Any, cluster: _PlayedCluster) -> None:
    from ray.exceptions import WorkerCrashedError

    cluster.node["GPU"] = 1.0
    fitter.begin(ALONE)
    (task,) = cluster.tasks
    cluster.send(task, Progress(step=3))
    cluster.end(task, WorkerCrashedError())
    assert isinstance(_next(fitter), Progress)
    with pytest.raises(FitterDied):
        fitter.next_frame(1.0)


def test_a_node_without_memory_is_out_of_memory(fitter: Any, cluster: _PlayedCluster) -> None:
    from ray.exceptions import OutOfMemoryError

    cluster.node["GPU"] = 1.0
    fitter.begin(ALONE)
    cluster.end(cluster.tasks[0], OutOfMemoryError("the node has no memory left"))
    with pytest.raises(FitterDied) as death:
        fitter.next_frame(1.0)
    assert death.value.out_of_memory


def test_of_a_fleet_a_dead_task_is_replaced_and_no_stack_comes_twice(fitter: Any, cluster: _PlayedCluster) -> None:
    from ray.exceptions import WorkerCrashedError

    cluster.node["GPU"] = 1.0
    fitter.begin(FLEET)
    # Four shares for the one core.
    first, *others = cluster.tasks
    assert [task.share for task in cluster.tasks] == [(number, 4) for number in range(4)]
    cluster.send(first, _stack(0))
    assert _positions(_next(fitter)) == [0]
    cluster.end(first, WorkerCrashedError())
    cluster.send(others[0], _stack(1, 2), Progress(step=0, loss=0.5))
    assert _positions(_next(fitter)) == [1, 2]
    # The steps of all shares, and what an earlier attempt has done.
    assert _next(fitter) == Progress(step=4, loss=0.5, epochs=[], contents=[], history=[])
    assert fitter.next_frame(0.01) is None
    *_, again = cluster.tasks
    assert (again.share, again.done) == ((0, 4), [0])
    # It was only cut off, and sends the next stack, as the new task does.
    cluster.send(first, _stack(3))
    cluster.send(again, _stack(3), _stack(4), Done(metrics={}))
    assert _positions(_next(fitter)) == [3]
    assert _positions(_next(fitter)) == [4]
    for task in others:
        assert fitter.next_frame(0.01) is None
        cluster.send(task, Done(metrics={}))
    assert isinstance(_next(fitter), Done)


def test_a_share_that_dies_again_and_again_ends_the_attempt(fitter: Any, cluster: _PlayedCluster) -> None:
    from ray.exceptions import WorkerCrashedError

    cluster.node["GPU"] = 1.0
    fitter.begin(FLEET)
    for _ in range(2):
        cluster.end(cluster.tasks[-1] if len(cluster.tasks) > 4 else cluster.tasks[2], WorkerCrashedError())
        assert fitter.next_frame(0.05) is None
    cluster.end(cluster.tasks[-1], WorkerCrashedError())
    with pytest.raises(FitterDied):
        fitter.next_frame(0.05)
    assert sum(task.share[0] == 2 for task in cluster.tasks) == 3


def test_an_error_ends_all_shares(fitter: Any, cluster: _PlayedCluster) -> None:
    cluster.node["GPU"] = 1.0
    fitter.begin(FLEET)
    cluster.send(cluster.tasks[1], _stack(1), Failed(error={"code": "fit_failed"}))
    # What came before it is published.
    assert _positions(_next(fitter)) == [1]
    assert isinstance(_next(fitter), Failed)
    assert all(task.is_cancelled for task in cluster.tasks)


def test_an_error_of_the_sort_ends_the_fit(fitter: Any, cluster: _PlayedCluster) -> None:
    from ray.exceptions import RayTaskError

    cluster.node["GPU"] = 1.0
    fitter.begin(FLEET)
    cluster.end(cluster.tasks[2], RayTaskError("sort", "", FitFailed("the rows are gone")))
    frame = _next(fitter)
    assert isinstance(frame, Failed)
    assert frame.error["code"] == "fit_failed"
    assert all(task.is_cancelled for task in cluster.tasks if task is not cluster.tasks[2])


def test_after_a_kill_no_frame_of_the_request_comes(fitter: Any, cluster: _PlayedCluster) -> None:
    cluster.node["GPU"] = 1.0
    fitter.begin(ALONE)
    (killed,) = cluster.tasks
    fitter.kill()
    assert killed.is_cancelled
    fitter.begin(ALONE)
    cluster.send(killed, Done(metrics={}))
    assert fitter.next_frame(0.01) is None
    cluster.send(cluster.tasks[-1], Progress(step=1))
    assert isinstance(_next(fitter), Progress)


def test_a_silent_task_counts_as_dead(fitter: Any, cluster: _PlayedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.training.execution import ray_fitter

    cluster.node["GPU"] = 1.0
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ray_fitter, "time", SimpleNamespace(monotonic=lambda: clock.now))
    fitter.begin(ALONE)
    cluster.items.append(Item(cluster.tasks[0].number, 0, ItemKind.ALIVE, b""))
    assert fitter.next_frame(0.0) is None
    for _ in range(9):
        clock.now += 1.0
        assert fitter.next_frame(0.0) is None
    clock.now += 1.0
    with pytest.raises(FitterDied):
        fitter.next_frame(0.0)
    assert cluster.tasks[0].is_cancelled


def test_a_cluster_that_is_lost_ends_the_fit(fitter: Any, cluster: _PlayedCluster) -> None:
    cluster.node["GPU"] = 1.0
    fitter.begin(ALONE)
    cluster.end(cluster.tasks[0], ConnectionError("reset"))
    with pytest.raises(FitterDied):
        fitter.next_frame(1.0)
    assert fitter._mailbox is None
