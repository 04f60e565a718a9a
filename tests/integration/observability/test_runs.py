"""What is told of a trainer's runs: how each ended, when its epochs were, what it published."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adapters.storage.store_identity import CHECKPOINTS
from adapters.training.execution.telemetry import Ending, Listener, Publish, Run
from adapters.training.execution.trainer import Trainer
from adapters.training.gradient.checkpoint import CheckpointFolder
from adapters.training.gradient.training_loop import MAX_RECORDED_EPOCHS
from app.observability.metrics.metric_values import sum_values
from app.observability.metrics.recorder import Metrics
from app.observability.tracing import Tracing
from app.observability.training import listener
from app.settings import Settings
from tests.support.fitters import reused_fitter
from tests.support.long_jobs import submit_endless, wait_until_it_runs, wait_until_it_steps
from tests.support.metrics_exposition import series, shown_of
from tests.support.process_tree import FIT, children
from tests.support.service import DEADLINE_SECONDS, eventually, serving, train

DATA = {"inputs": [[float(row % 7), 1.0] for row in range(20)], "targets": [[float(row % 3)] for row in range(20)]}
LEASE_SECONDS = 1


class Told(NamedTuple):
    """A service, and what was told of its trainer."""

    client: httpx.Client
    runs: list[Run]
    publishes: list[Publish]
    folder: Path

    def run(self) -> Run:
        """The one run, waited for."""
        eventually(lambda: self.runs, what="the end of a run")
        return self.runs[-1]


@contextmanager
def training(folder: Path, listens: Listener) -> Iterator[tuple[httpx.Client, threading.Event]]:
    """A service with a trainer that somebody listens to."""
    settings = Settings(data_dir=folder, base="random:2,1,42", lease_seconds=LEASE_SECONDS)
    stop = threading.Event()
    with serving(settings) as (client, service), reused_fitter(settings) as fitter:
        trainer = Trainer(
            service.catalog,
            service.queue,
            service.base,
            fitter,
            stop=stop,
            lease_seconds=LEASE_SECONDS,
            checkpoints=CheckpointFolder(folder / CHECKPOINTS),
            listener=listens,
        )
        thread = threading.Thread(target=trainer.run)
        thread.start()
        try:
            yield client, stop
        finally:
            stop.set()
            thread.join(DEADLINE_SECONDS)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """One trainer for all tests here."""
    runs: list[Run] = []
    publishes: list[Publish] = []
    heard = Listener(published=publishes.append, ran=runs.append, wants_epochs=True)
    folder = tmp_path_factory.mktemp("told")
    with training(folder, heard) as (client, _):
        yield Told(client, runs, publishes, folder)


@pytest.fixture(autouse=True)
def _nothing_yet(request: pytest.FixtureRequest) -> None:
    if "told" in request.fixturenames:
        told: Told = request.getfixturevalue("told")
        told.runs.clear()
        told.publishes.clear()


def _train(client: httpx.Client, **settings: Any) -> dict[str, Any]:
    return train(client, name="acme", rank=1, data=DATA, training={"batch_size": 8} | settings)


def test_each_epoch_is_told_of_with_its_times(told: Told) -> None:
    job = _train(told.client, epochs=3)
    run = told.run()
    assert (run.job.id, run.ending, run.method, run.resumed) == (job["id"], Ending.SUCCEEDED, "adamw", False)
    assert [(epoch.number, epoch.every) for epoch in run.epochs] == [(1, 1), (2, 1), (3, 1)]
    times = [run.began, *(time for epoch in run.epochs for time in (epoch.began, epoch.ended)), run.ended]
    assert times == sorted(times)
    assert run.epochs[-1].loss == pytest.approx(job["history"][-1][1])
    (publish,) = run.publishes
    assert publish.adapters == 1
    assert run.epochs[-1].ended <= publish.began < publish.ended <= run.ended
    assert told.publishes == [publish]


@pytest.mark.slow
def test_of_very_many_epochs_some_are_told_of(told: Told) -> None:
    _train(told.client, epochs=10 * MAX_RECORDED_EPOCHS + 1)
    epochs = told.run().epochs
    assert [epoch.number for epoch in epochs] == list(range(11, 10 * MAX_RECORDED_EPOCHS + 2, 11))
    assert {epoch.every for epoch in epochs} == {11}
    assert len(epochs) <= MAX_RECORDED_EPOCHS


def test_an_epoch_that_steps_cut_short_is_told_of(told: Told) -> None:
    _train(told.client, epochs=5, max_steps=4)
    assert [epoch.number for epoch in told.run().epochs] == [1, 2]


def test_a_closed_form_has_no_epochs(told: Told) -> None:
    train(told.client, name="acme", rank=1, data=DATA, training={"method": "closed_form"})
    run = told.run()
    assert (run.method, run.epochs, run.ending) == ("closed_form", [], Ending.SUCCEEDED)


def test_every_publish_of_a_fleet_is_told_of_when_it_is_made(told: Told) -> None:
    data = {**DATA, "groups": [row % 4 for row in range(20)]}
    job = train(told.client, name="fleet-{group}", rank=1, data=data, training={"epochs": 2})
    assert job["status"] == "succeeded", job["error"]
    run = told.run()
    assert sum(publish.adapters for publish in run.publishes) == 4
    assert told.publishes == run.publishes


def test_a_run_that_fails_says_so(told: Told) -> None:
    job = _train(told.client, epochs=50, method="sgd", learning_rate=1e6)
    assert job["error"]["code"] == "diverged"
    assert (told.run().ending, told.publishes) == (Ending.FAILED, [])


def test_a_run_that_is_cancelled_is_lost_to_its_trainer(told: Told) -> None:
    job_id = submit_endless(told.client)
    wait_until_it_runs(told.client, job_id)
    told.client.post(f"/jobs/{job_id}/cancel").raise_for_status()
    assert told.run().ending is Ending.LOST


def test_a_run_whose_process_dies_says_so_and_the_next_goes_on_from_its_checkpoint(told: Told) -> None:
    job_id = submit_endless(told.client)
    wait_until_it_steps(told.client, job_id)
    eventually(lambda: list((told.folder / CHECKPOINTS).glob(f"{job_id}.*.safetensors")), what="a checkpoint")
    for process in children(FIT):
        process.kill()
    assert told.run().ending is Ending.DIED
    wait_until_it_steps(told.client, job_id, attempt=2)
    told.client.post(f"/jobs/{job_id}/cancel").raise_for_status()
    eventually(lambda: len(told.runs) == 2, what="the end of the second run")
    assert told.runs[-1].resumed
    assert told.runs[-1].job.attempt == 2


def test_a_trainer_that_stops_says_that_it_handed_its_job_back_and_is_counted_and_traced(tmp_path: Path) -> None:
    metrics, tracing, exported = Metrics(None, "trainer"), Tracing("trainer-1"), InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    tracing._tracer = provider.get_tracer("test")
    with training(tmp_path, listener(metrics, tracing)) as (client, stop):
        job = _train(client, epochs=2)
        job_id = submit_endless(client)
        wait_until_it_runs(client, job_id)
        stop.set()
        eventually(lambda: client.get(f"/jobs/{job_id}").json()["status"] == "queued", what="the job's return")
    tracing.close(1.0)
    shown = shown_of(sum_values(process.values for process in metrics.all_processes()))
    assert shown[series("training_seconds_count", method="adamw", status="succeeded")] == 1
    assert shown[series("training_seconds_count", method="sgd", status="handed_back")] == 1
    assert shown[series("adapters_published_total", source="job")] == 1
    assert shown[series("publish_seconds_count", source="job")] == 1
    assert shown[series("fits_died_total")] == 0
    _check_trace(exported.get_finished_spans(), job)


def _check_trace(spans: tuple[ReadableSpan, ...], job: dict[str, Any]) -> None:
    (root,) = [span for span in spans if (span.attributes or {}).get("loraplex.job") == job["id"]]
    assert root.context is not None
    below = [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]
    assert [span.name for span in below] == ["epoch", "epoch", "publish"]
    assert [(span.attributes or {}).get("loraplex.epoch") for span in below] == [1, 2, None]
    times = [(span.start_time or 0, span.end_time or 0) for span in (root, *below)]
    assert min(began for began, _ in times) == times[0][0] > 0
    assert max(ended for _, ended in times) == times[0][1]
    assert all(began <= ended for began, ended in times)
