"""What PEFT can make and this service could not serve exactly is refused by name, and nothing is stored."""

import json
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from app.settings import Settings
from tests.support.peft_model import FILES, Net, as_parts, as_zip, save_adapter, uses_peft
from tests.support.service import serving

# Wide enough for PiSSA and OLoRA to decompose; the base of `client`.
INPUTS, OUTPUTS, RANK = 10, 2, 2
Files = dict[str, bytes]

# PEFT says that it corrects fan_in_fan_out for a transposed layer; the corrected file is what is refused.
pytestmark = [uses_peft, pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    settings = Settings(base=f"random:{INPUTS},{OUTPUTS},42", data_dir=tmp_path_factory.mktemp("data"))
    with serving(settings) as (client, _):
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where PEFT saves."""
    return tmp_path / "saved"


def _net(**others: Any) -> Net:
    return Net(torch.randn(OUTPUTS, INPUTS), torch.zeros(OUTPUTS), **others)


def _lora(**config: Any) -> Callable[[Path], Files]:
    def save(folder: Path) -> Files:
        net = _net(head=nn.Linear(OUTPUTS, OUTPUTS), twin=nn.Linear(INPUTS, OUTPUTS), wide=nn.Linear(64, 64))
        plain: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": ["linear"]}
        return save_adapter(net, folder, **plain | config)

    return save


def _other(config: str, **values: Any) -> Callable[[Path], Files]:
    def save(folder: Path) -> Files:
        import peft

        adapted = peft.get_peft_model(_net(), getattr(peft, config)(target_modules=["linear"], **values))
        adapted.save_pretrained(str(folder))
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return save


def _of(other: Callable[[], nn.Module]) -> Callable[[Path], Files]:
    def save(folder: Path) -> Files:
        return save_adapter(_net(other=other()), folder, r=RANK, lora_alpha=RANK, target_modules=["other"])

    return save


def _transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(OUTPUTS, INPUTS)
    return layer


TENSORS = "adapter_model.safetensors"
REFUSED: dict[str, tuple[Callable[[Path], Files], str, str]] = {
    "DoRA": (_lora(use_dora=True), "peft_unsupported", "use_dora"),
    "PiSSA": (_lora(init_lora_weights="pissa"), "peft_unsupported", "init_lora_weights"),
    "PiSSA, fast": (_lora(init_lora_weights="pissa_niter_4"), "peft_unsupported", "init_lora_weights"),
    "OLoRA": (_lora(init_lora_weights="olora"), "peft_unsupported", "init_lora_weights"),
    "orthogonal": (_lora(init_lora_weights="orthogonal"), "peft_unsupported", "init_lora_weights"),
    "modules to save": (_lora(modules_to_save=["head"]), "peft_unsupported", "modules_to_save"),
    "all biases": (_lora(bias="all"), "peft_unsupported", "bias"),
    "its own bias": (_lora(bias="lora_only"), "peft_unsupported", "bias"),
    "two modules": (_lora(target_modules=["linear", "twin"]), "peft_unsupported", TENSORS),
    "all modules": (_lora(target_modules="all-linear"), "peft_unsupported", TENSORS),
    "a module excluded": (
        _lora(target_modules=["linear", "twin"], exclude_modules=["twin"]),
        "peft_unsupported",
        "exclude_modules",
    ),
    "a pattern that is a regex": (_lora(alpha_pattern={"lin.*": 4}), "peft_unsupported", "alpha_pattern"),
    "another layer": (_lora(target_modules=["wide"]), "wrong_shape", "lora_B.weight"),
    "a rank past the limit": (_lora(r=257), "rank_too_large", "lora_A.weight"),
    "an embedding": (_of(lambda: nn.Embedding(INPUTS, OUTPUTS)), "peft_unsupported", TENSORS),
    "a convolution": (_of(lambda: nn.Conv2d(INPUTS, OUTPUTS, 1)), "wrong_shape", "lora_B.weight"),
    "a transposed layer": (_of(_transposed), "peft_unsupported", "fan_in_fan_out"),
    "IA3": (_other("IA3Config", feedforward_modules=["linear"]), "peft_unsupported", "peft_type"),
    "LoHa": (_other("LoHaConfig", r=RANK), "peft_unsupported", "peft_type"),
    "VeRA": (_other("VeraConfig", r=RANK), "peft_unsupported", "peft_type"),
}


def _check(answer: httpx.Response, code: str, names: str) -> None:
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, code), answer.text
    assert names in (problem["field"], problem["given"]) or names in problem["detail"], answer.text


@pytest.mark.parametrize(("save", "code", "names"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_exactly_is_refused_by_name(
    save: Callable[[Path], Files], code: str, names: str, client: httpx.Client, folder: Path
) -> None:
    files = save(folder)
    if "README.md" in files:
        _check(
            client.put("/adapters/a", content=as_zip(files), headers={"Content-Type": "application/zip"}), code, names
        )
    _check(client.put("/adapters/a", files=as_parts(files)), code, names)
    assert client.get("/adapters/a").status_code == 404


def test_a_pickle_is_refused_by_name_and_never_read(client: httpx.Client, folder: Path) -> None:
    files = _lora()(folder)
    pickled = {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"\x80\x04cos\nsystem\n."}
    zipped = client.put("/adapters/a", content=as_zip(pickled), headers={"Content-Type": "application/zip"})
    _check(zipped, "invalid_archive", "adapter_model.bin")
    parts = [("files", (name, content)) for name, content in pickled.items()]
    _check(client.put("/adapters/a", files=parts), "invalid_upload", "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "field"),
    [({"r": 3}, "r"), ({"lora_bias": True}, "lora_bias"), ({"r": None}, "r"), ({"lora_alpha": None}, "lora_alpha")],
)
def test_a_config_that_the_tensors_belie_is_refused(
    change: dict[str, Any], field: str, client: httpx.Client, folder: Path
) -> None:
    files = _lora()(folder)
    config = json.loads(files["adapter_config.json"]) | change
    answer = client.put("/adapters/a", files=as_parts(files | {"adapter_config.json": json.dumps(config).encode()}))
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_our_download_is_refused_where_another_base_is_served(client: httpx.Client, folder: Path) -> None:
    assert client.put("/adapters/ours", files=as_parts(_lora()(folder))).status_code == 201
    ours = client.get("/base").json()["fingerprint"]
    with zipfile.ZipFile(BytesIO(client.get("/adapters/ours/download").content)) as archive:
        files = {name: archive.read(name) for name in FILES}
    assert ours.encode() in files[TENSORS]
    theirs = {name: content.replace(ours.encode(), b"sha256:" + b"0" * 64) for name, content in files.items()}
    answer = client.put("/adapters/theirs", files=as_parts(theirs))
    assert (answer.status_code, answer.json()["code"]) == (409, "base_mismatch")
    assert answer.json()["expected"] == ours
    assert client.get("/adapters/theirs").status_code == 404
    assert client.put("/adapters/theirs", files=as_parts(files)).status_code == 201
