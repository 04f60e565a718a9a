"""`POST /v2/models/{name}/infer`: rows and outputs as bytes (the protocol's binary tensor data extension).

https://github.com/kserve/open-inference-protocol
"""

# N rows · I in_features · O out_features
import json
import re
from typing import Any

import numpy as np

from loraplex.arrays import Float32
from loraplex.calls.builders import NAME, path
from loraplex.calls.chunking import Part
from loraplex.effects import Answer, Call, Repeat
from loraplex.errors import BadAnswer
from loraplex.results import AdapterRef

BASE_MODEL = "__base__"
_HEADER_LENGTH = "Inference-Header-Content-Length"
_LIVE = "live"
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_TIMING = re.compile(r"(queue|forward);dur=([0-9]+(?:\.[0-9]+)?)")


def model_path(reference: str | None) -> str | None:
    """Where a reference answers; None for an alias, which the protocol has no name for, and for what is none."""
    if reference is None:
        return f"/v2/models/{BASE_MODEL}/infer"
    name, at, which = reference.partition("@")
    if not NAME.fullmatch(name):
        return None
    if not at or which == _LIVE:
        return path("v2", "models", name, "infer")
    return path("v2", "models", name, "versions", which, "infer") if _VERSION.fullmatch(which) else None


def infer(where: str, x_NI: Float32, *, timeout: float | None) -> Call[Part[Float32]]:
    """Rows → outputs."""
    tensor = x_NI.astype("<f4", copy=False).tobytes()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "inputs",
                    "shape": list(x_NI.shape),
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(tensor)},
                }
            ],
            "parameters": {"binary_data_output": True},
        },
        separators=(",", ":"),
    ).encode()
    return Call(
        method="POST",
        path=where,
        read=_read,
        repeats=Repeat.ALWAYS,
        headers={"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(header))} | waiting(timeout),
        content=header + tensor,
        timeout=timeout,
    )


def waiting(timeout: float | None) -> dict[str, str]:
    """The header that says how long the service may take."""
    return {} if timeout is None else {"X-Request-Timeout": f"{timeout:g}"}


def spent(answer: Answer) -> tuple[float, float]:
    """Milliseconds that a request waited and that were computed for it."""
    found = dict(_TIMING.findall(answer.headers.get("server-timing", "")))
    return float(found.get("queue", 0)), float(found.get("forward", 0))


def _read(answer: Answer) -> Part[Float32]:
    try:
        length = int(answer.headers[_HEADER_LENGTH.lower()])
        header: Any = json.loads(answer.content[:length])
        (output,) = header["outputs"]
        rows, columns = output["shape"]
        outputs_NO = np.frombuffer(answer.content, "<f4", offset=length).reshape(rows, columns)
        name, version = header["model_name"], int(header["model_version"])
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadAnswer(
            f"{answer.url} answered {answer.status} with something else than a tensor: {error!r}",
            status=answer.status,
            request_id=answer.request_id,
            expected="the address of a loraplex service",
        ) from error
    queue_ms, forward_ms = spent(answer)
    which = None if name == BASE_MODEL else AdapterRef(name, version)
    # A copy: what was received is not to be written to, and its owner may want to.
    return Part(outputs_NO.astype(np.float32), (which,), (0,) * len(outputs_NO), queue_ms, forward_ms)
