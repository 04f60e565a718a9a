"""The durable queue of training jobs: leases, heartbeats, fencing tokens, cancelling.

The values are in `job`, and the statements on the adapters of a job in `job_adapters`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access import audit
from adapters.access.audit import Action, Change, current_actor
from adapters.access.quotas import check_queued_jobs
from adapters.catalog.versions import Publication, Published
from adapters.clock import rfc3339
from adapters.errors import ClaimLost, JobEnded, JobNotEnded, JobNotFound, NoSuspects, QueueFull, WorkerDied
from adapters.jobs import job_adapters
from adapters.jobs.claims import SHOWN, check_claim, lock_claimable, lock_job, next_claimable
from adapters.jobs.job import TRANSITIONS, Job, JobState, JobStatus, LogLine, job_from_row, state_from_row
from adapters.jobs.job_adapters import ALL, NO_REPORTS, WAITING, JobAdapter, Selection
from adapters.jobs.revert import RevertResult, join, revert
from adapters.jobs.training_job import TrainingJob
from adapters.storage import schema
from adapters.storage.blobs import Content
from adapters.storage.database import CommitWatch, Database
from adapters.storage.pending_blobs import BlobWriter
from adapters.storage.schema import jobs
from adapters.storage.slices import write_in_slices

MAX_ATTEMPTS = 3
# Number of the newest lines of a job's log that are kept.
MAX_LOG_LINES = 200
_MAX_LINE_CHARACTERS = 500
# Called in the transaction that stores a job, with its id.
OnSubmit = Callable[[Connection, str], object]
# Adapters that one transaction of a revert points back: it takes some milliseconds.
REVERTED_AT_ONCE = 250
# Adapters that one transaction fails.
FAILED_AT_ONCE = 1000
# Sorts after every character of an id.
_AFTER_ALL = "\U0010ffff"
_STATE = [jobs.c[name] for name in JobState.__dataclass_fields__]
_LISTED = [column for column in SHOWN if column.name not in ("history", "log")]


class JobQueue:
    """The jobs of all tenants in one data folder. Safe to use from any thread and from several processes."""

    def __init__(
        self, database: Database, writer: BlobWriter, *, now: Callable[[], float], lease_seconds: float
    ) -> None:
        self._database = database
        self._writer = writer
        self._now = now
        self._lease_seconds = lease_seconds

    def now(self) -> float:
        """Return the seconds since the epoch by the clock of the jobs."""
        return self._now()

    def submit(
        self,
        job_id: str,
        *,
        tenant: str,
        adapter: str,
        adapters: Sequence[JobAdapter],
        base: str,
        feature_space: str | None,
        training: TrainingJob,
        data: Content | None,
        max_queued: int,
        on_submit: OnSubmit | None = None,
    ) -> Job:
        """Store the data, then the job: both are durable when this returns.

        `adapter` is what the job shows: a name, or the template of a fleet's names. `adapters` are the adapters that it
        trains. `on_submit` is called in the transaction that stores the job, with its id. Raises `QueueFull`,
        `QuotaExceeded`, `StorageFull` and what a writer of `data` or `on_submit` raises, and then nothing is stored.
        """
        # Checked before the data is written, so that a full queue costs no disk; decided in the transaction.
        with self._database.read() as connection:
            _check_room(connection, max_queued, base, tenant=tenant)
        storing = job_adapters.storing(self._database, self._writer, job_id, adapters, tenant=tenant)
        with self._writer.upload() as upload:
            values = {
                "id": job_id,
                "kind": training.kind,
                "tenant": tenant,
                "adapter": adapter,
                "status": JobStatus.QUEUED,
                "created_at": rfc3339(self._now()),
                "attempt": 0,
                "fence": 0,
                "base": base,
                "feature_space": feature_space,
                "spec": training.to_json(),
                "progress": {"step": 0, "steps": training.steps, "loss": None},
                "data_file": None if data is None else upload.write(data),
                "history": [],
                "submitted_by": asdict(current_actor()),
                "tally": job_adapters.tally_of_new(adapters),
            }
            with storing as store_adapters, self._database.write() as connection:
                _check_room(connection, max_queued, base, tenant=tenant)
                connection.execute(sa.insert(jobs).values(values))
                store_adapters(connection)
                _record(connection, Action.JOB_SUBMIT, job_id, tenant=tenant)
                upload.publish(connection)
                if on_submit is not None:
                    on_submit(connection, job_id)
                return _get(connection, job_id, tenant=tenant)

    def watch(self) -> CommitWatch:
        """Open a watch of the jobs."""
        return self._database.commit_watch()

    def get(self, job_id: str, *, tenant: str) -> Job:
        """Return one job, of a fleet with its summary so far; raise `JobNotFound`."""
        with self._database.read() as connection:
            job = _get(connection, job_id, tenant=tenant)
            if not job.training.is_fleet or "summary" in (job.report or {}):
                return job
            summary = job_adapters.summary_of(job_adapters.read_tally(connection, job_id))
        return replace(job, report={**(job.report or {}), "summary": summary})

    def list(
        self,
        *,
        tenant: str,
        status: JobStatus | None = None,
        adapter: str | None = None,
        prefix: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Return jobs with sequence numbers below `before`, newest first, without history and log.

        adapter: a name that they train, alone or in a fleet. prefix: the beginning of their ids.
        """
        # The adapters of a job have its tenant, and an index on that of jobs would find all of its jobs.
        conditions = [] if adapter is not None and status is None else [jobs.c.tenant == tenant]
        if status is not None:
            conditions.append(jobs.c.status == status)
        if adapter is not None:
            trained = schema.job_adapters.c
            of_adapter = (trained.tenant == tenant, trained.name == adapter)
            conditions.append(jobs.c.id.in_(sa.select(trained.job).where(*of_adapter)))
        if prefix is not None:
            # A range, which SQLite finds in the index on ids.
            conditions += [jobs.c.id >= prefix, jobs.c.id < prefix + _AFTER_ALL]
        if before is not None:
            conditions.append(jobs.c.sequence < before)
        statement = sa.select(*_LISTED).where(*conditions).order_by(jobs.c.sequence.desc()).limit(limit)
        with self._database.read() as connection:
            return [job_from_row(row) for row in connection.execute(statement)]

    def state(self, job_id: str, *, tenant: str) -> JobState:
        """Return the state of one job; raise `JobNotFound`."""
        with self._database.read() as connection:
            _require(connection, job_id, tenant=tenant)
        return self.states([job_id])[job_id]

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Return the states of these jobs of any tenant, at most a few hundred."""
        with self._database.read() as connection:
            statement = sa.select(jobs.c.id, *_STATE).where(jobs.c.id.in_(job_ids))
            return {row.id: state_from_row(row) for row in connection.execute(statement)}

    def adapters(self, job_id: str, selection: Selection = ALL, *, tenant: str) -> Sequence[JobAdapter]:
        """Return the selected adapters of a job; raise `JobNotFound`."""
        with self._database.read() as connection:
            _require(connection, job_id, tenant=tenant)
            if selection.limit is not None:
                return job_adapters.list_adapters(connection, job_id, selection)
        return job_adapters.list_all(self._database, job_id, selection)

    def suspects(self, job_id: str, *, tenant: str) -> Sequence[Mapping[str, Any]]:
        """Return the rows whose label the other rows contradict, worst first; raise `JobNotFound` or `NoSuspects`."""
        with self._database.read() as connection:
            _require(connection, job_id, tenant=tenant)
            statement = sa.select(jobs.c.suspects, jobs.c.status).where(jobs.c.id == job_id)
            suspects, status = connection.execute(statement).one()
        if suspects is None:
            detail = f"job {job_id} is {status} and has no suspects: they are found in the labels of one adapter"
            raise NoSuspects(detail, field="id", given=job_id, expected="a job that trained one adapter on classes")
        return list(suspects)

    def revert(self, job_id: str, *, tenant: str) -> RevertResult:
        """Point back each live alias that the job moved and that still points at its version.

        Many adapters take several transactions. If a crash comes in between, a second revert does the rest. Raises
        `JobNotFound` and `JobNotEnded`.
        """
        with self._database.read() as connection:
            job = _get(connection, job_id, tenant=tenant)
        if not job.ended:
            detail = f"job {job_id} is {job.status}: cancel it first, or wait for its end"
            raise JobNotEnded(detail, field="id", given=job.status)
        parts: list[RevertResult] = []
        # The rows of a job that has ended do not change.
        slices = job_adapters.slices(self._database, job_id, Selection(limit=REVERTED_AT_ONCE), brief=True)
        write_in_slices(self._database, slices, lambda connection, part: parts.append(revert(connection, job, part)))
        return join(parts)

    def cancel(self, job_id: str, *, tenant: str) -> Job:
        """End a job that has not ended, or was cancelled before. Raises `JobNotFound` and `JobEnded`.

        The trainer that runs it can no longer publish, and notices this at its next check.
        """
        with self._database.write() as connection:
            lock_job(connection, job_id)
            job = _get(connection, job_id, tenant=tenant)
            if job.status is JobStatus.CANCELLED:
                return job
            if job.ended:
                raise JobEnded(f"job {job_id} has {job.status} already", field="id", given=job.status)
            cancelled = self._end(connection, job, JobStatus.CANCELLED)
            _record(connection, Action.JOB_CANCEL, job_id, tenant=tenant)
        # After the commit: a job that still has to run must not lose its data to a crash.
        self.remove_data(job)
        return cancelled

    def claim(self, *, base: str) -> Job | None:
        """Claim a job that is queued or whose lease has expired; return None if there is none.

        Takes the oldest of the tenant that has the fewest running jobs; among equals, of the tenant whose last job
        began first, so that no tenant waits for the backlog of another. Jobs of a tenant that runs as many as its limit
        allows stay queued. Takes only jobs for the base layer with this fingerprint: others belong to the trainers of
        another service on the same data folder. A job whose trainer died in its last attempt is ended as `worker_died`.
        """
        while True:
            # Trainers poll: only one that finds a job takes the write lock.
            with self._database.read() as connection:
                if next_claimable(connection, self._lease_time(connection), base) is None:
                    return None
            with self._database.write_job() as connection:
                now = self._lease_time(connection)
                if (job := lock_claimable(connection, now, base)) is None:
                    return None
                taken: dict[str, Any] = {"fence": job.fence + 1, "lease_until": now + self._lease_seconds}
                if job.attempt < MAX_ATTEMPTS:
                    # The fit begins again, so the progress of an earlier attempt is dropped.
                    progress = {**(job.progress or {}), "step": 0, "loss": None}
                    taken |= {"attempt": job.attempt + 1, "started_at": job.started_at or rfc3339(now)}
                    return _change_status(connection, job, JobStatus.RUNNING, **taken, progress=progress, history=[])
                # Taken over from a trainer that may only have been slow, and ended after this transaction.
                job = _change_status(connection, job, JobStatus.RUNNING, **taken)
            died = WorkerDied(f"the process that trained died on {MAX_ATTEMPTS} attempts")
            with suppress(ClaimLost):
                self.fail(job, died.members())

    def check_claim(self, claim: Job) -> None:
        """Raise `ClaimLost` if the job was cancelled, or claimed by another trainer."""
        with self._database.read() as connection:
            check_claim(connection, claim, locks=False)

    def heartbeat(
        self, claim: Job, *, progress: Mapping[str, Any] | None, history: Sequence[Any] | None = None
    ) -> None:
        """Renew the lease and store the progress, and the history if it is given; raise `ClaimLost`."""
        values: dict[str, Any] = {} if history is None else {"history": list(history)}
        with self._database.write_job() as connection:
            check_claim(connection, claim)
            lease_until = self._lease_time(connection) + self._lease_seconds
            _update(connection, claim, lease_until=lease_until, progress=progress, **values)

    def append_log(self, claim: Job, text: str) -> None:
        """Append a line to the job's log, and drop the oldest line of a full one; raise `ClaimLost`."""
        with self._database.write_job() as connection:
            check_claim(connection, claim)
            (state,) = map(state_from_row, connection.execute(sa.select(*_STATE).where(jobs.c.id == claim.id)))
            lines = state.log
            line = LogLine(rfc3339(self._now()), text[:_MAX_LINE_CHARACTERS], lines[-1].number + 1 if lines else 1)
            _update(connection, claim, log=[*lines[1 - MAX_LOG_LINES :], line])

    def waiting(self, claim: Job) -> Sequence[JobAdapter]:
        """Return the job's adapters that have neither version nor error; raise `ClaimLost`."""
        self.check_claim(claim)
        return job_adapters.list_all(self._database, claim.id, WAITING)

    def tally(self, claim: Job) -> dict[str, int]:
        """Return the numbers of the job's adapters that are `published` and `failed`, and the `total`."""
        with self._database.read() as connection:
            return job_adapters.progress_of(job_adapters.read_tally(connection, claim.id))

    def release(self, claim: Job) -> None:
        """Queue the job again without counting this claim. Raises `ClaimLost`."""
        with self._claimed(claim) as connection:
            _change_status(connection, claim, JobStatus.QUEUED, attempt=claim.attempt - 1, lease_until=None)

    def expire_lease(self, claim: Job) -> None:
        """Let any trainer claim the job at once, and count this claim, because its fit died. Raises `ClaimLost`."""
        with self._claimed(claim) as connection:
            _update(connection, claim, lease_until=self._lease_time(connection))

    def fail(self, claim: Job, error: Mapping[str, Any], **reached: Any) -> None:
        """End the job with an error; `reached` may have its `progress` and `history`. Raises `ClaimLost`."""
        self._fail_many(claim, error)
        with self._claimed(claim) as connection:
            self._end(connection, claim, JobStatus.FAILED, error=dict(error), **reached)
        self.remove_data(claim)

    def fail_adapters(self, claim: Job, failures: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Store the members of the errors of the adapters at these positions. Raises `ClaimLost`."""

        def fail(connection: Connection, part: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
            check_claim(connection, claim)
            job_adapters.fail(connection, claim.id, part)

        write_in_slices(self._database, schema.batched(failures), fail)

    def admit(self, connection: Connection, claim: Job, publications: Sequence[Publication]) -> Sequence[bool]:
        """Return which of the job's publications may become versions, as `admit` of `Catalog.publish`.

        An adapter whose name was deleted after the job was queued, or that exceeds a limit of the tenant, fails.
        Raises `ClaimLost`, and `AdapterDeleted` or `QuotaExceeded` if the job trains only that one.
        """
        check_claim(connection, claim)
        return job_adapters.admit(connection, claim, publications)

    def record(
        self,
        connection: Connection,
        claim: Job,
        published: Sequence[Published],
        reports: Mapping[int, Mapping[str, Any]] = NO_REPORTS,
    ) -> None:
        """Store the versions of the job's adapters, as `record` of `Catalog.publish`. Raises `ClaimLost`.

        reports: of the adapters at these positions.
        """
        check_claim(connection, claim)
        job_adapters.record(connection, claim.id, published, reports)

    def succeed(
        self,
        claim: Job,
        *,
        result: Mapping[str, Any] | None,
        progress: Mapping[str, Any],
        metrics: Mapping[str, Any] | None,
        history: Sequence[Any],
        report: Mapping[str, Any] | None = None,
        suspects: Sequence[Mapping[str, Any]] | None = None,
        connection: Connection | None = None,
    ) -> None:
        """End the job. Raises `ClaimLost`.

        With a transaction of the caller, `connection`, the data stay: the caller calls `remove_data` after the commit.
        """
        with self._claimed(claim, connection) as transaction:
            values = {"result": result, "progress": progress, "metrics": metrics, "history": history}
            self._end(transaction, claim, JobStatus.SUCCEEDED, **values, report=report, suspects=suspects)
        if connection is None:
            self.remove_data(claim)

    def remove_data(self, job: Job) -> None:
        """Remove the data of a job that has ended."""
        if job.data_file is not None:
            self._writer.blobs.remove([job.data_file])

    def _lease_time(self, connection: Connection) -> float:
        """Return the time by the clock of the leases, that of the database if it has one."""
        server_time = self._database.server_time(connection)
        return self._now() if server_time is None else server_time

    @contextmanager
    def _claimed(self, claim: Job, connection: Connection | None = None) -> Iterator[Connection]:
        """Write in the caller's transaction, or in a new one, for the trainer of a claim; raise `ClaimLost`."""
        with self._database.write() if connection is None else nullcontext(connection) as transaction:
            check_claim(transaction, claim)
            yield transaction

    def _fail_many(self, claim: Job, error: Mapping[str, Any]) -> None:
        """Fail the adapters that wait, if there are more than one transaction may change. Raises `ClaimLost`.

        If a crash comes in between, the next attempt trains only the others.
        """
        with self._database.read() as connection:
            if job_adapters.read_tally(connection, claim.id)["waiting"] <= FAILED_AT_ONCE:
                return
            last = job_adapters.last_position(connection, claim.id)

        def fail(connection: Connection, first: int) -> None:
            check_claim(connection, claim)
            last_of_slice = first + FAILED_AT_ONCE - 1
            job_adapters.fail_waiting(connection, claim.id, error, first=first, last=last_of_slice)

        write_in_slices(self._database, range(0, last + 1, FAILED_AT_ONCE), fail)

    def _end(self, connection: Connection, job: Job, status: JobStatus, **values: Any) -> Job:
        if status is JobStatus.FAILED and job_adapters.read_tally(connection, job.id)["waiting"]:
            last = job_adapters.last_position(connection, job.id)
            job_adapters.fail_waiting(connection, job.id, values["error"], first=0, last=last)
        if job.training.is_fleet:
            summary = job_adapters.summary_of(job_adapters.read_tally(connection, job.id))
            values["report"] = {**(values.get("report") or {}), "summary": summary}
        values |= {"finished_at": rfc3339(self._now()), "lease_until": None, "data_file": None}
        return _change_status(connection, job, status, **values)


def _get(connection: Connection, job_id: str, *, tenant: str) -> Job:
    _require(connection, job_id, tenant=tenant)
    return job_from_row(connection.execute(sa.select(*SHOWN).where(jobs.c.id == job_id)).one())


def _require(connection: Connection, job_id: str, *, tenant: str) -> None:
    """Raise `JobNotFound` if the tenant has no such job."""
    statement = sa.select(jobs.c.id).where(jobs.c.tenant == tenant, jobs.c.id == job_id)
    if connection.execute(statement).one_or_none() is None:
        raise JobNotFound(f"there is no job {job_id!r}", field="id", given=job_id)


def _record(connection: Connection, action: Action, job_id: str, *, tenant: str) -> None:
    audit.record(connection, [Change(action, f"jobs/{job_id}")], tenant=tenant)


def _update(connection: Connection, job: Job, **values: Any) -> None:
    """Set columns of a job's row."""
    connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(**values))


def _change_status(connection: Connection, job: Job, to: JobStatus, **values: Any) -> Job:
    """Change a job's status by a legal transition, set other columns, and return the job as it is then."""
    if to not in TRANSITIONS[job.status]:
        raise ValueError(f"a job cannot go from {job.status} to {to}")
    _update(connection, job, status=to, **values)
    return _get(connection, job.id, tenant=job.tenant)


def _check_room(connection: Connection, max_queued: int, base: str, *, tenant: str) -> None:
    """Raise `QuotaExceeded` for a tenant, and `QueueFull` if `max_queued` jobs for this base layer are queued.

    Jobs for another base layer do not count: no trainer of this service takes them, so they would fill the queue for
    good.
    """
    check_queued_jobs(connection, tenant=tenant)
    queued = (jobs.c.status == JobStatus.QUEUED, jobs.c.base == base)
    waiting = connection.scalars(sa.select(sa.func.count()).select_from(jobs).where(*queued)).one()
    if waiting >= max_queued:
        raise QueueFull(f"the queue is full: {waiting} jobs are queued", expected=f"fewer than {max_queued}")
