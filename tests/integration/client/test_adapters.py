"""Adapters in and out: PEFT models, folders, zips, factors; listed, rolled back, deleted."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loraplex import (
    AdapterNotFound,
    BadAnswer,
    InvalidCombination,
    InvalidInput,
    InvalidUpload,
    NotFinite,
    PreconditionFailed,
    WrongType,
)
from loraplex.peft_files import pack, unpack
from safetensors.torch import load_file

from tests.conftest import Serve
from tests.integration.client.conftest import Connect, Start
from tests.support.catalog_factories import publication
from tests.support.peft_model import uses_peft

pytestmark = uses_peft

RNG = np.random.default_rng(11)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Model(torch.nn.Module):
    """A model of the user's, whose layer the service has as its base."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(42)
        self.head = torch.nn.Linear(10, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(2, 10, generator=torch.manual_seed(42)))
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)  # type: ignore[no-any-return]


def peft_model(name: str = "default") -> Any:
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["head"])
    model = peft.get_peft_model(Model(), config, adapter_name=name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("form", ["model", "folder", "zip"])
def test_a_peft_adapter_answers_as_its_model_does(start: Start, tmp_path: Path, form: str, name: str) -> None:
    client = start()
    model = peft_model(name)
    source: Any = model
    if form != "model":
        source = tmp_path / "saved"
        model.save_pretrained(source)
    if form == "zip":
        archive = tmp_path / "saved.zip"
        archive.write_bytes(pack(source))
        source = archive
    version = client.upload("acme", source)
    x = RNG.normal(size=(4, 10)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(client.predict("acme", x).outputs, expected, rtol=1e-4, atol=1e-4)
    assert (version.rank, version.alpha, version.source) == (3, 6.0, "upload")


def test_files_of_1970_are_uploaded_too(start: Start, tmp_path: Path) -> None:
    client = start()
    peft_model().save_pretrained(tmp_path)
    before = client.upload("acme", tmp_path)
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))
    assert client.upload("acme", tmp_path).digest == before.digest


def test_a_download_loads_in_peft(start: Start, tmp_path: Path) -> None:
    from peft import PeftModel

    client = start()
    client.upload("acme", A=RNG.normal(size=(2, 3)), B=RNG.normal(size=(3, 10)), alpha=1.5)
    folder = client.download("acme", tmp_path / "a" / "b", module="head")
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG, TENSORS]
    loaded = PeftModel.from_pretrained(Model(), folder)
    x = RNG.normal(size=(4, 10)).astype(np.float32)
    with torch.no_grad():
        expected = loaded(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(client.predict("acme", x).outputs, expected, rtol=1e-4, atol=1e-4)
    assert client.upload("again", folder).digest == client.adapter("acme").live.digest


def test_an_older_version_can_be_downloaded(start: Start, tmp_path: Path) -> None:
    client = start()
    for scale in (1, 2):
        client.upload("acme", A=np.full((2, 1), scale), B=np.ones((1, 10)))
    client.download("acme", tmp_path, version=1)
    tensors = load_file(tmp_path / TENSORS)
    assert [float(tensor.max()) for name, tensor in tensors.items() if "lora_B" in name] == [1.0]


def zip_of(files: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        zip_of({CONFIG: b"{}", "../" + TENSORS: b"x"}),
        zip_of({CONFIG: b"{}", TENSORS: b"x", "more.py": b"x"}),
        zip_of({CONFIG: b"{}"}),
        zip_of({CONFIG: b"{}", TENSORS: b"\0" * 10**7}, compression=zipfile.ZIP_DEFLATED),
        b"PK\x03\x04 and no more",
    ],
    ids=["climbing", "a third", "one", "a bomb", "cut off"],
)
def test_a_download_that_is_anything_else_writes_nothing(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(BadAnswer):
        unpack(content, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_what_holds_no_adapter_is_said_before_it_is_sent(start: Start, tmp_path: Path) -> None:
    client = start()
    (tmp_path / "text.zip").write_text("no zip")
    tests: list[tuple[Callable[[], Any], type[Exception]]] = [
        (lambda: client.upload("acme", tmp_path), InvalidUpload),
        (lambda: client.upload("acme", tmp_path / "text.zip"), InvalidUpload),
        (lambda: client.upload("acme", tmp_path / "nothing"), InvalidUpload),
        (lambda: client.upload("acme", 7), WrongType),
        (lambda: client.upload("acme"), InvalidCombination),
        (lambda: client.upload("acme", tmp_path, A=[[1.0]]), InvalidCombination),
        (lambda: client.upload("acme", A=[[np.nan]], B=[[1.0]]), NotFinite),
    ]
    for call, error in tests:
        with pytest.raises(error):
            call()
    peft_model("one").save_pretrained(tmp_path)
    peft_model("two").save_pretrained(tmp_path)
    with pytest.raises(InvalidUpload, match="one, two"):
        client.upload("acme", tmp_path)


def test_conditions_are_held(start: Start) -> None:
    client = start()
    factors = {"A": np.ones((2, 1)), "B": np.ones((1, 10))}
    first = client.upload("acme", **factors, if_none_match="*")
    with pytest.raises(PreconditionFailed):
        client.upload("acme", **factors, if_none_match="*")
    second = client.upload("acme", A=-factors["A"], B=factors["B"], if_match=first.digest)
    for call in (client.delete, lambda name, **rest: client.roll_back(name, 1, **rest)):
        with pytest.raises(PreconditionFailed):
            call("acme", if_match=first.digest)
    client.roll_back("acme", 1, if_match=second.digest)
    assert client.adapter("acme").live.version == 1


def test_a_bias_is_uploaded_with_its_factors(start: Start) -> None:
    client = start()
    client.upload("acme", A=np.zeros((2, 1)), B=np.zeros((1, 10)), bias=torch.tensor([1.0, 2.0]), alpha=3)
    outputs = client.predict("acme", np.zeros((1, 10))).outputs
    np.testing.assert_allclose(outputs, [[3, 6]])


def test_labels_are_sent_as_they_are_given(start: Start) -> None:
    client = start()
    factors = {"A": np.zeros((2, 1)), "B": np.zeros((1, 10))}
    for labels in (["cat", "dog"], ("cat", "dog"), np.array(["cat", "dog"])):
        assert client.upload("acme", **factors, labels=labels).labels == ["cat", "dog"]
    assert client.upload("acme", **factors, labels=[3, 5]).labels == [3, 5]
    for refused in (["cat", 1], [True, False], ["cat", None]):
        with pytest.raises(InvalidInput, match="labels"):
            client.upload("acme", **factors, labels=refused)


def test_adapters_are_listed_rolled_back_and_deleted(serve: Serve, connect: Connect) -> None:
    server, service = serve()
    client = connect(str(server.base_url))
    client.upload("a000", A=np.ones((2, 1)), B=np.ones((1, 10)))
    service.catalog.publish([publication(f"a{n:03}") for n in range(1, 230)], tenant="default")
    assert [adapter.name for adapter in client.adapters(prefix="a")] == [f"a{n:03}" for n in range(230)]
    assert [adapter.name for adapter in client.adapters(limit=101)][-1] == "a100"
    assert list(client.adapters(prefix="b")) == []
    assert list(client.adapters(limit=0)) == []
    client.upload("a000", A=np.zeros((2, 1)), B=np.ones((1, 10)))
    assert [version.reference for version in client.versions("a000")] == ["a000@2", "a000@1"]
    rolled = client.roll_back("a000", 1)
    assert (rolled.aliases, rolled.live) == ({"live": 1}, client.version("a000", 1))
    client.delete("a000")
    with pytest.raises(AdapterNotFound):
        client.adapter("a000")


def test_the_base_says_what_it_is(start: Start) -> None:
    client = start()
    base = client.base()
    assert (base.in_features, base.out_features, base.source) == (10, 2, "random:10,2,42")
    assert client.ready() is True
