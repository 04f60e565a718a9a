"""The three forms in which an adapter comes in, all ending in the same factors."""

import torch
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from adapters.adapter import Adapter, check_alpha, check_factors
from adapters.errors import InvalidUpload, UnknownField
from adapters.labels import check_labels
from adapters.matrices import matrix, vector
from adapters.peft_archive import unpack
from adapters.peft_config import CONFIG_FILE
from adapters.peft_format import TENSOR_FILE, read_peft
from app.bodies import JSON, content_type, parse_object, read_as
from app.schemas import FactorsUpload, PeftUpload
from app.service import Service

MULTIPART, ZIP = "multipart/form-data", "application/zip"
_FILES = (TENSOR_FILE, CONFIG_FILE)
_IGNORED = "README.md"


async def read_upload(request: Request, service: Service) -> tuple[Adapter, str | None]:
    """The adapter in a request's body, and the path of its module where the body says one."""
    form = content_type(request.headers.get("content-type", ""), MULTIPART, ZIP, JSON)
    if form == MULTIPART:
        files = await _read_multipart(request)
        return await run_in_threadpool(_from_peft, files, service)
    body = await request.body()
    if form == ZIP:
        return await run_in_threadpool(_from_zip, body, service)
    return await run_in_threadpool(_from_json, body, service), None


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


def _from_json(body: bytes, service: Service) -> Adapter:
    value = parse_object(body)
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
