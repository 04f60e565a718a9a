"""Child process that fits one job at a time, and that can be killed without harm.

Requests arrive on standard input, one JSON object per line; the first names the base layer and the limits of the
process. Frames leave on standard output (see `fit_client.Frame`).
"""

import ctypes
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from adapters.errors import BaseChanged, BaseNotLoadable, BlobCorrupt, FitFailed, LoraplexError, OutOfMemory
from adapters.lora.adapter import digest_of, from_canonical_bytes
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.storage.blob_location import BlobLocation
from adapters.training.candidates.auto_fit import fit_auto, fit_fleet_auto
from adapters.training.candidates.fit_result import AutoFit
from adapters.training.closed_form.refit import refit
from adapters.training.closed_form.statistics import Statistics
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.comparison import ComparedVersion, compare_versions
from adapters.training.evaluation.judgement import LiveVersion, RowEvidence
from adapters.training.evaluation.row_errors import evidence_keys
from adapters.training.execution.fit_client import (
    Done,
    Failed,
    FitRequest,
    Frame,
    Note,
    Outcomes,
    Progress,
    ShareRows,
    StoredVersion,
    Trained,
    is_allocation_failure,
)
from adapters.training.fit import Fit, Watcher, fit
from adapters.training.fleet import FleetSource, Outcome, fit_fleet
from adapters.training.gradient.stack import History
from adapters.training.gradient.training_loop import CheckpointOptions, Epochs
from adapters.training.planning.estimate import PROCESS_BYTES
from adapters.training.planning.split import Split, SplitBy
from adapters.training.scratch import SCRATCH, Scratch

_SECONDS_BETWEEN_REPORTS = 0.5
_PR_SET_PDEATHSIG = 1
# Parameter of mallopt: allocations of this size and more are mapped, and returned when they are freed.
_M_MMAP_THRESHOLD = -3
_LEAST_MAPPED_BYTES, _LARGEST_THRESHOLD = 2**18, 2**25


def main() -> None:
    """Serve requests until standard input closes."""
    # A Ctrl-C reaches the whole process group; the trainer handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_the_trainer()
    out = _claim_stdout()
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    first = json.loads(requests.get())
    torch.set_num_threads(first["threads"])
    # Start its threads before there is a limit: a stack that cannot be allocated would end the process.
    torch.ones(2**20).neg_()
    # The limit does not count mapped files, so data may be larger than it.
    resource.setrlimit(resource.RLIMIT_DATA, (first["memory_bytes"], first["memory_bytes"]))
    try:
        base = load_base_layer(**first["base"])
    except BaseNotLoadable as error:
        sys.exit(f"loraplex: {error.detail}")
    Frame().write(out)
    while True:
        _Fit(json.loads(requests.get()), base, out, memory_bytes=first["memory_bytes"]).serve()


def _die_with_the_trainer() -> None:
    """Let the kernel kill this process with the trainer: a stopped process does not see that standard input closes."""
    # Only Linux has prctl.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _set_mapped_from(size: int) -> None:
    """Let the allocator map all allocations of this size and more."""
    # Only glibc has mallopt.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


def _read_requests(requests: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    # The trainer has ended, so nothing can receive the fit.
    os._exit(0)


def _claim_stdout() -> BinaryIO:
    """Return the pipe for frames; anything else that is printed goes to standard error."""
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return frames


class _Fit:
    """Fit of one request, from its data to its last frame."""

    def __init__(self, message: Mapping[str, Any], base: BaseLayer, out: BinaryIO, *, memory_bytes: int) -> None:
        self._request, self._base, self._out = FitRequest.from_json(message["request"]), base, out
        location = BlobLocation.from_json(message["blobs"])
        self._blobs, self._scratch_folder, self._memory_bytes = location.open(), location.folder / SCRATCH, memory_bytes
        self._scratch: Scratch | None = None
        self._checkpoint = Path(message["checkpoint"])
        self._share = None if message["rows"] is None else ShareRows(*message["rows"])
        self._latest = Progress()
        self._epochs = Epochs() if self._request.times_epochs else None
        self._reported_at = time.monotonic()

    def serve(self) -> None:
        """Fit, and send the result; an error becomes a frame too."""
        try:
            self._fit()
        except LoraplexError as error:
            self._fail(error)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._fail(OutOfMemory(f"the fit ran out of memory: {error}"))
        except Exception as error:
            traceback.print_exc()
            kind = OutOfMemory if is_allocation_failure(str(error)) else FitFailed
            self._fail(kind(f"{type(error).__name__}: {str(error)[:300]}"))
        finally:
            if self._request.job.scratch_bytes:
                _set_mapped_from(_LARGEST_THRESHOLD)

    def _fit(self) -> None:
        request, base = self._request, self._base
        if base.fingerprint != request.base:
            # It was loaded when this process started, and the file may have been replaced before the trainer read it.
            raise BaseChanged("the base layer's file has changed", given=base.fingerprint, expected=request.base)
        data = self._open_data()
        spec, feature_space, labels = request.job.spec, request.feature_space, request.job.labels
        if request.compared:
            self._compare(data)
        elif request.statistics is not None:
            statistics = Statistics.from_bytes(self._blobs.read(request.statistics))
            self._finish(refit(base, statistics, data, spec, feature_space=feature_space, labels=labels))
        elif data.groups_N is not None:
            self._fit_fleet(data)
        else:
            checkpoint = CheckpointOptions(
                self._checkpoint, request.checkpoint_seconds, lambda text: self._send(Note(text=text, resumed=True))
            )
            watcher = Watcher(self._report, lambda text: self._send(Note(text=text)), checkpoint, self._epochs)
            live = self._read_live(data).get(0)
            names: dict[str, Any] = {"feature_space": feature_space, "labels": labels, "watcher": watcher}
            if spec.candidates:
                self._finish_auto(fit_auto(base, data, spec, live=_judgeable(live), **names))
                return
            self._finish(fit(base, data, spec, live=live, **names))

    def _open_data(self) -> TrainingData:
        """Open the job's data; raise `FitFailed` if they are missing, as after some restores."""
        if self._share is not None:
            _set_mapped_from(_LEAST_MAPPED_BYTES)
            path = Path(self._share.path)
            with path.open("rb") as file:
                path.unlink()
                return TrainingData.of_file(file, releases=True)
        try:
            path = self._blobs.local(self._request.data)
        except BlobCorrupt as error:
            raise FitFailed(error.detail) from None
        scratch_bytes = self._request.job.scratch_bytes
        if not scratch_bytes:
            return TrainingData.open(path)
        # Close to the limit, the gaps between small values that stay and large ones that are freed would exceed it.
        _set_mapped_from(_LEAST_MAPPED_BYTES)
        self._scratch = Scratch(
            self._scratch_folder, size=scratch_bytes, memory_bytes=self._memory_bytes - PROCESS_BYTES
        )
        began = time.monotonic()
        # Before the sort, during which a cache may evict the file.
        size = path.stat().st_size
        data, buckets = self._scratch.sort_by_group(path)
        took = f"{size} bytes, {buckets} buckets, {time.monotonic() - began:.1f} s"
        self._send(Note(text=f"the rows do not fit in memory, and were sorted by group on disk ({took})"))
        return data

    def _rows(self) -> range | None:
        """Return the rows with which the stacks of the share begin, if the rows were sorted elsewhere."""
        return None if self._share is None else range(self._share.begin, self._share.end)

    def _read_live(self, data: TrainingData) -> dict[int, LiveVersion]:
        """Read the live versions to compare with, by the position of the adapter."""
        request, versions = self._request, {}
        positions: Iterable[int] = request.live
        if request.live and request.share != (0, 1):
            stacks = FleetSource(data).share(self._base, request.job.spec, request.share, rows=self._rows())
            positions = request.live.keys() & chain.from_iterable(stacks)
        for position in positions:
            stored = request.live[position]
            adapter = evidence = None
            if stored.blob is not None:
                content = self._blobs.read(stored.blob, offset=stored.offset, length=stored.length)
                adapter = from_canonical_bytes(content)
            if stored.evidence is not None:
                evidence = RowEvidence.from_bytes(stored.evidence)
            elif stored.is_of_job and stored.unjudged is None:
                evidence = _evidence_by_hash(data, position, request.job.spec.split, request.job.labels)
            versions[position] = LiveVersion(adapter, evidence, stored.unjudged)
        return versions

    def _compare(self, data: TrainingData) -> None:
        job, versions = self._request.job, map(self._read_version, self._request.compared)
        progress = partial(self._report, loss=None, history=[])
        result = compare_versions(
            self._base, data, job.spec, versions, labels=job.labels, output_labels=job.output_labels, progress=progress
        )
        self._send(Done(metrics={}, result=result))

    def _read_version(self, stored: StoredVersion) -> ComparedVersion:
        """Return a version with its adapter; one that is damaged, or was deleted meanwhile, has a problem."""
        adapter, problem = None, stored.problem
        if problem is None and stored.digest is not None:
            try:
                content = self._blobs.read(stored.blob, offset=stored.offset, length=stored.length)
                if digest_of(content) != stored.digest:
                    raise BlobCorrupt("its stored bytes are not those that were published")
                adapter = from_canonical_bytes(content)
            except BlobCorrupt as error:
                problem = error.detail
        return ComparedVersion(
            reference=stored.reference,
            adapter=adapter,
            labels=None if adapter is None else adapter.labels,
            loss=stored.loss,
            problem=problem,
        )

    def _fit_fleet(self, data: TrainingData) -> None:
        request, done = self._request, frozenset(self._request.done)
        finished, live = len(done), self._read_live(data)
        arguments: dict[str, Any] = {
            "done": done,
            "progress": lambda _step, loss: self._report(finished, loss, []),
            "feature_space": request.feature_space,
            "labels": request.job.labels,
            "live": live,
        }
        spec = request.job.spec
        stacks: Iterator[Sequence[Outcome | AutoFit]]
        if spec.candidates:
            arguments["live"] = {position: _judgeable(version) for position, version in live.items()}
            arguments |= {"wants_prior": request.wants_prior, "scratch": self._scratch}
            stacks = fit_fleet_auto(self._base, data, spec, **arguments)
        else:
            stacks = fit_fleet(self._base, data, spec, share=request.share, rows=self._rows(), **arguments)
        for outcomes in stacks:
            finished += len(outcomes)
            self._send(_stack_frame(outcomes))
        self._send(Done(metrics={}))

    def _report(self, step: int, loss: float | None, history: History) -> None:
        self._latest = Progress(step=step, loss=loss, history=history)
        if time.monotonic() - self._reported_at >= _SECONDS_BETWEEN_REPORTS:
            self._reported_at = time.monotonic()
            self._send(self._latest)

    def _finish(self, result: Fit) -> None:
        attached = {} if result.statistics is None else {"statistics": result.statistics.to_bytes()}
        contents = [result.adapter.canonical_bytes, *attached.values()]
        self._send(
            Done(
                metrics=result.metrics,
                history=result.history,
                spec=asdict(result.spec),
                report=None if result.report is None else result.report.to_json(),
                also=[*attached],
                contents=contents,
            )
        )

    def _finish_auto(self, result: AutoFit) -> None:
        if result.error is not None:
            raise result.error
        assert result.adapter is not None
        attached = {} if result.evidence is None else {"evidence": result.evidence.to_bytes()}
        self._send(
            Done(
                metrics=result.metrics,
                spec=asdict(result.spec),
                report=None if result.report is None else result.report.to_json(),
                suspects=result.suspects,
                also=[*attached],
                contents=[result.adapter.canonical_bytes, *attached.values()],
            )
        )

    def _fail(self, error: LoraplexError) -> None:
        latest = self._latest
        self._send(Failed(step=latest.step, loss=latest.loss, history=latest.history, error=error.members()))

    def _send(self, frame: Frame) -> None:
        """Write a frame with the epochs that have ended since the last one."""
        (frame if self._epochs is None else replace(frame, epochs=self._epochs.take())).write(self._out)


def _judgeable(live: LiveVersion | None) -> LiveVersion | None:
    """Return a live version without its adapter if it cannot be judged: only `if_better` may compare it then."""
    return live if live is None or live.unjudged is None else replace(live, adapter=None)


def _evidence_by_hash(
    data: TrainingData, position: int, split: Split | None, labels: Sequence[str | int] | None
) -> RowEvidence | None:
    """Return evidence that a version was trained on the rows that a hash does not hold out, without their errors.

    It is needed only if all rows of the adapter are evaluated: of many rows, only those that are held out are.
    """
    key_N = data.key_N
    if split is None or split.by is not SplitBy.HASH or key_N is None:
        return None
    rows_K = torch.arange(data.rows) if data.groups_N is None else (data.groups_N == position).nonzero()[:, 0]
    if split.holds_out(len(rows_K), key_N[rows_K]):
        return None
    keys_K = evidence_keys(data, rows_K[~split.held_by_hash(key_N[rows_K])], labels)
    return RowEvidence(keys_K, np.full(len(keys_K), np.nan, np.float32))


def _stack_frame(outcomes: Sequence[Outcome | AutoFit]) -> Outcomes:
    """Return the frame of a stack of a fleet."""
    trained, contents, evidence = [], [], {}
    for outcome in outcomes:
        if outcome.adapter is None:
            continue
        report = None if outcome.report is None else outcome.report.to_json()
        spec = asdict(outcome.spec) if isinstance(outcome, AutoFit) else None
        trained.append(Trained(outcome.position, outcome.metrics, report, spec))
        contents.append(outcome.adapter.canonical_bytes)
        if isinstance(outcome, AutoFit) and outcome.evidence is not None:
            evidence[outcome.position] = outcome.evidence.to_bytes()
    failed = [(outcome.position, outcome.error.members()) for outcome in outcomes if outcome.error]
    return Outcomes(trained=trained, failed=failed, evidence=[*evidence], contents=[*contents, *evidence.values()])
