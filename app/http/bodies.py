"""Request bodies: their content type, their bytes in memory and their JSON.

The middleware refuses a body that is too large.
"""

import asyncio
import ctypes
from contextlib import nullcontext
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from adapters.errors import RequestTimeout, WrongType
from adapters.large_json.reader import read_in_process
from adapters.lora.base_layer import BaseLayer
from adapters.strict_json import parse
from app.http.errors import TooManyBytes, UnsupportedMediaType, drop_unknown_fields, from_validation, too_large

JSON = "application/json"
# Model, in the endpoint table, of a body that is not JSON.
BINARY = bytes
# Largest JSON of a number, with its comma and the white space around it, in bytes.
NUMBER_BYTES = 64
# Bytes that a JSON body may have besides its numbers and labels.
LEAST_LIMIT_BYTES = 2**21
# Freed memory is returned to the system after a body of this size or more.
LARGE_BYTES = 2**20
_SECONDS_BETWEEN_TRIMS = 1.0
_UNQUEUED_JSON_BYTES = 2**14
# A thread parses this much in about 50 ms, and holds the interpreter lock meanwhile.
_THREAD_JSON_BYTES = 2**19
_LONGEST_LIST = 10_000
# Longest wait of a large body for the reader process, because reading another body may take minutes.
_MAX_WAIT_SECONDS = 30.0
Model = TypeVar("Model", bound=BaseModel)


def content_type(header: str, *accepted: str) -> str:
    """Return the type in a header, without parameters; raise `UnsupportedMediaType` if it is not in `accepted`."""
    media_type = header.partition(";")[0].strip().lower()
    if media_type not in accepted:
        expected = ", ".join(accepted)
        detail = f"the content type is {media_type or 'missing'}; this call takes {expected}"
        raise UnsupportedMediaType(detail, field="Content-Type", given=media_type, expected=expected)
    return media_type


async def read_bytes(request: Request, *, max_bytes: int | None = None, hint: str = "") -> bytearray:
    """Return a whole body, which the middleware bounds; raise `BodyTooLarge` with the hint past a smaller limit."""
    if max_bytes is not None and int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_large(max_bytes, hint=hint)
    # The buffer grows in place, because joining parts would hold them twice.
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if max_bytes is not None and len(body) > max_bytes:
                raise too_large(max_bytes, hint=hint)
    except Exception:
        # The error refers to this frame until it is answered.
        body.clear()
        raise
    return body


async def read_json_bytes(request: Request) -> bytearray:
    """Return a whole body of JSON; raise `UnsupportedMediaType`."""
    content_type(request.headers.get("content-type", ""), JSON)
    return await read_bytes(request)


def parse_object(body: bytes | bytearray) -> dict[str, object]:
    """Parse a small JSON object; raise `NotJson`, `DuplicateKey` or `WrongType`."""
    return object_of_body(parse(body))


def object_of_body(value: object) -> dict[str, object]:
    """Return the parsed body if it is an object; raise `WrongType`."""
    if not isinstance(value, dict):
        raise WrongType("the body must be a JSON object", field="body", given=value, expected="an object")
    return value


def read_as(model: type[Model], value: dict[str, object], *, within: str = "") -> Model:
    """Validate an object without coercion; raise `InvalidInput` for its first error.

    `within` is the field that holds the object, if it is not the whole body.
    """
    try:
        return model.model_validate(drop_unknown_fields(value, model))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise from_validation(first, within=within, model=model) from None


class BodyMemory:
    """Count of the body bytes in memory, from their arrival to the end of their request.

    Bodies that one tenant sends slowly can use up the limit, but not the room of others: each tenant may have an equal
    share of it at any time. All together therefore hold at most twice the limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        # Bytes of each tenant that has any; None for requests without a caller.
        self._tenants: dict[str | None, int] = {}
        self._is_trim_due = False

    def has_room(self, size: int, tenant: str | None) -> bool:
        """Return whether a tenant may hold this number of further bytes."""
        if self.held + size <= self.limit:
            return True
        tenants = len(self._tenants.keys() | {tenant})
        return tenants > 1 and (self._tenants.get(tenant, 0) + size) * tenants <= self.limit

    def take(self, size: int, tenant: str | None) -> None:
        """Count bytes that have arrived; raise `TooManyBytes`, and count nothing, if there is no room."""
        if not self.has_room(size, tenant):
            raise self.full()
        if size:
            self.held += size
            self._tenants[tenant] = self._tenants.get(tenant, 0) + size

    def release(self, size: int, tenant: str | None) -> None:
        """Count bytes down at the end of their request."""
        self.held -= size
        self._tenants[tenant] -= size
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        # One trim serves all requests that end within the interval.
        if size >= LARGE_BYTES and not self._is_trim_due:
            self._is_trim_due = True
            asyncio.get_running_loop().call_later(_SECONDS_BETWEEN_TRIMS, self._trim)

    def full(self) -> TooManyBytes:
        """Return the error for a body that has no room."""
        limit, setting = f"at most {self.limit} bytes", "LORAPLEX_MAX_INFLIGHT_BODY_BYTES"
        detail = f"{limit} of request bodies may be in memory ({setting}): try again in a moment"
        return TooManyBytes(detail, expected=f"{limit} in flight")

    def _trim(self) -> None:
        self._is_trim_due = False
        # On a thread, because it takes milliseconds, in which the interpreter lock is free.
        asyncio.get_running_loop().run_in_executor(None, trim_heap)


def trim_heap() -> None:
    """Return free pages of the C heap to the system, which glibc does not do by itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class JsonBodies:
    """Parser of JSON bodies that keeps the event loop free: small bodies on threads, large ones in a process."""

    def __init__(self, base: BaseLayer) -> None:
        # Of trainings and updates. `inputs` alone is a field of other calls, which check its length first.
        self._columns = {f"{data}.inputs": base.in_features for data in ("data", "add", "forget")}
        self._columns |= {f"{data}.corpus": base.out_features for data in ("data", "add", "forget")}
        self._longest = max(_LONGEST_LIST, base.in_features, base.out_features)
        self._threads = asyncio.Semaphore(1)
        # One process may take `MEMORY_BYTES` of `adapters.large_json.reader`.
        self._processes = asyncio.Semaphore(1)

    async def read(self, request: Request) -> object:
        """Read and parse the body of a request; raise `UnsupportedMediaType` and what `parse` raises."""
        return await self.parse(await read_json_bytes(request))

    async def parse(self, body: bytes | bytearray, *, longest: int = 0, what: str = "the body") -> object:
        """Parse a body; tables of a large one come as `TruncatedList`.

        `longest`: entries of the longest list that a valid body of this call may have, apart from tables of numbers
        and lists of the same length. Raises `NotJson`, `DuplicateKey`, the errors of `read_in_process`, and
        `RequestTimeout` if other large bodies are read for too long.
        """
        if len(body) <= _THREAD_JSON_BYTES:
            async with nullcontext() if len(body) <= _UNQUEUED_JSON_BYTES else self._threads:
                return await asyncio.to_thread(parse, body, what=what)
        longest = max(longest, self._longest)
        try:
            async with asyncio.timeout(_MAX_WAIT_SECONDS):
                await self._processes.acquire()
        except TimeoutError:
            detail = f"{what} waited {_MAX_WAIT_SECONDS:g} s for other large bodies to be read; try again"
            raise RequestTimeout(detail) from None
        try:
            return await asyncio.to_thread(read_in_process, body, longest=longest, columns=self._columns, what=what)
        finally:
            self._processes.release()
