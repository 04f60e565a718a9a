"""The requests that are sent, as whole HTTP messages, and the answers that must come back."""

# N rows · I in_features · O out_features
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tenants import Factors, factors, name_of

INPUT_ROWS = 1_000
"""Distinct input rows; fewer where they are so wide that the files would grow past `_MOST_BYTES`."""
_MOST_BYTES = 50 * 2**20
_DRAWS = 200_000
HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer's width in and out."""

    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.in_features}×{self.out_features}"


@dataclass(frozen=True, slots=True)
class Mix:
    """Which tenants are asked for: `tenants` of them, all alike, or by Zipf's law with exponent 1. None: the base."""

    tenants: int | None
    zipf: bool = False

    def draws(self, distinct: int) -> Any:
        """Which request comes when, from `distinct` of them."""
        generator = np.random.default_rng(7)
        if not self.zipf:
            return generator.integers(0, distinct, _DRAWS)
        weights = 1.0 / np.arange(1, distinct + 1)
        # Popular tenants anywhere in the order of publication, not the first ones.
        popularity = generator.permutation(distinct)
        return popularity[generator.choice(distinct, _DRAWS, p=weights / weights.sum())]


def input_rows(shape: Shape) -> Any:
    """(N, I) float64: as JSON about 18 characters a number."""
    wide = max(1, min(INPUT_ROWS, _MOST_BYTES // (20 * shape.in_features)))
    return np.random.default_rng(shape.in_features).standard_normal((wide, shape.in_features))


def json_request(row_I: Sequence[float], adapter: str | None) -> bytes:
    """`POST /predict` with one row; peers without adapters get the same bytes and skip the name."""
    body = json.dumps({"adapter": adapter, "inputs": [list(row_I)]}).encode()
    return message("/predict", body, "Content-Type: application/json")


def binary_request(row_I: Any, adapter: str | None) -> bytes:
    """`POST /v2/models/{name}/infer` with one row as a binary tensor, in the Open Inference Protocol's extension."""
    raw = np.asarray(row_I, dtype="<f4").tobytes()
    tensor = {"name": "inputs", "shape": [1, len(row_I)], "datatype": "FP32"}
    header = {
        "inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}],
        "outputs": [{"name": "outputs", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    fields = f"Content-Type: application/octet-stream\r\n{HEADER_LENGTH}: {len(head)}"
    return message(f"/v2/models/{adapter or '__base__'}/infer", head + raw, fields)


def message(path: str, body: bytes, fields: str) -> bytes:
    """Return the bytes of a POST request."""
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def write_requests(folder: Path, shape: Shape, mix: Mix, *, binary: bool, key: str | None = None) -> Path:
    """Write the files that `wrk.lua` and the paced client draw from, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    authorization = b"" if key is None else f"Authorization: Bearer {key}\r\n".encode()
    rows_NI = input_rows(shape)
    form = binary_request if binary else json_request
    distinct = max(len(rows_NI), mix.tenants or 1)
    lengths = []
    with (folder / "requests.bin").open("wb") as file:
        for number in range(distinct):
            adapter = None if mix.tenants is None else name_of(number % mix.tenants)
            line, rest = form(rows_NI[number % len(rows_NI)].tolist(), adapter).split(b"\r\n", 1)
            lengths.append(file.write(line + b"\r\n" + authorization + rest))
    (folder / "lengths.txt").write_text("\n".join(map(str, lengths)) + "\n")
    (folder / "draws.txt").write_text("\n".join(map(str, mix.draws(distinct))) + "\n")
    return folder


def write_health_checks(folder: Path, requests: Path) -> Path:
    """Write the same requests, with their headers and bodies, as `GET /healthz`, and return their folder."""
    folder.mkdir(parents=True)
    shutil.copy(requests / "draws.txt", folder)
    lengths = []
    with (requests / "requests.bin").open("rb") as source, (folder / "requests.bin").open("wb") as file:
        for length in map(int, (requests / "lengths.txt").read_text().split()):
            _, rest = source.read(length).split(b"\r\n", 1)
            lengths.append(file.write(b"GET /healthz HTTP/1.1\r\n" + rest))
    (folder / "lengths.txt").write_text("\n".join(map(str, lengths)) + "\n")
    return folder


def nth_request(folder: Path, number: int) -> bytes:
    """One of the requests in such a folder."""
    with (folder / "lengths.txt").open() as file:
        lengths = [int(next(file)) for _ in range(number + 1)]
    with (folder / "requests.bin").open("rb") as requests:
        requests.seek(sum(lengths[:number]))
        return requests.read(lengths[number])


def expected_answer(weight_OI: Any, row_I: Any, tenant: Factors | None) -> Any:
    """(O,) float64: the base is without a bias here, and every tenant's s is 1."""
    x_I = np.asarray(row_I, dtype=np.float64)
    y_O = weight_OI.astype(np.float64) @ x_I
    if tenant is not None:
        y_O += tenant.a_OR.astype(np.float64) @ (tenant.b_RI.astype(np.float64) @ x_I)
    return y_O


def tenant_of(mix: Mix, number: int, shape: Shape, rank: int) -> Factors | None:
    """Whose answer request `number` is."""
    if mix.tenants is None:
        return None
    return factors(number % mix.tenants, shape.in_features, shape.out_features, rank)
