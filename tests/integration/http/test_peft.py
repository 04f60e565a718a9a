"""PEFT's files in and out: what PEFT answers, this service answers."""

# N rows · I in_features · O out_features
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from app.settings import Settings
from tests.support.dense_oracle import Float64, relative_error
from tests.support.peft_model import FILES, Net, as_parts, as_zip, peft_answer, save_adapter, uses_peft
from tests.support.service import serving

INPUTS, OUTPUTS = 9, 6
GENERATOR = torch.Generator().manual_seed(5)
WEIGHT = torch.randn(OUTPUTS, INPUTS, generator=GENERATOR)
BIAS = torch.randn(OUTPUTS, generator=GENERATOR)
ROWS = torch.randn(8, INPUTS, generator=GENERATOR)
TOLERANCE = 1e-5

pytestmark = [
    uses_peft,
    # PEFT takes the vector that is the bias of lora_bias for a matrix that lost a dimension.
    pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias:Warning"),
    # One kind has patterns for other modules on purpose.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
ZIP = {"Content-Type": "application/zip"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("service")
    save_file({"weight": WEIGHT, "bias": BIAS}, folder / "base.safetensors")
    with serving(Settings(base=str(folder / "base.safetensors"), data_dir=folder / "data")) as (client, _):
        yield client


@dataclass(frozen=True)
class Kind:
    """A way to adapt the layer."""

    r: int
    lora_alpha: float
    path: str = "linear"
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, *, seed: int = 0) -> dict[str, bytes]:
        settings = {"r": self.r, "lora_alpha": self.lora_alpha, "target_modules": [self.path]} | self.config
        return save_adapter(self.model(), folder, dtype=self.dtype, seed=seed, **settings)

    def model(self) -> nn.Module:
        return Net(WEIGHT, BIAS, path=self.path)


NESTED = "encoder.layers.0.proj"
KINDS = {
    "rank 1": Kind(1, 1),
    "rank 2, alpha 3.7": Kind(2, 3.7),
    "rank 4, alpha negative": Kind(4, -2.0),
    "rank 6, alpha 0": Kind(6, 0),
    "rank 6, alpha 16": Kind(6, 16),
    "rank 9": Kind(9, 0.001),
    "rank 12, above both widths": Kind(12, 24),
    "rslora": Kind(4, 3, config={"use_rslora": True}),
    "lora_bias": Kind(3, 4.5, config={"lora_bias": True}),
    "lora_bias and rslora": Kind(5, 2, config={"lora_bias": True, "use_rslora": True}),
    "float16": Kind(3, 6, dtype=torch.float16, config={"lora_bias": True}),
    "bfloat16": Kind(3, 6, dtype=torch.bfloat16),
    "gaussian": Kind(2, 2, config={"init_lora_weights": "gaussian"}),
    "no init": Kind(2, 2, config={"init_lora_weights": False}),
    "dropout": Kind(2, 2, config={"lora_dropout": 0.4}),
    "task type": Kind(2, 2, config={"task_type": "FEATURE_EXTRACTION", "inference_mode": True}),
    "nested path": Kind(2, 5, path=NESTED),
    "hyphenated path": Kind(2, 5, path="blocks.my-layer.0"),
    "patterns by path": Kind(8, 8, NESTED, config={"rank_pattern": {NESTED: 3}, "alpha_pattern": {NESTED: 7.5}}),
    "patterns by end": Kind(8, 8, NESTED, config={"rank_pattern": {"0.proj": 2}, "alpha_pattern": {"proj": 5}}),
    "patterns of others": Kind(3, 6, NESTED, config={"rank_pattern": {"oj": 2}, "alpha_pattern": {"encoder": 1}}),
    "the first pattern": Kind(3, 6, NESTED, config={"alpha_pattern": {"0.proj": 2, NESTED: 9, "proj": 1}}),
    "patterns and rslora": Kind(
        8, 8, NESTED, config={"rank_pattern": {"proj": 4}, "alpha_pattern": {"proj": 3}, "use_rslora": True}
    ),
    "a regex for targets": Kind(2, 4, NESTED, config={"target_modules": r".*\.proj"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def _name(request: pytest.FixtureRequest) -> str:
    """An adapter of the test's own."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:120]


def _upload(client: httpx.Client, name: str, files: dict[str, bytes]) -> httpx.Response:
    return client.put(f"/adapters/{name}", files=as_parts(files))


def _predict(client: httpx.Client, name: str, x_NI: Tensor = ROWS) -> Float64:
    answer = client.post("/predict", json={"adapter": name, "inputs": x_NI.tolist()})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["outputs"])


def _download(client: httpx.Client, name: str, folder: Path, **query: str | int) -> Path:
    answer = client.get(f"/adapters/{name}/download", params=query).raise_for_status()
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(BytesIO(answer.content)) as archive:
        archive.extractall(folder)
    return folder


@every_kind
def test_an_adapter_that_peft_saved_answers_as_it_does_in_peft(
    kind: Kind, client: httpx.Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = _name(request)
    answer = _upload(client, name, kind.save(tmp_path))
    assert answer.status_code == 201, answer.text
    assert relative_error(_predict(client, name), peft_answer(kind.model(), tmp_path, ROWS)) < TOLERANCE


@every_kind
def test_our_download_answers_in_peft_as_it_does_here(
    kind: Kind, client: httpx.Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = _name(request)
    assert _upload(client, name, kind.save(tmp_path / "made")).status_code == 201
    here = _predict(client, name)
    there = peft_answer(kind.model(), _download(client, name, tmp_path / "same"), ROWS)
    assert relative_error(here, there) < TOLERANCE
    moved = Net(WEIGHT, BIAS, path="somewhere.else_1")
    there = peft_answer(moved, _download(client, name, tmp_path / "moved", module="somewhere.else_1"), ROWS)
    assert relative_error(here, there) < TOLERANCE


@every_kind
def test_every_form_of_the_same_files_is_the_same_version(
    kind: Kind, client: httpx.Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = _name(request)
    files = kind.save(tmp_path)
    assert set(files) == {*FILES, "README.md"}
    first = _upload(client, name, files)
    assert first.status_code == 201
    two = {file: files[file] for file in FILES}
    for content in (
        as_zip(two),
        as_zip(files),
        as_zip(files, folder="acme-v1"),
        as_zip(two, folder="acme-v1", compression=zipfile.ZIP_STORED),
        client.get(f"/adapters/{name}/download").content,
        client.get(f"/adapters/{name}/download", params={"module": "other"}).content,
    ):
        again = client.put(f"/adapters/{name}", content=content, headers=ZIP)
        assert (again.status_code, again.json()["digest"]) == (200, first.json()["digest"])
        assert again.json()["version"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_numbers_as_files_and_as_json_are_the_same_version(
    dtype: torch.dtype, client: httpx.Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = _name(request)
    files = Kind(3, 4.5, dtype=dtype, config={"lora_bias": True}).save(tmp_path)
    digest = _upload(client, name, files).json()["digest"]
    tensors = load(files["adapter_model.safetensors"])
    left, right, bias = (
        tensors[f"base_model.model.linear.{key}"].tolist() for key in ("lora_B.weight", "lora_A.weight", "lora_B.bias")
    )
    body = {"A": left, "B": right, "bias": bias, "alpha": 4.5}
    answer = client.put(f"/adapters/{name}", json=body)
    assert (answer.status_code, answer.json()["digest"]) == (200, digest)


def test_peft_s_names_in_json_are_the_same_version_too(
    client: httpx.Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = _name(request)
    files = Kind(3, 4).save(tmp_path)
    digest = _upload(client, name, files).json()["digest"]
    tensors = load(files["adapter_model.safetensors"])
    body: dict[str, Any] = {
        key: tensors[f"base_model.model.linear.{key}.weight"].tolist() for key in ("lora_A", "lora_B")
    }
    answer = client.put(f"/adapters/{name}", json=body | {"lora_alpha": 4})
    assert (answer.status_code, answer.json()["digest"]) == (200, digest)


@pytest.mark.parametrize("module", [None, "head", NESTED])
def test_what_came_in_as_json_loads_in_peft(
    module: str | None, client: httpx.Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = _name(request)
    a_OR, b_RI, bias_O = torch.randn(OUTPUTS, 2), torch.randn(2, INPUTS), torch.randn(OUTPUTS)
    body = {"A": a_OR.tolist(), "B": b_RI.tolist(), "bias": bias_O.tolist(), "alpha": -0.3}
    assert client.put(f"/adapters/{name}", json=body).status_code == 201
    folder = _download(client, name, tmp_path, **({} if module is None else {"module": module}))
    there = peft_answer(Net(WEIGHT, BIAS, path=module or "linear"), folder, ROWS)
    assert relative_error(_predict(client, name), there) < TOLERANCE


def test_a_download_is_the_same_bytes_every_time_and_knows_no_clock(
    client: httpx.Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = _name(request)
    _upload(client, name, Kind(3, 4.5, config={"lora_bias": True}).save(tmp_path))
    contents = {client.get(f"/adapters/{name}/download").content for _ in range(4)}
    assert len(contents) == 1
    with zipfile.ZipFile(BytesIO(contents.pop())) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == sorted(FILES)
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_an_old_version_is_downloaded_by_its_number(
    client: httpx.Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = _name(request)
    for seed in (1, 2):
        assert _upload(client, name, Kind(2, 2).save(tmp_path / str(seed), seed=seed)).status_code == 201
    folder = _download(client, name, tmp_path / "first", version=1)
    wanted = peft_answer(Kind(2, 2).model(), tmp_path / "1", ROWS)
    assert relative_error(peft_answer(Kind(2, 2).model(), folder, ROWS), wanted) < 1e-12
    assert relative_error(_predict(client, f"{name}@1"), wanted) < TOLERANCE
    assert client.get(f"/adapters/{name}/download", params={"version": 3}).status_code == 404
