"""The base layer: where it comes from, what its fingerprint tells apart, and that nothing changes it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from adapters.errors import BaseNotLoadable
from adapters.lora.base_layer import BaseLayer, load_base_layer

WEIGHT = torch.tensor([[1.5, -2.0, 0.25], [3.0, 0.125, -1.0]])
BIAS = torch.tensor([0.5, -0.5])


def _load(path: Path, tensors: dict[str, Tensor], **arguments: str) -> BaseLayer:
    save_file(tensors, path)
    return load_base_layer(str(path), device="cpu", **arguments)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_s_numbers_are_held_in_float32_whatever_it_stores(path: Path, dtype: torch.dtype) -> None:
    stored = torch.randn(3, 5).to(dtype)
    base = _load(path, {"weight": stored, "bias": stored[:, 0].contiguous()})
    assert base.dtype == "float32"
    assert base.bias_O is not None
    # Through numpy, which knows float16 and float64 but not torch's conversions.
    wide = stored.double() if dtype is torch.bfloat16 else torch.from_numpy(stored.numpy().astype(np.float64))
    assert base.weight_OI.double().equal(wide)
    assert base.bias_O.double().equal(wide[:, 0])


def test_other_tensors_of_the_file_are_not_read(path: Path) -> None:
    tensors = {"model.head.w": WEIGHT, "model.head.b": BIAS, "weight": torch.ones(9, 9), "steps": torch.tensor([3])}
    base = _load(path, tensors, weight_key="model.head.w", bias_key="model.head.b")
    assert base.weight_OI.equal(WEIGHT)
    assert base.bias_O is not None
    assert base.bias_O.equal(BIAS)


def test_a_file_without_a_bias_has_none(path: Path) -> None:
    base = _load(path, {"weight": WEIGHT})
    assert base.bias_O is None
    assert (base.out_features, base.in_features) == (2, 3)


def test_random_is_what_torch_makes_of_the_seed() -> None:
    torch.manual_seed(42)
    wanted = torch.randn(2, 10)
    base = load_base_layer("random:10,2,42")
    assert base.weight_OI.cpu().equal(wanted)
    assert base.bias_O is not None
    assert base.bias_O.cpu().equal(torch.zeros(2))


def test_making_a_random_base_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    wanted = torch.randn(4)
    torch.manual_seed(1)
    load_base_layer("random:10,2,42")
    assert torch.randn(4).equal(wanted)


def test_identity_answers_what_it_is_asked() -> None:
    base = load_base_layer("identity:7", device="cpu")
    assert base.weight_OI.numpy().tolist() == np.eye(7).tolist()
    assert base.bias_O is None


def test_zeros_have_the_shape_that_is_asked_for() -> None:
    base = load_base_layer("zeros:3,5", device="cpu")
    assert base.weight_OI.numpy().tolist() == np.zeros((5, 3)).tolist()
    assert base.bias_O is None


def test_the_bundled_base_knows_digits_that_it_was_not_trained_on() -> None:
    images_NI, labels_N = load_digits(return_X_y=True)
    base = load_base_layer("digits", device="cpu")
    assert base.bias_O is not None
    answers = images_NI[900:] @ base.weight_OI.numpy().T + base.bias_O.numpy()
    assert np.mean(answers.argmax(axis=1) == labels_N[900:]) > 0.94


def test_the_fingerprint_is_the_documented_hash(path: Path) -> None:
    base = _load(path, {"weight": WEIGHT, "bias": BIAS.to(torch.float16)})
    without = _load(path, {"weight": WEIGHT})
    digest = hashlib.sha256()
    digest.update(b'["weight","float32",[2,3]]' + WEIGHT.numpy().astype("<f4").tobytes())
    assert without.fingerprint == f"sha256:{digest.hexdigest()}"
    digest.update(b'["bias","float16",[2]]' + BIAS.numpy().astype("<f2").tobytes())
    assert base.fingerprint == f"sha256:{digest.hexdigest()}"


def test_the_fingerprint_tells_bias_dtype_shape_and_numbers_apart(path: Path) -> None:
    zero = torch.zeros(2)
    nothing = torch.zeros(2, 2)
    stored: list[dict[str, Tensor]] = [
        {"weight": WEIGHT},
        {"weight": WEIGHT, "bias": zero},
        {"weight": WEIGHT, "bias": zero.half()},
        {"weight": WEIGHT.half(), "bias": zero},
        {"weight": WEIGHT.bfloat16(), "bias": zero},
        {"weight": WEIGHT + 1e-6, "bias": zero},
        {"weight": WEIGHT.reshape(3, 2)},
        {"weight": torch.zeros(1, 4)},
        {"weight": torch.zeros(4, 1)},
        {"weight": nothing},
        {"weight": nothing.half()},
        {"weight": nothing.bfloat16()},
    ]
    assert len({_load(path, tensors).fingerprint for tensors in stored}) == len(stored)


def test_the_fingerprint_does_not_depend_on_names_or_neighbours(path: Path) -> None:
    plain = _load(path, {"weight": WEIGHT, "bias": BIAS}).fingerprint
    renamed = _load(path, {"w": WEIGHT, "b": BIAS, "x": BIAS + 1}, weight_key="w", bias_key="b").fingerprint
    assert plain == renamed


def test_saving_over_the_file_after_the_load_changes_nothing(path: Path) -> None:
    big = torch.randn(64, 64)
    base = _load(path, {"weight": big, "bias": big[0].clone()})
    save_file({"weight": torch.zeros(64, 64), "bias": torch.zeros(64)}, path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert base.weight_OI.equal(big)
    assert base.bias_O is not None
    assert base.bias_O.equal(big[0])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"w": WEIGHT}, "no tensor 'weight'"),
        ({"weight": WEIGHT[0]}, "shape"),
        ({"weight": torch.zeros(0, 3)}, "shape"),
        ({"weight": WEIGHT, "bias": torch.zeros(3)}, "bias"),
        ({"weight": WEIGHT, "bias": torch.zeros(1, 2)}, "bias"),
        ({"weight": WEIGHT.double()}, "float64"),
        ({"weight": torch.ones(2, 3, dtype=torch.int8)}, "int8"),
        ({"weight": WEIGHT / 0}, "finite"),
        ({"weight": WEIGHT, "bias": BIAS * float("nan")}, "finite"),
    ],
)
def test_a_file_that_is_no_linear_layer_is_refused_with_the_reason(
    path: Path, tensors: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(BaseNotLoadable, match=says):
        _load(path, tensors)


@pytest.mark.parametrize(
    "source",
    [
        "random:10,2",
        "random:10,2,42,1",
        "random:0,2,42",
        "random:10,2,",
        "random:10,2,9223372036854775808",
        "identity:0",
        "identity:3,4",
        "identity:99999999999999999999999",
        "zeros:4",
        "zeros:,4",
        "nowhere.safetensors",
        "",
        ".",
    ],
)
def test_a_source_that_means_nothing_is_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseNotLoadable):
        load_base_layer(source)


def test_a_file_that_is_not_safetensors_is_refused(path: Path) -> None:
    for content in (b"", b"PK\x03\x04", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(BaseNotLoadable, match="cannot be read"):
            load_base_layer(str(path))


def test_on_the_cpu_it_is_held_in_float32_whatever_is_set() -> None:
    assert load_base_layer("random:10,2,42", device="cpu", dtype="bfloat16").weight_OI.dtype == torch.float32


@pytest.mark.parametrize(("device", "dtype"), [("tpu", "float32"), ("", "float32"), ("meta", "float32")])
def test_a_device_that_cannot_hold_it_is_refused(device: str, dtype: str) -> None:
    with pytest.raises(BaseNotLoadable):
        load_base_layer("identity:3", device=device, dtype=dtype)


def test_labels_come_from_the_setting_or_the_metadata_and_leave_the_fingerprint_alone(
    path: Path, tmp_path: Path
) -> None:
    plain = _load(path, {"weight": WEIGHT, "bias": BIAS})
    save_file({"weight": WEIGHT, "bias": BIAS}, path, metadata={"labels": '["b", "a"]', "format": "pt"})
    listed = tmp_path / "labels.json"
    listed.write_text("[7, -3]\n")
    by_setting = {None: ("b", "a"), ' ["x", "é"]': ("x", "é"), str(listed): (7, -3)}
    loaded = {setting: load_base_layer(str(path), labels=setting, device="cpu") for setting in by_setting}
    assert {setting: base.labels for setting, base in loaded.items()} == by_setting
    assert plain.labels is None
    assert {base.fingerprint for base in loaded.values()} == {plain.fingerprint}
    assert load_base_layer("random:3,2,1", labels='["a", "b"]').labels == ("a", "b")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["a", "b", "c"], "3 entries; the layer has 2 outputs"),
        (["a"], "1 entries; the layer has 2 outputs"),
        (["a", "a"], "already at position 0"),
        (["a", 1], "strings and numbers together"),
        ([0, 1.5], "neither a string nor a whole number"),
        ([0, True], "neither a string nor a whole number"),
        ({"a": 0}, "must be a list of labels"),
        ("not JSON", "is not JSON"),
    ],
)
def test_labels_that_cannot_name_the_outputs_are_refused_with_the_reason(
    path: Path, labels: object, reason: str
) -> None:
    text = labels if isinstance(labels, str) else json.dumps(labels)
    save_file({"weight": WEIGHT}, path, metadata={"labels": text})
    with pytest.raises(BaseNotLoadable, match=reason):
        load_base_layer(str(path))
    listed = path.with_suffix(".json")
    listed.write_text(text)
    with pytest.raises(BaseNotLoadable, match=reason):
        load_base_layer("random:3,2,1", labels=str(listed))
    with pytest.raises(BaseNotLoadable, match="cannot be read"):
        load_base_layer("random:3,2,1", labels=str(listed) + ".gone")
