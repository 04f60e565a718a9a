"""The fitter on Ray with a cluster that is played: the tasks that it submits, and what follows from their items."""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import FitFailed, LoraplexError, StorageFailed, StorageFull
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
LARGE_FLEET = replace(FLEET, job=replace(FLEET.job, scratch_bytes=2**20))


class _Task:
    """A task, or a call of an actor, with its keyword arguments."""

    def __init__(self, number: int, arguments: Mapping[str, Any]) -> None:
        self.number, self.arguments = number, {**arguments, "done": [*arguments.get("done", ())]}
        self.has_ended = self.is_cancelled = False
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return self.arguments[name]


class _PlayedCluster:
    """The calls of ray that the fitter makes. A poll returns at once what is in the mailbox."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self.items: list[Item] = []
        self.options: Mapping[str, Any] = {}
        self.node: dict[str, float] = {"CPU": 1.0, "memory": MEMORY}
        self.mailbox = SimpleNamespace(take=SimpleNamespace(remote=lambda _seconds: "poll"))
        self.sort = _Task(0, {})
        self.sorter = SimpleNamespace(sort=SimpleNamespace(remote=lambda *_: self.sort))
        self.killed: list[Any] = []

    def remote(self, _function: object = None, **_options: float) -> Any:
        """Without a function, the decorator of an actor."""
        if _function is None:
            actor = SimpleNamespace(remote=lambda: self.sorter)
            return lambda _class: SimpleNamespace(options=lambda **_options: actor)
        return SimpleNamespace(options=self._options_of)

    def _options_of(self, **options: Any) -> Any:
        self.options = options
        return SimpleNamespace(remote=self._submit)

    def _submit(self, _mailbox: object, number: int, **arguments: Any) -> _Task:
        self.tasks.append(_Task(number, arguments))
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

    def kill(self, actor: object) -> None:
        self.killed.append(actor)

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
    calls = ("remote", "wait", "get", "put", "cancel", "kill", "cluster_resources", "nodes")
    functions = {name: getattr(played, name) for name in calls}
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of the fitter, which only a test moves."""
    from adapters.training.execution import ray_fitter

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ray_fitter, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def _begin_sort(fitter: Any, cluster: _PlayedCluster) -> None:
    cluster.node["GPU"] = 1.0
    fitter.begin(LARGE_FLEET)
    note = _next(fitter)
    assert isinstance(note, Note)
    assert "with Ray Data" in note.text
    assert all(task.sorted_shares is cluster.sort for task in cluster.tasks)


def test_a_fleet_whose_rows_are_sorted_does_not_wait_for_resources(
    cluster: _PlayedCluster, fitter: Any, clock: SimpleNamespace
) -> None:
    _begin_sort(fitter, cluster)
    clock.now += 60.0
    assert fitter.next_frame(0.0) is None
    cluster.end(cluster.sort)
    assert fitter.next_frame(0.0) is None
    clock.now += 9.0
    assert fitter.next_frame(0.0) is None
    clock.now += 9.0
    note = fitter.next_frame(0.0)
    assert isinstance(note, Note)
    assert "waits for resources" in note.text


@pytest.mark.parametrize("last", [Done(metrics={}), Failed(error={"code": "fit_failed"})])
def test_after_its_last_frame_a_fit_does_not_wait_for_resources(
    cluster: _PlayedCluster, fitter: Any, clock: SimpleNamespace, last: Frame
) -> None:
    cluster.node["GPU"] = 1.0
    fitter.begin(ALONE)
    clock.now += 60.0
    cluster.send(cluster.tasks[0], last)
    assert isinstance(fitter.next_frame(0.0), type(last))
    with pytest.raises(FitterDied):
        fitter.next_frame(0.0)


@pytest.mark.parametrize("is_found_by_a_task", [True, False])
def test_an_error_of_the_sort_ends_the_fit(fitter: Any, cluster: _PlayedCluster, is_found_by_a_task: bool) -> None:
    from ray.exceptions import RayTaskError

    _begin_sort(fitter, cluster)
    ended = cluster.tasks[2] if is_found_by_a_task else cluster.sort
    cause = pickle.loads(pickle.dumps(FitFailed("the rows are gone")))  # noqa: S301 - its own bytes
    # The error of a read within the error of the sort.
    cluster.end(ended, RayTaskError("sort", "", RayTaskError("read", "", cause)))
    frame = _next(fitter)
    assert isinstance(frame, Failed)
    assert frame.error == FitFailed("the rows are gone").members()
    assert all(task.is_cancelled for task in cluster.tasks if task is not ended)
    assert cluster.killed == [cluster.sorter]


def test_the_cause_of_an_error_that_ray_data_wraps_is_found() -> None:
    if find_spec("ray") is None:
        skip_or_fail("ray is not installed")
    from ray.exceptions import RayTaskError, UserCodeException

    from adapters.training.execution.ray_fitter import _cause_of

    cause, wrapped = FitFailed("the rows are gone"), UserCodeException("UDF failed")
    wrapped.__cause__ = cause
    assert _cause_of(RayTaskError("read", "", wrapped)) is cause
    assert _cause_of(RayTaskError("read", "", ValueError())) is None


@pytest.mark.parametrize("error", [StorageFailed("no bucket answers"), StorageFull("the disk is full")])
def test_an_error_of_a_node_s_storage_in_the_sort_ends_the_attempt(
    fitter: Any, cluster: _PlayedCluster, error: LoraplexError
) -> None:
    from ray.exceptions import RayTaskError

    _begin_sort(fitter, cluster)
    cluster.end(cluster.sort, RayTaskError("sort", "", error))
    note = _next(fitter)
    assert isinstance(note, Note)
    assert error.detail in note.text
    with pytest.raises(FitterDied):
        fitter.next_frame(1.0)
    assert all(task.is_cancelled for task in cluster.tasks)


@pytest.mark.parametrize("error", [StorageFailed("no bucket answers"), StorageFull("the disk is full")])
def test_an_error_of_a_node_s_storage_is_a_task_that_died(
    fitter: Any, cluster: _PlayedCluster, error: LoraplexError
) -> None:
    cluster.node["GPU"] = 1.0
    fitter.begin(FLEET)
    task = cluster.tasks[2]
    for deaths in range(1, 4):
        cluster.send(task, Failed(error=error.members()))
        note = _next(fitter)
        assert isinstance(note, Note)
        assert error.detail in note.text
        task = cluster.tasks[-1]
        assert len(cluster.tasks) == min(4 + deaths, 6)
    with pytest.raises(FitterDied):
        fitter.next_frame(1.0)
    fitter.begin(ALONE)
    cluster.send(cluster.tasks[-1], Failed(error=error.members()))
    assert isinstance(_next(fitter), Note)
    with pytest.raises(FitterDied):
        fitter.next_frame(1.0)


def test_the_death_of_the_sort_ends_the_attempt_without_other_tasks(fitter: Any, cluster: _PlayedCluster) -> None:
    from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError

    for in_sort in (True, False):
        _begin_sort(fitter, cluster)
        tasks = len(cluster.tasks)
        if in_sort:
            cluster.end(cluster.sort, ActorDiedError())
        else:
            cluster.sort.error = None
            # The blocks of the sorted rows end with the actor.
            cluster.end(cluster.tasks[-1], RayTaskError("run_task", "", OwnerDiedError("00", b"", "")))
        with pytest.raises(FitterDied):
            fitter.next_frame(1.0)
        assert len(cluster.tasks) == tasks
        fitter.kill()


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


def test_a_silent_task_counts_as_dead(cluster: _PlayedCluster, fitter: Any, clock: SimpleNamespace) -> None:
    cluster.node["GPU"] = 1.0
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
