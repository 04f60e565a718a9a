"""Uploads: adapters in three forms, and data sets, which are written to a file and read by a child process."""

import asyncio
from collections.abc import Mapping
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
from app.http.preconditions import Precondition
from app.http.schemas.adapters import FactorsUpload, PeftUpload
from app.service import Service
from app.serving.request import count_lists

MULTIPART, ZIP = "multipart/form-data", "application/zip"
_FILES = (TENSOR_FILE, CONFIG_FILE)
_IGNORED_FILE = "README.md"
_MAX_FORM_PARTS = 8
# Longest JSON of a label: a character outside the basic plane is written in twelve bytes.
_LABEL_BYTES = 16 * MAX_LABEL_CHARACTERS
# Lists are counted only in larger bodies, because smaller ones are parsed quickly.
_UNCOUNTED_BYTES = 2**19
_WRITE_BYTES = 2**20


async def read_adapter(request: Request, service: Service) -> tuple[Adapter, str | None]:
    """Return the adapter in a request's body, and the path of its module if the body names one."""
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
    body = await read_bytes(request, max_bytes=_max_json_bytes(base, max_rank), hint=hint)
    await asyncio.to_thread(_check_list_count, body, base, max_rank)
    value = object_of_body(await service.json.parse(body))
    del body
    async with service.uploads:
        return await run_in_threadpool(_from_json, value, service), None


async def read_dataset(
    name: str, request: Request, service: Service, precondition: Precondition | None
) -> tuple[DatasetVersion, bool]:
    """Read the body into a version of `name`; return it and whether it is new.

    Raises `UnsupportedMediaType`, the errors of the reader, and `ClientDisconnect`, which leaves nothing behind.
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
        adding = asyncio.create_task(_add_dataset(name, reading, kind, service, precondition))
        disconnect = asyncio.create_task(_wait_for_disconnect(request))
        try:
            await asyncio.wait((adding, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not adding.done():
                raise ClientDisconnect
            return adding.result()
        finally:
            disconnect.cancel()
            adding.cancel()
            # The file must stay open until the reader has ended.
            await asyncio.wait((adding,))


def _max_json_bytes(base: BaseLayer, max_rank: int) -> int:
    """Return the longest JSON of an adapter: numbers of bounded length, and labels."""
    outputs = base.out_features
    numbers = max_rank * (base.in_features + outputs) + outputs
    return LEAST_LIMIT_BYTES + numbers * NUMBER_BYTES + outputs * _LABEL_BYTES


def _check_list_count(body: bytearray, base: BaseLayer, max_rank: int) -> None:
    """Raise `WrongShape` if the body has more opening brackets than its lists and labels can have.

    The limit allows factors that are transposed, because `check_factors` has a better error for them.
    """
    if len(body) <= _UNCOUNTED_BYTES:
        return
    max_rows = 2 * (base.in_features + base.out_features + max_rank)
    lists = count_lists(body)
    if lists > max_rows + (base.out_features + 1) * MAX_LABEL_CHARACTERS:
        raise WrongShape(
            f"the body has {lists} lists; the factors of an adapter of this layer have at most {max_rows // 2} rows",
            field="body",
            given=f"{lists} lists",
            expected=f"at most {max_rows // 2} rows",
        )


async def _read_multipart(request: Request) -> dict[str, bytes]:
    try:
        form = await request.form(max_files=_MAX_FORM_PARTS, max_fields=_MAX_FORM_PARTS)
    except (HTTPException, ValueError) as error:  # ValueError: the parser does not support the charset
        reason = error.detail if isinstance(error, HTTPException) else error
        raise InvalidUpload(f"the multipart body cannot be read: {reason}", field="body") from None
    try:
        files: dict[str, bytes] = {}
        for field, part in form.multi_items():
            if isinstance(part, UploadFile) and part.filename == _IGNORED_FILE:
                continue
            name = _check_part(field[:80], part, files)
            assert isinstance(part, UploadFile)
            files[name] = await part.read()
    finally:
        await form.close()
    for name in _FILES:
        if name not in files:
            raise InvalidUpload(f"the file {name} is missing", field=name, expected=" and ".join(_FILES))
    return files


def _check_part(field: str, part: UploadFile | str, files: Mapping[str, bytes]) -> str:
    """Return the file name of a part; raise `InvalidUpload` if it is not one of the two files, or too large."""
    expected = " and ".join(_FILES)
    if not isinstance(part, UploadFile):
        raise InvalidUpload(f"the part {field!r} is not a file", field=field, expected=expected)
    name = part.filename or ""
    if name not in _FILES or name in files:
        reason = "is there twice" if name in files else "is not one that is taken"
        raise InvalidUpload(f"the file {name[:80]!r} {reason}", field=field, given=name, expected=expected)
    if name == CONFIG_FILE and (part.size or 0) > MAX_CONFIG_BYTES:
        size = f"{part.size} bytes"
        raise InvalidUpload(
            f"{CONFIG_FILE} has {size}", field=CONFIG_FILE, given=size, expected=f"at most {MAX_CONFIG_BYTES} bytes"
        )
    return name


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
    own_names = sorted(value.keys() & {"A", "B", "alpha", "bias"})
    peft_names = sorted(value.keys() & {"lora_A", "lora_B", "lora_alpha"})
    if own_names and peft_names:
        raise UnknownField(
            f"{peft_names[0]} does not go with {own_names[0]}: send A and B, or PEFT's lora_A and lora_B",
            field=peft_names[0],
            given=peft_names[0],
            expected="one set of names",
        )
    upload: FactorsUpload | PeftUpload
    if peft_names:
        upload = peft = read_as(PeftUpload, value)
        a, b, alpha, bias = peft.lora_B, peft.lora_A, peft.lora_alpha, None
        names = ("lora_B", "lora_A", "bias")
    else:
        upload = own = read_as(FactorsUpload, value)
        a, b, alpha, bias = own.A, own.B, own.alpha, own.bias
        names = ("A", "B", "bias")
    a_OR, b_RI = torch.from_numpy(matrix(a, field=names[0])), torch.from_numpy(matrix(b, field=names[1]))
    outputs = service.base.out_features
    bias_O = None if bias is None else torch.from_numpy(vector(bias, field="bias", length=outputs))
    check_factors(a_OR, b_RI, bias_O, service.base, max_rank=service.settings.max_rank, names=names)
    checked_alpha = check_alpha(b_RI.shape[0] if alpha is None else alpha)
    labels = check_labels(upload.labels, field="labels", outputs=outputs) if upload.gave("labels") else None
    return Adapter(a_OR, b_RI, bias_O, checked_alpha, feature_space=service.settings.feature_space, labels=labels)


async def _add_dataset(
    name: str, reading: Ingestion, kind: str, service: Service, precondition: Precondition | None
) -> tuple[DatasetVersion, bool]:
    async with service.writes.turn(service.readings):
        add = partial(service.datasets.add, name, reading, content_type=kind, precondition=precondition)
        thread = asyncio.create_task(service.writes.run(add))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            # A thread cannot be cancelled, but it ends when its child process does.
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
        if size >= _WRITE_BYTES:
            await run_in_threadpool(_write, raw, b"".join(parts))
            parts, size = [], 0
    await run_in_threadpool(_write, raw, b"".join(parts))


def _write(raw: IO[bytes], content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[raw.write(view) :]


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
