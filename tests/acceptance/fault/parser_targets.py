"""Every parser of bytes that a client sends or that a disk returns, with an input that it accepts.

A target returns if it has read the bytes, or raises an error of ours. Anything else that it raises is a defect. Where
there are two readers of one format, they have to agree.
"""

# N rows · I in_features · O out_features
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from starlette.requests import Request

from adapters.access.keys import parse_key_id
from adapters.datasets.ingest import Format, convert
from adapters.errors import LoraplexError
from adapters.large_json.parser import read_large
from adapters.lora.adapter import Adapter, from_canonical_bytes
from adapters.lora.base_layer import load_base_layer
from adapters.names import parse_reference
from adapters.peft.archive import unpack
from adapters.peft.config import read_config
from adapters.peft.weights import read_peft, write_peft
from adapters.strict_json import parse
from adapters.training.gradient.checkpoint import load_checkpoint, save_checkpoint
from app.http.paging import make_cursor, read_cursor
from app.http.preconditions import precondition
from app.http.schemas.trainings import evaluation_request, training_request, update_request
from app.serving.oip.request import read_exactly, read_infer_fast
from app.serving.oip.routes import parse_length
from app.serving.request import InferenceRequest, read_fast, request_from_json

BASE = load_base_layer("random:3,2,42")
_MAX_ROWS, _MAX_BYTES = 8, 2**20
_ADAPTER = Adapter(torch.ones(2, 1), torch.ones(1, 3), None, 1.0)
_PEFT = write_peft(_ADAPTER, module="model.layer", base_fingerprint=BASE.fingerprint)
_CONFIG, _TENSORS = _PEFT["adapter_config.json"], _PEFT["adapter_model.safetensors"]
_FILE = Path(tempfile.gettempdir()) / f"fuzz-{os.getpid()}"


class Target(NamedTuple):
    """A parser, and what it reads."""

    parse: Callable[[bytes], object]
    examples: tuple[bytes, ...]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _large(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    read_large(text, columns={"inputs": 3}, longest=100)


def _predict(data: bytes) -> None:
    quick = read_fast(data, BASE, max_rows=_MAX_ROWS) if data else None
    try:
        exact: InferenceRequest | None = request_from_json(parse(data), BASE, max_rows=_MAX_ROWS)
    except LoraplexError:
        exact = None
    if quick is not None:
        assert exact is not None, "the fast reader accepts what the exact one refuses"
        assert (quick.references, quick.by_row) == (exact.references, exact.by_row)
        np.testing.assert_array_equal(quick.inputs_NI, exact.inputs_NI)


def _infer(data: bytes) -> None:
    quick = read_infer_fast(data, 3, _MAX_ROWS)
    try:
        exact = read_exactly(data, None, 3, _MAX_ROWS)
    except LoraplexError:
        exact = None
    if quick is not None:
        assert exact is not None, "the fast reader accepts what the exact one refuses"
        np.testing.assert_array_equal(quick[1], exact[1])


def _infer_binary(data: bytes) -> None:
    length = int.from_bytes(data[:2], "little")
    read_exactly(data[2:], length, 3, _MAX_ROWS)


def _convert(kind: Format) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        _FILE.write_bytes(data)
        return convert(str(_FILE), kind, _FILE.with_suffix(".out"), max_bytes=_MAX_BYTES)

    return read


def _checkpoint(data: bytes) -> None:
    _FILE.write_bytes(data)
    load_checkpoint(_FILE, of="x")


def _checkpoint_example() -> bytes:
    save_checkpoint(_FILE, {"a": torch.ones(2)}, {"step": 1}, of="x")
    return _FILE.read_bytes()


def _conditions(data: bytes) -> None:
    text = data.replace(b"\n", b" ")
    check = precondition(Request({"type": "http", "headers": [(b"if-match", text), (b"if-none-match", text)]}))
    assert check is not None
    check(True, "sha256:0")


def _json_target(read: Callable[[object], object], example: object) -> Target:
    return Target(lambda data: read(parse(data)), (json.dumps(example).encode(),))


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = BytesIO()
    np.savez(buffer, x=np.arange(4.0), y=np.arange(8, dtype=np.int64).reshape(4, 2))
    return buffer.getvalue()


_ROWS = {"inputs": [[1, 2.5, -3e-2]] * 2}
_DATA = {**_ROWS, "targets": [[0.5, 1]] * 2}
_TENSOR = {"name": "inputs", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4.5, 5, 6]}
_INFER = {"id": "a", "inputs": [_TENSOR]}
_SIZED = json.dumps(
    {"inputs": [{k: v for k, v in _TENSOR.items() if k != "data"} | {"parameters": {"binary_data_size": 24}}]}
).encode()
TARGETS: Mapping[str, Target] = {
    "canonical adapter": Target(from_canonical_bytes, (_ADAPTER.canonical_bytes,)),
    "checkpoint": Target(_checkpoint, (_checkpoint_example(), save({"a": torch.ones(1)}))),
    "conditions": Target(_conditions, (b'"sha256:0", "x"', b"*")),
    "csv": Target(_convert(Format.CSV), (b"x,y\n1,a\n2.5,\n", b'"x","y"\r\n"1","a""b"\r\n')),
    "cursor": Target(lambda data: read_cursor("k", data.decode("latin-1"), str), (make_cursor("k", "acme").encode(),)),
    "evaluation": _json_target(evaluation_request, {"adapters": ["a", None], "data": _DATA}),
    "header length": Target(parse_length, (b"12",)),
    "infer, JSON": Target(_infer, (json.dumps(_INFER).encode(),)),
    "infer, binary": Target(_infer_binary, (len(_SIZED).to_bytes(2, "little") + _SIZED + bytes(24),)),
    "JSON": Target(parse, (json.dumps(_DATA).encode(), b'{"a":[1e400,NaN,"\\ud800",null]}')),
    "JSON lines": Target(_convert(Format.JSON_LINES), (b'{"x":1,"y":"a"}\n{"x":2.5}\n',)),
    "key": Target(lambda data: parse_key_id(data.decode("latin-1")), (b"lpx_abcdefgh_" + b"A" * 49,)),
    "large JSON": Target(_large, (json.dumps(_ROWS).encode(),)),
    "npz": Target(_convert(Format.NPZ), (_npz(),)),
    "PEFT archive": Target(lambda data: unpack(data, max_bytes=_MAX_BYTES), (_zip(_PEFT),)),
    "PEFT config": Target(read_config, (_CONFIG,)),
    "PEFT tensors": Target(
        lambda data: read_peft(_CONFIG, data, base=BASE, feature_space=None, max_rank=8), (_TENSORS,)
    ),
    "predict": Target(
        _predict,
        (json.dumps({"adapter": "acme@1", **_ROWS}).encode(), json.dumps({"adapters": [None, "a"], **_ROWS}).encode()),
    ),
    "reference": Target(lambda data: parse_reference(_text(data)), (b"acme@12", b"a.b_c@live")),
    "training": _json_target(
        training_request, {"name": "a", "rank": 1, "data": _DATA, "training": {"method": "adamw", "epochs": 2}}
    ),
    "update": _json_target(update_request, {"add": _DATA, "remove": _DATA}),
}


def run(target: Target, data: bytes) -> None:
    """Give a parser some bytes; raise what it must not raise."""
    with suppress(LoraplexError):
        target.parse(data)
