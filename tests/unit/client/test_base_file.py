"""Base layer files that the client makes, as the service reads them, beside the estimators and modules themselves."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loraplex import AsyncClient, Client, InvalidCombination, InvalidInput, WrongShape, WrongType, make_base
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.special import softmax
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC
from torch import nn

from adapters.lora.base_layer import BaseLayer, load_base_layer

# N rows · O out_features
X, KINDS = load_iris(return_X_y=True)
X = X.astype(np.float32).astype(np.float64)
NAMES = np.array(["versicolor", "setosa", "virginica"])[KINDS]
TWO = KINDS < 2
ROWS = torch.from_numpy(X).float()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "base.safetensors"


def _outputs(file: Path) -> tuple[Any, BaseLayer]:
    """(N, O), and the layer, as the service computes it."""
    base = load_base_layer(str(file), device="cpu")
    return base.forward(ROWS).numpy(), base


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=1000),
        RidgeClassifier(),
        LinearSVC(),
        SGDClassifier(random_state=0),
        LinearDiscriminantAnalysis(),
        make_pipeline(StandardScaler(), PCA(3), LogisticRegression()),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_classifier_keeps_its_decision_values_and_its_classes(estimator: Any, file: Path) -> None:
    estimator.fit(X, NAMES)
    assert make_base(estimator, file, check=X) == file
    y_NO, base = _outputs(file)
    np.testing.assert_allclose(y_NO, estimator.decision_function(X), rtol=1e-4, atol=1e-4)
    assert base.labels == tuple(estimator.classes_) == ("setosa", "versicolor", "virginica")


@pytest.mark.parametrize(
    "classifier", [LogisticRegression(), RidgeClassifier(), LinearSVC()], ids=lambda one: type(one).__name__
)
def test_a_classifier_with_two_classes_gets_two_outputs(classifier: Any, file: Path) -> None:
    classifier.fit(X[TWO], NAMES[TWO])
    make_base(classifier, file)
    y_NO, base = _outputs(file)
    assert np.array(base.labels)[y_NO.argmax(1)].tolist() == classifier.predict(X).tolist()
    if hasattr(classifier, "predict_proba"):
        np.testing.assert_allclose(softmax(y_NO, axis=1), classifier.predict_proba(X), atol=1e-5)


@pytest.mark.parametrize("targets", [X[:, 0], X[:, :1], X[:, :2] @ [[1, 2, 3], [3, 2, 1]]], ids=["1-d", "one", "three"])
@pytest.mark.parametrize(
    "regressor", [LinearRegression(), Ridge(fit_intercept=False)], ids=lambda one: type(one).__name__
)
def test_a_regressor_keeps_its_predictions(regressor: Any, targets: Any, file: Path) -> None:
    regressor.fit(X, targets)
    make_base(regressor, file, check=X)
    y_NO, base = _outputs(file)
    np.testing.assert_allclose(y_NO, regressor.predict(X).reshape(len(X), -1), rtol=1e-4, atol=1e-4)
    assert base.labels is None


def test_coefficients_that_are_stored_by_columns_are_written_by_rows(file: Path) -> None:
    classifier = LogisticRegression(max_iter=1000).fit(X, NAMES)
    classifier.coef_ = np.asfortranarray(classifier.coef_)
    assert not classifier.coef_.flags.c_contiguous
    make_base(classifier, file)
    np.testing.assert_allclose(_outputs(file)[0], classifier.decision_function(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(KINDS, (0, 1, 2)), (KINDS * 2.0 - 1, (-1, 1, 3)), (KINDS == 1, (0, 1))],
    ids=["int", "float", "bool"],
)
def test_classes_are_labels_as_in_a_data_set(classes: Any, labels: tuple[int, ...], file: Path) -> None:
    make_base(RidgeClassifier().fit(X, classes), file)
    assert _outputs(file)[1].labels == labels
    names = ["a", "b", "c"][: len(labels)]
    make_base(RidgeClassifier().fit(X, classes), file, labels=names)
    assert _outputs(file)[1].labels == tuple(names)


class _Scaled:
    """Estimator whose predictions are not those of its coefficients."""

    coef_, intercept_ = np.ones((3, 4)), np.zeros(3)

    def predict(self, x_NI: Any) -> Any:
        return 1.001 * x_NI @ self.coef_.T


@pytest.mark.parametrize(
    "estimator",
    [
        PoissonRegressor().fit(X, KINDS),
        SVC(kernel="linear").fit(X, KINDS),
        make_pipeline(Normalizer(), LogisticRegression()).fit(X, KINDS),
        _Scaled(),
    ],
    ids=["exponential", "one against one", "step that is not linear", "scaled"],
)
def test_an_estimator_that_is_no_linear_layer_leaves_the_file_as_it_was(estimator: Any, file: Path) -> None:
    file.write_text("before")
    with pytest.raises(InvalidInput, match=r"row \d+, output \d: the layer gives .* and the source .*; no file"):
        make_base(estimator, file)
    assert [path.read_text() for path in file.parent.iterdir()] == ["before"]


def test_rows_are_checked_against_given_outputs(file: Path) -> None:
    arrays = {"coef": np.arange(6.0).reshape(3, 2), "intercept": np.ones(2)}
    options: dict[str, Any] = {"weight": "coef", "bias": "intercept", "transpose": True}
    x, y = [[1, 2, 3], [0, 1, 0]], [[17, 23], [3, 4]]
    make_base(arrays, file, check={"inputs": x, "outputs": y}, **options)
    weight = load_base_layer(str(file)).weight_OI.cpu().numpy()
    np.testing.assert_array_equal(weight, [[0, 2, 4], [1, 3, 5]])
    with pytest.raises(InvalidInput, match="row 1, output 0") as caught:
        make_base(arrays, file, check={"inputs": x, "outputs": [[17, 23], [3.001, 4]]}, **options)
    assert caught.value.row == 1
    with pytest.raises(WrongShape, match="check has 2 columns"):
        make_base(arrays, file, check={"inputs": [[1, 2]], "outputs": [[1, 2]]}, **options)
    with pytest.raises(InvalidCombination, match="no outputs to compare with"):
        make_base(arrays, file, check=x, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_with_one_linear_is_that_linear(file: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3, bias=False), nn.Identity()).to(dtype)
    before = copy.deepcopy(module.state_dict())
    make_base(module, file, labels=["a", "b", "c"], check=ROWS)
    y_NO, base = _outputs(file)
    assert (module.training, base.bias_O, base.labels) == (True, None, ("a", "b", "c"))
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())
    np.testing.assert_allclose(y_NO, module.eval().float()(ROWS).detach().numpy(), rtol=1e-5, atol=1e-6)


class _OfTokens(nn.Module):
    """Module that takes no rows of numbers."""

    def __init__(self, *, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(4, 3), activation

    def forward(self, features: dict[str, Any]) -> Any:
        return self.activation(self.linear(features["tokens"]))


def test_a_module_that_does_more_than_its_linear_is_refused(file: Path) -> None:
    for module, error in (
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), InvalidInput),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), InvalidCombination),
        (_OfTokens(activation=nn.Tanh()), InvalidCombination),
    ):
        with pytest.raises(error):
            make_base(module, file)
    assert not file.exists()
    module = _OfTokens(activation=nn.Identity())
    make_base(module, file)
    np.testing.assert_allclose(_outputs(file)[0], module.linear(ROWS).detach().numpy(), rtol=1e-5, atol=1e-6)


def _dense(folder: Path, activation: str | None) -> Path:
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"in_features": 4, "out_features": 3, "bias": True}
    config |= {} if activation is None else {"activation_function": activation}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_dense_module_of_sentence_transformers_is_read_without_pickle(file: Path, tmp_path: Path) -> None:
    linear = nn.Linear(4, 3)
    dense = _dense(tmp_path / "model" / "2_Dense", "torch.nn.modules.linear.Identity")
    torch.save({"linear.weight": linear.weight}, dense / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"no model.safetensors, and pickled files are never loaded"):
        make_base(dense, file)
    save_file(
        {"linear.weight": linear.weight.detach(), "linear.bias": linear.bias.detach()}, dense / "model.safetensors"
    )
    for folder in (dense, dense.parent):
        make_base(folder, file)
        np.testing.assert_array_equal(load_base_layer(str(file), device="cpu").weight_OI, linear.weight.detach())
    for activation in ("torch.nn.modules.activation.Tanh", None):
        with pytest.raises(InvalidInput, match="Tanh, which a linear layer cannot represent"):
            make_base(_dense(tmp_path / str(activation), activation), file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_file_of_any_float_type_becomes_float32(dtype: torch.dtype, file: Path, tmp_path: Path) -> None:
    weight = torch.randn(3, 4).to(dtype)
    save_file({"other": torch.arange(5), "w": weight}, tmp_path / "head.safetensors")
    make_base(tmp_path / "head.safetensors", file, weight="w")
    with safe_open(file, framework="pt") as opened:
        assert opened.get_tensor("weight").equal(weight.float())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.pkl", b"\x80\x04K\x01."),
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"),
        ("list.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"),
        (
            "long.safetensors",
            (102).to_bytes(8, "little") + b'{"weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'.ljust(102),
        ),
        ("text.npz", b"text"),
    ],
)
def test_a_file_that_is_no_arrays_is_refused(name: str, content: bytes, file: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match="cannot be read"):
        make_base(tmp_path / name, file)
    assert not file.exists()


def _with(**fitted: Any) -> Any:
    """A fitted classifier with other values after the fit."""
    classifier = RidgeClassifier().fit(X, KINDS)
    vars(classifier).update(fitted)
    return classifier


@pytest.mark.parametrize(
    ("source", "labels", "error"),
    [
        (RidgeClassifier(), None, WrongType),
        ({"weight": np.ones(3)}, None, WrongShape),
        ({"weight": np.ones((3, 2)), "bias": np.ones(2)}, None, WrongShape),
        ({"coef": np.ones((3, 2))}, None, InvalidInput),
        ({"weight": np.ones((2, 3))}, ["a"], WrongShape),
        ({"weight": np.ones((2, 3))}, ["a", 1], WrongType),
        ({"weight": np.ones((2, 3))}, ["a", "a"], InvalidInput),
        ({"weight": np.full((2, 3), np.nan)}, None, InvalidInput),
        ({1: np.ones((2, 3))}, None, InvalidInput),
        ({"weight": np.ones((2, 3))}, "ab", WrongType),
        ({"weight": np.ones((2, 3))}, {"a", "b"}, WrongType),
        ({"weight": np.ones((2, 3))}, 2, WrongType),
        ({"weight": np.ones((2, 3))}, ["a", "\ud800"], WrongType),
        (_with(coef_=np.ones((3, 4)) * 1j), None, WrongType),
        (_with(coef_=None), None, WrongType),
        (_with(intercept_=np.ones(2)), None, WrongShape),
        (_with(classes_=np.array([0, 1, np.inf])), None, WrongType),
        (nn.LazyLinear(3), None, WrongType),
    ],
)
def test_what_cannot_be_a_base_layer_is_refused(source: Any, labels: Any, error: type[Exception], file: Path) -> None:
    with pytest.raises(error):
        make_base(source, file, labels=labels)
    assert not list(file.parent.iterdir())


def test_labels_of_an_estimator_may_be_its_classes(file: Path) -> None:
    classifier = make_pipeline("passthrough", StandardScaler(), LogisticRegression()).fit(X, NAMES)
    make_base(classifier, file, labels=list(classifier.classes_))
    assert _outputs(file)[1].labels == ("setosa", "versicolor", "virginica")


@pytest.mark.parametrize("outputs", [3, [["a", "b"]]])
def test_outputs_to_check_that_are_no_rows_of_numbers_are_refused(outputs: Any, file: Path) -> None:
    with pytest.raises((WrongShape, WrongType), match="outputs"):
        make_base({"weight": np.ones((2, 3))}, file, check={"inputs": [[1, 2, 3]], "outputs": outputs})
    assert not list(file.parent.iterdir())


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    for path in (tmp_path / "gone" / "base.safetensors", tmp_path / "text" / "base.safetensors"):
        with pytest.raises(InvalidInput, match="cannot be written"):
            make_base({"weight": np.ones((2, 3))}, path)


def test_both_clients_have_it_too() -> None:
    functions: list[Callable[..., Path]] = [Client.make_base, AsyncClient.make_base]
    assert functions == [make_base, make_base]
