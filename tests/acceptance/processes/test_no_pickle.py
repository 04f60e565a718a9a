"""No upload is unpickled: an audit hook in every process of the service sees what an unpickler looks up."""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.hostile.bodies import CONFIG_FILE, MULTIPART, TENSOR_FILE, ZIP, config, multipart_of, zip_of
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.slow

# Python imports a module of this name at the start of each process.
_HOOK = """
import os, sys

FOLDER = os.path.dirname(__file__)

def record(event, arguments):
    if event == "pickle.find_class":
        descriptor = os.open(os.path.join(FOLDER, "classes"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (repr(arguments[1:]) + chr(10)).encode())
        os.close(descriptor)

sys.addaudithook(record)
open(os.path.join(FOLDER, "process-%d" % os.getpid()), "w").close()
"""


class _Canary:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_HOOK)
    return folder


@pytest.fixture
def payload(tmp_path: Path) -> bytes:
    return pickle.dumps(_Canary(tmp_path / "unpickled"))


def _table(payload: bytes) -> pa.Table:
    """A column whose type older versions of pyarrow unpickled from the metadata of the file (CVE-2023-47248)."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    return pa.table([pa.array([1.0])], schema=pa.schema([pa.field("x", pa.float64(), metadata=metadata)]))


def _uploads(payload: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Yield path, content type and body: the pickle in each form of upload, and in each file inside it."""
    peft = [{CONFIG_FILE: config(), TENSOR_FILE: payload}, {CONFIG_FILE: config(), "adapter_model.bin": payload}]
    for files in peft:
        yield "/adapters/a", ZIP, zip_of(files)
        yield "/adapters/a", MULTIPART, multipart_of(files)
    yield from (("/adapters/a", kind, payload) for kind in ("application/json", "application/octet-stream", ZIP))
    arrays, object_array = io.BytesIO(), io.BytesIO()
    np.savez(arrays, x=np.array([{}], dtype=object))
    np.save(object_array, np.array([None], dtype=object))
    npy = object_array.getvalue()
    header = npy[: 10 + int.from_bytes(npy[8:10], "little")]
    parquet, stream = io.BytesIO(), io.BytesIO()
    table = _table(payload)
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    for kind, body in [
        ("application/x-npz", arrays.getvalue()),
        ("application/x-npz", zip_of({"x.npy": header + payload})),
        ("application/vnd.apache.parquet", parquet.getvalue()),
        ("application/vnd.apache.arrow.stream", stream.getvalue()),
    ]:
        yield "/datasets/d", kind, body
    for kind in ("text/csv", "application/json", "application/x-ndjson", "application/x-npz", "application/x-pickle"):
        yield "/datasets/d", kind, payload


def test_the_hook_sees_an_unpickler(hook: Path, payload: bytes, tmp_path: Path) -> None:
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    variables = os.environ | {"PYTHONPATH": str(hook)}
    subprocess.run([sys.executable, "-P", "-c", program], input=payload, env=variables, check=True)
    assert "'mkdir'" in (hook / "classes").read_text()
    assert (tmp_path / "unpickled").is_dir()


def test_no_upload_is_unpickled_by_any_process(hook: Path, payload: bytes, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"base": "random:10,2,42", "trainers": 1}
    with ServiceProcess(tmp_path / "data", preload={"PYTHONPATH": str(hook)}, **settings) as service:
        (hook / "classes").unlink(missing_ok=True)  # of the imports
        started = len(list(hook.glob("process-*")))
        statuses = set()
        for path, kind, body in _uploads(payload):
            statuses.add(service.client.put(path, content=body, headers={"Content-Type": kind}).status_code)
            answer = service.client.post("/predict", content=body, headers={"Content-Type": kind})
            assert 400 <= answer.status_code < 500, kind
        assert statuses <= {200, 201, 400, 413, 415, 422}
        # The supervisor, a worker and a trainer, and processes that read the data sets.
        assert started >= 3
        assert len(list(hook.glob("process-*"))) > started
    assert not (hook / "classes").exists(), (hook / "classes").read_text()
    assert not (tmp_path / "unpickled").exists()
