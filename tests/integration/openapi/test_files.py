"""Bodies that are no text: uploads and downloads, answered as the document says."""

import io
import zipfile

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.openapi.document_schemas import DOCUMENT, OPERATIONS, Operation, holds
from tests.integration.openapi.example_calls import World

BY_ID = {operation.id: operation for operation in OPERATIONS}
TABLE = pa.table({"length": [5.1, 6.3], "class": ["a", "b"]})


def _schema(operation: Operation, answer: httpx.Response) -> None:
    said = operation.said["responses"][str(answer.status_code)]
    holds(answer.json(), said["content"]["application/json"]["schema"])


def test_what_was_downloaded_can_be_uploaded_in_both_forms(world: World) -> None:
    download = world.client.get("/adapters/acme/download?version=1")
    said = BY_ID["download_adapter"].said["responses"]["200"]
    assert download.headers["Content-Type"] in said["content"]
    assert "Content-Disposition" in download.headers
    upload = BY_ID["upload_adapter"]
    zipped = {"Content-Type": "application/zip"}
    assert set(upload.said["requestBody"]["content"]) == {"application/json", "multipart/form-data", "application/zip"}
    first = world.client.put("/adapters/copy", content=download.content, headers=zipped)
    with zipfile.ZipFile(io.BytesIO(download.content)) as archive:
        names = ("adapter_model.safetensors", "adapter_config.json")
        parts = {name.partition(".")[0]: (name, archive.read(name)) for name in names}
    again = world.client.put("/adapters/copy", files=parts)
    assert (first.status_code, again.status_code) == (201, 200)
    assert set(parts) == set(DOCUMENT["components"]["schemas"]["PeftFiles"]["properties"])
    for answer in (first, again):
        _schema(upload, answer)
        assert answer.headers["ETag"] == f'"{answer.json()["digest"]}"'


def _parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(TABLE, out)
    return out.getvalue()


def _arrow() -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_stream(out, TABLE.schema) as stream:
        stream.write_table(TABLE)
    return out.getvalue()


def _npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, length=np.array([5.1, 6.3]), kind=np.array([0, 1]))
    return out.getvalue()


BINARY = {
    "application/vnd.apache.parquet": _parquet,
    "application/x-parquet": _parquet,
    "application/vnd.apache.arrow.stream": _arrow,
    "application/x-npz": _npz,
    "application/zip": _npz,
}


@pytest.mark.parametrize("kind", BINARY)
def test_a_binary_file_of_each_type_is_taken(world: World, kind: str) -> None:
    answer = world.client.put("/datasets/binary", content=BINARY[kind](), headers={"Content-Type": kind})
    _schema(BY_ID["upload_dataset"], answer)


def test_every_type_of_a_data_set_has_an_example_or_a_file_here() -> None:
    content = BY_ID["upload_dataset"].said["requestBody"]["content"]
    assert set(content) == set(BINARY) | {kind for kind, said in content.items() if said.get("examples")}


def test_an_infer_request_with_bytes_is_answered_with_bytes(world: World) -> None:
    operation = BY_ID["infer"]
    text = (
        b'{"inputs":[{"name":"inputs","shape":[1,64],"datatype":"FP32","parameters":{"binary_data_size":256}}],'
        b'"outputs":[{"name":"outputs","parameters":{"binary_data":true}}]}'
    )
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
    body = text + np.zeros(64, np.float32).tobytes()
    answer = world.client.post("/v2/models/acme/infer", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert headers["Content-Type"] in operation.said["requestBody"]["content"]
    said = operation.said["responses"]["200"]
    assert answer.headers["Content-Type"] in said["content"]
    assert set(said["headers"]) <= {name for name in said["headers"] if name in answer.headers}
