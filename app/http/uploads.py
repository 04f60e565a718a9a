"""The three forms in which an adapter comes in, all ending in the same factors."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import IO

import torch
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters.arrays import matrix, vector
from adapters.datasets.ingest import CONTENT_TYPES, Ingestion, upload_file
from adapters.datasets.store import DatasetVersion
from adapters.errors import InvalidUpload, UnknownField, WrongShape
from adapters.lora.adapter import Adapter, check_alpha, check_factors
from adapters.lora.base_layer import BaseLayer
from adapters.lora.labels import MAX_LABEL_CHARACTERS, check_labels
from adapters.peft.archive import unpack
from adapters.peft.config import CONFIG_FILE, MAX_CONFIG_BYTES
from adapters.peft.weights import TENSOR_FILE, read_peft
from app.http.bodies import JSON, LEAST_LIMIT_BYTES, NUMBER_BYTES, content_type, object_of_body, read_as, read_bytes
from app.http.schemas.adapters import FactorsUpload, PeftUpload
from app.service import Service
from app.serving.request import count_lists

MULTIPART, ZIP = "multipart/form-data", "application/zip"
_FILES = (TENSOR_FILE, CONFIG_FILE)
_IGNORED = "README.md"
_LABEL_BYTES = 16 * MAX_LABEL_CHARACTERS
"""Most bytes of a label in JSON: a character outside the basic plane is written in twelve."""
_COUNTED_BYTES = 2**19
"""Smaller bodies are read at once, and need not be counted."""


async def read_upload(request: Request, service: Service) -> tuple[Adapter, str | None]:
    """The adapter in a request's body, and the path of its module where the body says one."""
    form = content_type(request.headers.get("content-type", ""), MULTIPART, ZIP, JSON)
    if form == MULTIPART:
        files = await _read_multipart(request)
        async with service.uploads:
            return await run_in_threadpool(_from_peft, files, service)
    if form == ZIP:
        body = await read_bytes(request)
        async with service.uploads:
            return await run_in_threadpool(_from_zip, bytes(body), service)
    base, max_rank = service.base, service.settings.max_rank
    hint = f": an adapter of rank {max_rank}, the largest accepted here, needs fewer"
    body = await read_bytes(request, max_bytes=_most_json_bytes(base, max_rank), hint=hint)
    await asyncio.to_thread(_check_lists, body, base, max_rank)
    value = object_of_body(await service.json.parse(body))
    del body
    async with service.uploads:
        return await run_in_threadpool(_from_json, value, service), None


def _most_json_bytes(base: BaseLayer, max_rank: int) -> int:
    """Return how long the JSON of an adapter can be: numbers of bounded length, and labels."""
    outputs = base.out_features
    numbers = max_rank * (base.in_features + outputs) + outputs
    return LEAST_LIMIT_BYTES + numbers * NUMBER_BYTES + outputs * _LABEL_BYTES


def _check_lists(body: bytearray, base: BaseLayer, max_rank: int) -> None:
    """Raise `WrongShape` if the body has more opening brackets than its lists and labels can have.

    Factors with the sides exchanged pass: their own check says so.
    """
    if len(body) <= _COUNTED_BYTES:
        return
    rows = 2 * (base.in_features + base.out_features + max_rank)
    most = rows + base.out_features * MAX_LABEL_CHARACTERS + MAX_LABEL_CHARACTERS
    lists = count_lists(body)
    if lists > most:
        raise WrongShape(
            f"the body has {lists} lists; the factors of an adapter of this layer have at most {rows // 2} rows",
            field="body",
            given=f"{lists} lists",
            expected=f"at most {rows // 2} rows",
        )


async def _read_multipart(request: Request) -> dict[str, bytes]:
    try:
        form = await request.form(max_files=8, max_fields=8)
    except (HTTPException, ValueError) as error:  # ValueError: a charset that the parser looks up and cannot use
        why = error.detail if isinstance(error, HTTPException) else error
        raise InvalidUpload(f"the multipart body cannot be read: {why}", field="body") from None
    try:
        files: dict[str, bytes] = {}
        for field, part in form.multi_items():
            if not isinstance(part, UploadFile):
                raise InvalidUpload(
                    f"the part {field[:80]!r} is not a file", field=field[:80], expected=" and ".join(_FILES)
                )
            name = part.filename or ""
            if name == _IGNORED:
                continue
            if name not in _FILES or name in files:
                twice = "is there twice" if name in files else "is not one that is taken"
                raise InvalidUpload(
                    f"the file {name[:80]!r} {twice}",
                    field=field[:80],
                    given=name,
                    expected=" and ".join(_FILES),
                )
            if name == CONFIG_FILE and (part.size or 0) > MAX_CONFIG_BYTES:
                raise InvalidUpload(
                    f"{CONFIG_FILE} has {part.size} bytes",
                    field=CONFIG_FILE,
                    given=f"{part.size} bytes",
                    expected=f"at most {MAX_CONFIG_BYTES} bytes",
                )
            files[name] = await part.read()
    finally:
        await form.close()
    for name in _FILES:
        if name not in files:
            raise InvalidUpload(f"the file {name} is missing", field=name, expected=" and ".join(_FILES))
    return files


def _from_zip(body: bytes, service: Service) -> tuple[Adapter, str]:
    return _from_peft(unpack(body, max_bytes=service.settings.max_body_bytes), service)


def _from_peft(files: dict[str, bytes], service: Service) -> tuple[Adapter, str]:
    return read_peft(
        files[CONFIG_FILE],
        files[TENSOR_FILE],
        base=service.base,
        feature_space=service.settings.feature_space,
        max_rank=service.settings.max_rank,
    )


def _from_json(value: dict[str, object], service: Service) -> Adapter:
    ours, theirs = (
        sorted(value.keys() & {"A", "B", "alpha", "bias"}),
        sorted(value.keys() & {"lora_A", "lora_B", "lora_alpha"}),
    )
    if ours and theirs:
        raise UnknownField(
            f"{theirs[0]} does not go with {ours[0]}: send A and B, or PEFT's lora_A and lora_B",
            field=theirs[0],
            given=theirs[0],
            expected="one set of names",
        )
    upload: FactorsUpload | PeftUpload
    if theirs:
        upload = peft = read_as(PeftUpload, value)
        left, right, alpha, bias = peft.lora_B, peft.lora_A, peft.lora_alpha, None
        names = ("lora_B", "lora_A", "bias")
    else:
        upload = own = read_as(FactorsUpload, value)
        left, right, alpha, bias = own.A, own.B, own.alpha, own.bias
        names = ("A", "B", "bias")
    a_OR, b_RI = (
        torch.from_numpy(matrix(given, field=name)) for given, name in zip((left, right), names, strict=False)
    )
    outputs = service.base.out_features
    bias_O = None if bias is None else torch.from_numpy(vector(bias, field="bias", length=outputs))
    check_factors(a_OR, b_RI, bias_O, service.base, max_rank=service.settings.max_rank, names=names)
    scale = check_alpha(b_RI.shape[0] if alpha is None else alpha)
    labels = check_labels(upload.labels, field="labels", outputs=outputs) if upload.gave("labels") else None
    return Adapter(a_OR, b_RI, bias_O, scale, feature_space=service.settings.feature_space, labels=labels)


_BYTES_AT_ONCE = 2**20


async def receive_dataset(
    name: str, request: Request, service: Service, precondition: Callable[[bool, str | None], None] | None
) -> tuple[DatasetVersion, bool]:
    """Read the body into a version of `name`; returns it and whether it is new.

    Raises `UnsupportedMediaType`, what the reading raises, and `ClientDisconnect`, which leaves nothing behind.
    """
    kind = content_type(request.headers.get("content-type", ""), *CONTENT_TYPES)
    with upload_file(service.settings.data_dir / "tmp") as raw:
        await _receive(request, raw)
        reading = Ingestion(
            raw,
            CONTENT_TYPES[kind],
            memory_bytes=service.settings.trainer_memory_bytes,
            max_bytes=service.settings.max_dataset_bytes,
        )
        adding = asyncio.create_task(_add(name, reading, kind, service, precondition))
        leaving = asyncio.create_task(_until_client_leaves(request))
        try:
            await asyncio.wait((adding, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not adding.done():
                raise ClientDisconnect
            return adding.result()
        finally:
            leaving.cancel()
            adding.cancel()
            # The file stays open until nobody reads it any more.
            await asyncio.wait((adding,))


async def _add(
    name: str,
    reading: Ingestion,
    kind: str,
    service: Service,
    precondition: Callable[[bool, str | None], None] | None,
) -> tuple[DatasetVersion, bool]:
    async with service.writes.turn(service.readings):
        add = partial(service.datasets.add, name, reading, content_type=kind, precondition=precondition)
        thread = asyncio.create_task(service.writes.run(add))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: without its child it ends by itself.
            await asyncio.to_thread(reading.cancel)
            await asyncio.wait((thread,))
            thread.exception()
            raise


async def _receive(request: Request, raw: IO[bytes]) -> None:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size >= _BYTES_AT_ONCE:
            await run_in_threadpool(_write, raw, b"".join(parts))
            parts, size = [], 0
    await run_in_threadpool(_write, raw, b"".join(parts))


def _write(raw: IO[bytes], content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[raw.write(view) :]


async def _until_client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
