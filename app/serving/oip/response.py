"""Answers of infer requests: the outputs, or their classes (Triton's classification extension).

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

import json

import numpy as np
import orjson

from adapters.arrays import Float32
from adapters.catalog.versions import Version
from adapters.lora.labels import Labels, most_probable
from app.serving.oip.request import BASE_VERSION, DTYPES, OUTPUT, InferHeader
from app.serving.response import check_label_size, select_classes, split_rows

# End of the JSON of an answer whose values follow it as bytes.
_BINARY_DATA = b'%b"parameters":{"binary_data_size":%d}}]}'

# N rows · O out_features · C classes of one adapter · T the largest of them


def write_classes(
    header: InferHeader, model: str, version: Version | None, outputs_NO: Float32, base_labels: Labels | None
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if binary data follows.

    The tensor is BYTES of shape (N, T), each element `value:index[:label]` in UTF-8, the largest outputs first. T is
    the requested number of classes, at most C. Call it in a thread. Raises `OutOfRange` if the answer is too large.
    """
    assert header.classes is not None
    labels, x_NC = select_classes(version, base_labels, outputs_NO)
    suffixes = [f":{index}" if labels is None else f":{index}:{labels[index]}" for index in range(x_NC.shape[1])]
    rows, count = len(x_NC), min(header.classes, x_NC.shape[1])
    parts: list[bytes] = []
    size = 0
    for block in split_rows(*x_NC.shape):
        parts.append(_serialised(_elements(x_NC[block], count, suffixes), binary=header.binary_output))
        size += len(parts[-1])
        check_label_size(size, field="outputs.parameters.classification")
    begin = _begin(header, model, version, "BYTES", (rows, count))
    if header.binary_output:
        text = _BINARY_DATA % (begin, size)
        return b"".join([text, *parts]), len(text)
    return b'%b"data":[%b]}]}' % (begin, b",".join(parts)), None


def _elements(x_NC: Float32, count: int, suffixes: list[str]) -> list[str]:
    """Return the elements of some rows, each value with the fewest digits that identify the float32."""
    order_NT = most_probable(x_NC, count)
    values_NT = np.ascontiguousarray(np.take_along_axis(x_NC, order_NT, axis=1))
    values = orjson.dumps(values_NT.reshape(-1), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
    return [value + suffixes[index] for value, index in zip(values, order_NT.reshape(-1).tolist(), strict=True)]


def _serialised(elements: list[str], *, binary: bool) -> bytes:
    """Return the elements as JSON without the brackets, or in binary each after its length in 4 bytes."""
    if not binary:
        return orjson.dumps(elements)[1:-1]
    encoded = [element.encode() for element in elements]
    return b"".join([part for text in encoded for part in (len(text).to_bytes(4, "little"), text)])


def write_infer_response(
    header: InferHeader, model: str, version: Version | None, outputs_NO: Float32, data: bytes | None
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if binary data follows.

    `data` is the outputs as JSON; None if the client wants binary data.
    """
    begin = _begin(header, model, version, "FP32", outputs_NO.shape)
    if data is not None:
        return b'%b"data":%b}]}' % (begin, data), None
    tensor = outputs_NO.astype(DTYPES["FP32"], copy=False).tobytes()
    text = _BINARY_DATA % (begin, len(tensor))
    return text + tensor, len(text)


def _begin(header: InferHeader, model: str, version: Version | None, datatype: str, shape: tuple[int, ...]) -> bytes:
    """Return the JSON of an answer up to the values of its only tensor."""
    rows, columns = shape
    about = "" if header.id is None else f'"id":{json.dumps(header.id)},'
    return (
        f'{{"model_name":"{model}","model_version":"{BASE_VERSION if version is None else version.version}",{about}'
        f'"outputs":[{{"name":"{OUTPUT}","datatype":"{datatype}","shape":[{rows},{columns}],'
    ).encode()
