"""The durable queue of training jobs: lease, heartbeat, fence, cancel."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters import catalog_rows, tables
from adapters import jobs as rows
from adapters.blobs import BlobStore
from adapters.clock import rfc3339
from adapters.database import Database
from adapters.errors import AdapterDeleted, JobEnded, LoraplexError, WorkerDied
from adapters.jobs import Job, Status
from adapters.tables import DEFAULT_TENANT
from adapters.versions import Version

MAX_ATTEMPTS = 3
_columns = tables.jobs.c


class JobQueue:
    """The jobs in one data folder. Safe to use from any thread and from several processes."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        *,
        now: Callable[[], float],
        lease_seconds: float,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._now = now
        self._lease_seconds = lease_seconds

    def submit(
        self,
        job_id: str,
        *,
        adapter: str,
        base: str,
        feature_space: str | None,
        spec: Mapping[str, Any],
        steps: int,
        data: bytes,
        max_queued: int,
    ) -> Job:
        """Store the data, then the job: both are durable when this returns. Raises `QueueFull`."""
        with self._blobs.publishing():
            # Looked at before the data is written, so that a full queue costs no disk; decided in the transaction.
            with self._database.read() as connection:
                rows.check_room(connection, max_queued)
            data_file = self._blobs.write(data)
            try:
                with self._database.write() as connection:
                    rows.check_room(connection, max_queued)
                    connection.execute(
                        sa.insert(tables.jobs).values(
                            id=job_id,
                            tenant=DEFAULT_TENANT,
                            adapter=adapter,
                            status=Status.QUEUED,
                            created_at=rfc3339(self._now()),
                            attempt=0,
                            fence=0,
                            base=base,
                            feature_space=feature_space,
                            deletions=catalog_rows.deletions(connection, adapter),
                            spec=dict(spec),
                            progress={"step": 0, "steps": steps, "loss": None},
                            data_file=data_file,
                            history=[],
                        )
                    )
                    return rows.get(connection, job_id)
            except LoraplexError:
                # Refused for certain. After any other error a commit may have happened: leave it to the sweep.
                self._blobs.remove([data_file])
                raise

    def get(self, job_id: str) -> Job:
        """One job; raises `JobNotFound`."""
        with self._database.read() as connection:
            return rows.get(connection, job_id)

    def list(
        self,
        *,
        status: Status | None = None,
        adapter: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Jobs, newest first, from below sequence number `before` on, their histories left out."""
        statement = sa.select(*(column for column in _columns if column.name != "history"))
        statement = statement.where(_columns.tenant == DEFAULT_TENANT)
        if status is not None:
            statement = statement.where(_columns.status == status)
        if adapter is not None:
            statement = statement.where(_columns.adapter == adapter)
        if before is not None:
            statement = statement.where(_columns.sequence < before)
        statement = statement.order_by(_columns.sequence.desc()).limit(limit)
        with self._database.read() as connection:
            return [rows.as_job(row) for row in connection.execute(statement)]

    def cancel(self, job_id: str) -> Job:
        """End a job that has not ended; cancelled already is fine. Raises `JobNotFound` and `JobEnded`.

        The trainer that runs it sees this within its next look, and can no longer publish.
        """
        with self._database.write() as connection:
            job = rows.get(connection, job_id)
            if job.status is Status.CANCELLED:
                return job
            if Status.CANCELLED not in rows.MOVES[job.status]:
                raise JobEnded(f"job {job_id} has {job.status} already", field="id", given=job.status)
            cancelled = self._end(connection, job, Status.CANCELLED)
        self.remove_data(job)
        return cancelled

    def claim(self) -> Job | None:
        """Take the oldest job that waits or whose lease has run out; None where there is none.

        A job whose trainer died on the last of its attempts is ended here, as `worker_died`.
        """
        while True:
            with self._database.read() as connection:
                if self._claimable(connection) is None:
                    return None
            with self._database.write() as connection:
                job = self._claimable(connection)
                if job is None:
                    return None
                if job.attempt < MAX_ATTEMPTS:
                    now = self._now()
                    return rows.move(
                        connection,
                        job,
                        Status.RUNNING,
                        attempt=job.attempt + 1,
                        fence=job.fence + 1,
                        lease_until=now + self._lease_seconds,
                        started_at=job.started_at or rfc3339(now),
                        # An attempt before this one is forgotten: the fit begins again.
                        progress={**(job.progress or {}), "step": 0, "loss": None},
                        history=[],
                    )
                died = WorkerDied(f"the process that trained died on {MAX_ATTEMPTS} attempts")
                self._end(connection, job, Status.FAILED, error=died.members())
            self.remove_data(job)

    def check_ours(self, claim: Job) -> None:
        """Raises `ClaimLost` where the job was cancelled, or claimed again by another trainer."""
        with self._database.read() as connection:
            rows.check_holds(connection, claim)

    def heartbeat(self, claim: Job, *, progress: Mapping[str, Any] | None, history: Sequence[Any]) -> None:
        """Renew the lease and store the progress; raises `ClaimLost`."""
        with self._database.write() as connection:
            rows.check_holds(connection, claim)
            rows.update(
                connection,
                claim,
                lease_until=self._now() + self._lease_seconds,
                progress=progress,
                history=list(history),
            )

    def hand_back(self, claim: Job) -> None:
        """Let another trainer have the job at once, this claim not counted. Raises `ClaimLost`."""
        with self._database.write() as connection:
            rows.check_holds(connection, claim)
            rows.move(connection, claim, Status.QUEUED, attempt=claim.attempt - 1, lease_until=None)

    def abandon(self, claim: Job) -> None:
        """Let any trainer have the job at once, this claim counted: its fit died. Raises `ClaimLost`."""
        with self._database.write() as connection:
            rows.check_holds(connection, claim)
            rows.update(connection, claim, lease_until=self._now())

    def fail(self, claim: Job, error: Mapping[str, Any], **reached: Any) -> None:
        """End the job with an error, and with the `progress` and `history` that it reached, where they are given.

        Raises `ClaimLost`.
        """
        with self._database.write() as connection:
            rows.check_holds(connection, claim)
            self._end(connection, claim, Status.FAILED, error=dict(error), **reached)
        self.remove_data(claim)

    def succeed(
        self,
        connection: Connection,
        claim: Job,
        version: Version,
        *,
        progress: Mapping[str, Any],
        metrics: Mapping[str, Any],
        history: Sequence[Any],
    ) -> None:
        """End the job within the transaction that publishes its version. Raises `ClaimLost` or `AdapterDeleted`,
        and then nothing is published."""
        rows.check_holds(connection, claim)
        if catalog_rows.deletions(connection, claim.adapter) != claim.deletions:
            raise AdapterDeleted(f"the adapter {claim.adapter!r} was deleted after this job was queued")
        result = {"name": version.adapter, "version": version.version, "digest": version.digest}
        self._end(
            connection,
            claim,
            Status.SUCCEEDED,
            result=result,
            progress=dict(progress),
            metrics=dict(metrics),
            history=list(history),
        )

    def remove_data(self, job: Job) -> None:
        """Remove the data of a job that has ended."""
        if job.data_file is not None:
            self._blobs.remove([job.data_file])

    def _claimable(self, connection: Connection) -> Job | None:
        expired = (_columns.status == Status.RUNNING) & (_columns.lease_until <= self._now())
        statement = (
            sa.select(tables.jobs)
            .where((_columns.status == Status.QUEUED) | expired)
            .order_by(_columns.sequence)
            .limit(1)
        )
        row = connection.execute(statement).one_or_none()
        return None if row is None else rows.as_job(row)

    def _end(self, connection: Connection, job: Job, status: Status, **values: Any) -> Job:
        finished_at = rfc3339(self._now())
        return rows.move(connection, job, status, finished_at=finished_at, lease_until=None, data_file=None, **values)
