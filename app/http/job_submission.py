"""Submission of jobs: plans a request and queues its job, once for each idempotency key."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from adapters.access.idempotency import IdempotentRequest, check_key, fingerprint_of
from adapters.errors import InvalidCombination
from adapters.jobs.job import Job
from adapters.jobs.queue import OnSubmit
from adapters.training.planning.planner import Plan, Planner, submit
from app.http.authentication import CallerOf
from app.http.bodies import read_json_bytes
from app.http.schemas.jobs import JobWithHistory
from app.service import ServiceOf

IDEMPOTENCY_KEY, REPLAYED = "Idempotency-Key", "Idempotent-Replayed"


class JobSubmission:
    """A request that queues a job, and its answer."""

    def __init__(self, request: Request, response: Response, service: ServiceOf, caller: CallerOf) -> None:
        self._request = request
        self._response = response
        self._service = service
        self._tenant = caller.tenant
        self.planner = service.planner(caller.tenant)

    async def queue(self, plan: Callable[[Planner], Plan], on_submit: OnSubmit | None = None) -> JobWithHistory:
        """Plan a training and queue its job, on one thread; return the job."""
        service, planner = self._service, self.planner
        limit = service.settings.max_queued_jobs

        def submit_plan() -> Job:
            planned, job_id = plan(planner), service.new_id()
            return submit(planned, service.queue, job_id=job_id, planner=planner, max_queued=limit, on_submit=on_submit)

        async with service.writes.turn(service.plannings):
            return self._answer(await service.writes.run(submit_plan))

    async def queue_once(self, plan: Callable[[Planner, object], Plan]) -> JobWithHistory:
        """Plan the JSON of the body and queue its job, or return the job of an earlier request with the same key.

        Raises `IdempotencyKeyReused` and `IdempotencyInProgress`.
        """
        service, body = self._service, await read_json_bytes(self._request)
        key = self._key()
        if key is None:
            return await self._queue_body(plan, body)
        keys = service.idempotency
        fingerprint = await run_in_threadpool(fingerprint_of, self._request.method, self._request.url.path, body)
        request = IdempotentRequest(self._tenant, key, fingerprint)
        job_id = await run_in_threadpool(keys.find, request)
        if job_id is None:
            with keys.running(request):
                job_id = await service.writes.run(keys.claim, request)
                if job_id is None:
                    try:
                        return await self._queue_body(plan, body, partial(keys.complete, request))
                    except BaseException:
                        await run_in_threadpool(keys.release, request)
                        raise
        job = await run_in_threadpool(service.queue.get, job_id, tenant=self._tenant)
        self._response.headers[REPLAYED] = "true"
        return self._answer(job)

    async def _queue_body(
        self, plan: Callable[[Planner, object], Plan], body: bytearray, on_submit: OnSubmit | None = None
    ) -> JobWithHistory:
        value = await self._service.json.parse(body)
        # The plan needs memory for the rows, and the callers still refer to the body.
        body.clear()
        return await self.queue(lambda planner: plan(planner, value), on_submit)

    def _key(self) -> str | None:
        """Return the request's idempotency key; None if it has none. Raises `InvalidCombination` and `OutOfRange`."""
        values = self._request.headers.getlist(IDEMPOTENCY_KEY)
        if len(values) > 1:
            detail = f"the request has several {IDEMPOTENCY_KEY} headers"
            raise InvalidCombination(detail, field=IDEMPOTENCY_KEY, expected="one of it")
        return check_key(values[0], field=IDEMPOTENCY_KEY) if values else None

    def _answer(self, job: Job) -> JobWithHistory:
        self._response.headers["Location"] = f"/jobs/{job.id}"
        return JobWithHistory.of(job)


# The submission as a parameter of a handler.
SubmissionOf = Annotated[JobSubmission, Depends(JobSubmission)]
