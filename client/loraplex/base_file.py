"""Base layer files: made from estimators, modules, folders and arrays, and compared with their source.

The file has the tensors `weight`, (O, I), and `bias`, (O,), in float32 and C order, and the labels of the outputs in
its metadata. This module imports neither scikit-learn nor torch, and reads no pickle.
"""

# N rows · I in_features · O out_features · F features before the steps in front of a head
import copy
import json
import math
import os
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from loraplex.arrays import Float32, array, numbers, rows_of
from loraplex.errors import InvalidCombination, InvalidInput, InvalidSafetensors, OutOfRange, WrongShape, WrongType

Float64 = NDArray[np.float64]

# Largest difference of an output from that of the source, relative to the largest output or 1.
TOLERANCE = 1e-5
_CHECKED_ROWS = 16
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_HEADER_BYTES = 100 * 2**20
_MAX_LABEL_CHARACTERS, _MAX_LABEL = 200, 2**53
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNITS_AT_ONCE = 1024
_NO_ACTIVATION = "Identity"
# Layers that change no output of a module in evaluation.
_NEUTRAL = ("Identity", "Dropout")


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    weight_OI: Float32
    bias_O: Float32 | None
    labels: tuple[str | int, ...] | None = None
    outputs: Callable[[Float64], Any] | None = None
    """The source's own outputs of rows, (N, I) -> (N, O); None if the source only has the numbers."""


def make_base(
    source: Any,
    path: str | Path,
    *,
    labels: Sequence[str | int] | None = None,
    check: Any = None,
    weight: str = "weight",
    bias: str | None = None,
    transpose: bool = False,
) -> Path:
    """Write a base layer file for `loraplex serve --base`, and return its path.

    `source` is a fitted linear estimator of scikit-learn, or a pipeline of linear steps that ends with one; a torch
    module with one `Linear`; a `2_Dense` folder of sentence-transformers; a `.safetensors` or `.npz` file; or a mapping
    of names to arrays. In files and mappings, `weight` and `bias` are the names of the arrays (without `bias`, the one
    called so, if there is one), and `transpose` is for a weight of shape (in, out).

    `labels` name the outputs in order; by default, they are the estimator's classes. A classifier with two classes gets
    two outputs, 0 and its decision value, so that their softmax is the probability of each class.

    The outputs of the written file are compared with those of an estimator or module on random rows, and on the rows in
    `check`; of any source, `check` may be `{"inputs": …, "outputs": …}`. Raises `InvalidInput` if they differ by more
    than 1e-5 relative to the largest output; then no file is written.
    """
    layer = _read(source, weight=weight, bias=bias, transpose=transpose)
    names = layer.labels if labels is None else labels
    if names is not None:
        layer = replace(layer, labels=_check_labels(names, outputs=len(layer.weight_OI)))
    tensors = {"weight": layer.weight_OI} | ({} if layer.bias_O is None else {"bias": layer.bias_O})
    path = Path(path)
    with _replacing(path) as written:
        _write_safetensors(written, tensors, labels=layer.labels)
        stored = read_arrays(written)
        for x_NI, expected_NO in _examples(layer, check):
            _compare(x_NI, stored["weight"], stored.get("bias"), expected_NO)
    return path


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of numbers in a safetensors or NPZ file, by name.

    Raises `InvalidSafetensors`, and `InvalidInput` for a file that is neither, or that cannot be read.
    """
    try:
        if path.suffix.lower() == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return _read_safetensors(path)
    except OSError as error:
        reason: object = error.strerror or error
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, BadZipFile, RecursionError) as error:
        reason = error
    expected = "a .safetensors or .npz file of arrays; pickled files are never loaded"
    raise InvalidSafetensors(f"{path} cannot be read: {reason}", field="source", given=str(path), expected=expected)


def _read(source: Any, *, weight: str, bias: str | None, transpose: bool) -> _Layer:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_dir():
            return _from_arrays(read_arrays(path), str(path), weight=weight, bias=bias, transpose=transpose)
        return _from_arrays(_read_dense(path), str(path), weight="weight")
    if isinstance(source, Mapping):
        return _from_arrays(source, "the mapping", weight=weight, bias=bias, transpose=transpose)
    # An instance of the class exists only if torch is imported.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.nn.Module):
        return _from_module(source, torch)
    return _from_estimator(source)


def _from_arrays(
    arrays: Mapping[str, Any], origin: str, *, weight: str, bias: str | None = None, transpose: bool = False
) -> _Layer:
    for key in (weight, bias):
        if key is not None and key not in arrays:
            present = ", ".join(sorted(map(str, arrays))[:20]) or "none"
            detail = f"{origin} has no array {key!r}; it has: {present}"
            raise InvalidInput(detail, field="source", given=key, expected="the names of the weight and of the bias")
    weight_OI = array(arrays[weight], field=weight)
    return _layer(weight_OI.T if transpose else weight_OI, arrays.get(bias or "bias"))


def _layer(weight: Any, bias: Any, **rest: Any) -> _Layer:
    """Return a layer of finite float32 in C order; raise `WrongShape` if the shapes are not (O, I) and (O,)."""
    weight_OI = numbers(weight, field="weight")
    if weight_OI.ndim != 2 or 0 in weight_OI.shape:
        raise WrongShape(f"the weight has the shape {weight_OI.shape}", field="weight", expected="(out, in)")
    bias_O = None if bias is None else np.ravel(numbers(bias, field="bias"))
    if bias_O is not None and len(bias_O) != len(weight_OI):
        detail = f"the bias has {len(bias_O)} numbers, and the weight the shape {weight_OI.shape}"
        expected = f"({len(weight_OI)},); if the weight is (in, out), transpose it"
        raise WrongShape(detail, field="bias", given=bias_O.shape, expected=expected)
    return _Layer(weight_OI, bias_O, **rest)


def _from_estimator(estimator: Any) -> _Layer:
    estimator = getattr(estimator, "best_estimator_", estimator)
    steps = getattr(estimator, "steps", None)
    head = estimator if steps is None else steps[-1][1]
    if not hasattr(head, "coef_"):
        kind = type(head).__name__
        expected = "a fitted linear estimator, a torch module, a folder, a file, or a mapping of arrays"
        raise WrongType(f"a {kind} has no coef_, so it is no base layer", field="source", given=kind, expected=expected)
    weight_OI = np.atleast_2d(_float64(head.coef_, field="coef_"))
    bias_O = np.ravel(_float64(getattr(head, "intercept_", 0.0), field="intercept_"))
    bias_O = np.broadcast_to(bias_O, len(weight_OI)) if len(bias_O) == 1 else bias_O
    if steps is not None and len(steps) > 1:
        # A step that is "passthrough" has no features.
        features = next((step.n_features_in_ for _, step in steps if hasattr(step, "n_features_in_")), len(weight_OI.T))
        weight_OI, bias_O = _fold(estimator[:-1], weight_OI, bias_O, features=int(features))
    classes = getattr(head, "classes_", None)
    is_binary = classes is not None and len(classes) == 2 and len(weight_OI) == 1
    if classes is not None and not is_binary and len(classes) != len(weight_OI):
        detail = f"the estimator has {len(classes)} classes and {len(weight_OI)} linear functions"
        raise WrongShape(detail, field="source", expected="one linear function for each class")
    decide = getattr(estimator, "decision_function", None) or estimator.predict

    def outputs(x_NI: Float64) -> Float64:
        y_NO: Float64 = np.asarray(_quietly(decide, x_NI), np.float64).reshape(len(x_NI), -1)
        return np.hstack([np.zeros_like(y_NO), y_NO]) if is_binary else y_NO

    if is_binary:
        weight_OI, bias_O = (np.concatenate([np.zeros_like(part), part]) for part in (weight_OI, bias_O))
    return _layer(weight_OI, bias_O, labels=None if classes is None else _classes(classes), outputs=outputs)


def _fold(front: Any, weight_OI: Float64, bias_O: Float64, *, features: int) -> tuple[Float64, Float64]:
    """Return the layer that takes the features before the steps in front of a head, (O, F) and (O,).

    The steps are taken as x·T + t: t is their output for zeros, and the rows of T those for the unit vectors less t.
    Steps of another form are found when the outputs are compared.
    """
    transform = front.transform
    shift_1I = _dense(_quietly(transform, np.zeros((1, features))))
    parts = []
    for begin in range(0, features, _UNITS_AT_ONCE):
        units = np.eye(min(_UNITS_AT_ONCE, features - begin), features, k=begin)
        parts.append(weight_OI @ (_dense(_quietly(transform, units)) - shift_1I).T)
    return np.hstack(parts), bias_O + weight_OI @ shift_1I[0]


def _quietly(call: Callable[[Any], Any], x_NI: Float64) -> Any:
    """Call an estimator with an array; it warns if it was fitted on named columns. Raise `WrongType` for its errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(x_NI)
    except Exception as error:
        detail = f"the estimator takes no array of {x_NI.shape[1]} columns: {error}"
        raise WrongType(detail, field="source", expected="an estimator of arrays of numbers") from error


def _dense(values: Any) -> NDArray[Any]:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values)


def _float64(values: Any, *, field: str) -> Float64:
    """Return an estimator's numbers; raise `WrongType` for anything else, such as complex ones."""
    dense = array(_dense(values), field=field)
    if dense.dtype.kind not in "iuf":
        detail = f"{field} is no array of numbers: its type is {dense.dtype}"
        raise WrongType(detail, field="source", given=str(dense.dtype), expected="a fitted linear estimator")
    converted: Float64 = dense.astype(np.float64)
    return converted


def _classes(classes: Any) -> tuple[str | int, ...] | None:
    """Return an estimator's classes as labels: whole floats and truth values as integers, as in data sets."""
    values = np.asarray(classes)
    is_whole = values.dtype.kind == "f" and bool((abs(values) <= _MAX_LABEL).all() and (values % 1 == 0).all())
    if values.dtype.kind == "b" or is_whole:
        values = values.astype(np.int64)
    return tuple(values.tolist())


def _from_module(module: Any, torch: Any) -> _Layer:
    linears = [part for part in module.modules() if hasattr(part, "in_features") and hasattr(part, "out_features")]
    if len(linears) != 1:
        kind = type(module).__name__
        detail, expected = f"the {kind} has {len(linears)} linear layers", "a Linear, or a module with exactly one"
        raise InvalidCombination(detail, field="source", given=kind, expected=expected)
    (linear,) = linears
    layer = _layer(linear.weight, linear.bias)
    # A copy, so that neither the mode nor the type of the caller's module changes.
    evaluated = copy.deepcopy(module).eval().float().cpu()

    def outputs(x_NI: Float64) -> Float64:
        with torch.no_grad():
            return np.asarray(evaluated(torch.from_numpy(x_NI.astype(np.float32))).numpy(), np.float64)

    try:
        outputs(np.zeros((1, layer.weight_OI.shape[1])))
    except Exception as error:
        _check_neutral(module, linear, error)
        return layer
    return replace(layer, outputs=outputs)


def _check_neutral(module: Any, linear: Any, error: Exception) -> None:
    """Raise `InvalidCombination` if a module that takes no rows of numbers has layers that change its outputs."""
    leaves = [part for part in module.modules() if part is not linear and not list(part.children())]
    others = [type(part).__name__ for part in leaves if not type(part).__name__.startswith(_NEUTRAL)]
    if others:
        detail = f"the module has other layers ({', '.join(others[:5])}) and takes no rows of numbers: {error}"
        expected = "its Linear alone, if that is the base layer"
        raise InvalidCombination(detail, field="source", expected=expected) from None


def _read_dense(folder: Path) -> dict[str, NDArray[Any]]:
    """Return weight and bias of a `Dense` module, or of a model's only one; raise `InvalidInput` for an activation."""
    folders = [folder] if (folder / "config.json").is_file() and not (folder / "modules.json").is_file() else []
    folders = folders or sorted(folder.glob("*_Dense"))
    if len(folders) != 1:
        detail, expected = f"{folder} has {len(folders)} Dense modules", "a 2_Dense folder of sentence-transformers"
        raise InvalidInput(detail, field="source", given=str(folder), expected=expected)
    (dense,) = folders
    try:
        config = json.loads((dense / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{dense} has no config.json that can be read: {error}", field="source") from None
    # Tanh is the default of sentence-transformers.
    activation = str(config.get("activation_function", "Tanh")) if isinstance(config, dict) else "?"
    if activation.rpartition(".")[2] != _NO_ACTIVATION:
        detail = f"{dense} has the activation {activation}, which a linear layer cannot represent"
        raise InvalidInput(detail, field="source", given=activation, expected="torch.nn.Identity as the activation")
    file = dense / "model.safetensors"
    if not file.is_file():
        detail = f"{dense} has no model.safetensors, and pickled files are never loaded"
        expected = "a model saved with safe_serialization=True"
        raise InvalidInput(detail, field="source", given=str(dense), expected=expected)
    return {name.removeprefix("linear."): values for name, values in read_arrays(file).items()}


def _check_labels(labels: Any, *, outputs: int) -> tuple[str | int, ...]:
    """Return the labels, which follow the rules of the service; raise `OutOfRange`, `WrongType` or `WrongShape`."""
    expected = f"2 to {outputs} different strings, or as many whole numbers: labels=[…]"
    names = labels.tolist() if hasattr(labels, "tolist") else labels
    # A set has no order, and a text is one label.
    if isinstance(names, str | set | frozenset | Mapping) or not isinstance(names, Iterable):
        detail = f"the labels are no list: {str(names)[:80]!r}"
        raise WrongType(detail, field="labels", given=str(names)[:80], expected=expected)
    # Those of NumPy, as in list(estimator.classes_).
    names = [name.item() if isinstance(name, np.generic) else name for name in names]
    if not 2 <= len(names) <= outputs:
        detail = f"there are {len(names)} labels for {outputs} outputs"
        raise WrongShape(detail, field="labels", given=len(names), expected=expected)
    for position, name in enumerate(names):
        is_valid = type(name) is int or (type(name) is str and 1 <= len(name) <= _MAX_LABEL_CHARACTERS)
        is_valid = is_valid and not _SURROGATE.search(str(name))
        if not is_valid or type(name) is not type(names[0]) or (type(name) is int and abs(name) > _MAX_LABEL):
            detail = f"label {position} cannot be used: {str(name)[:80]!r}"
            raise WrongType(detail, field="labels", given=name, expected=expected)
    if len(set(names)) < len(names):
        raise OutOfRange("a label occurs twice", field="labels", expected=expected)
    return tuple(names)


def _examples(layer: _Layer, check: Any) -> Iterator[tuple[Float32, Any]]:
    """Yield rows with the outputs that the file must give."""
    if isinstance(check, Mapping):
        if set(check) != {"inputs", "outputs"}:
            expected = '{"inputs": …, "outputs": …}'
            raise InvalidInput(f"check has {', '.join(map(str, check))}", field="check", expected=expected)
        yield rows_of(check["inputs"], field="check.inputs").x_NI, numbers(check["outputs"], field="check.outputs")
    elif check is not None:
        if layer.outputs is None:
            detail = "the source has no outputs to compare with"
            raise InvalidCombination(detail, field="check", expected='check={"inputs": …, "outputs": …}')
        x_NI = rows_of(check, field="check").x_NI
        yield x_NI, None if x_NI.shape[1] != layer.weight_OI.shape[1] else layer.outputs(x_NI.astype(np.float64))
    if layer.outputs is not None:
        x_NI = np.random.default_rng(0).normal(size=(_CHECKED_ROWS, layer.weight_OI.shape[1])).astype(np.float32)
        yield x_NI, layer.outputs(x_NI.astype(np.float64))


def _compare(x_NI: Float32, weight_OI: Float32, bias_O: Float32 | None, expected: Any) -> None:
    """Raise `InvalidInput` with the first row whose outputs are not the expected ones."""
    rows, (outputs, columns) = len(x_NI), weight_OI.shape
    if x_NI.shape[1] != columns:
        detail = f"check has {x_NI.shape[1]} columns, and the layer takes {columns}"
        raise WrongShape(detail, field="check", given=x_NI.shape, expected=f"(rows, {columns})")
    y_NO = x_NI.astype(np.float64) @ weight_OI.astype(np.float64).T + (0.0 if bias_O is None else bias_O)
    expected_NO = np.atleast_1d(np.asarray(expected, np.float64))
    expected_NO = expected_NO.reshape(rows, -1) if len(expected_NO) == rows else expected_NO
    if expected_NO.shape != y_NO.shape:
        detail = f"the source has outputs of the shape {expected_NO.shape}, and the layer of {(rows, outputs)}"
        raise WrongShape(detail, field="check", given=expected_NO.shape, expected=f"({rows}, {outputs})")
    difference_NO = np.abs(y_NO - expected_NO)
    allowed = TOLERANCE * max(1.0, float(np.abs(expected_NO).max()))
    # Not `>`, so that NaN is a difference.
    wrong = np.argwhere(~(difference_NO <= allowed))
    if len(wrong):
        row, output = map(int, wrong[0])
        given, expected_value = float(y_NO[row, output]), float(expected_NO[row, output])
        detail = f"row {row}, output {output}: the layer gives {given:.7g}, and the source {expected_value:.7g}"
        advice = f"a difference of at most {allowed:.1g}: of a source that is linear, and not too large for float32"
        raise InvalidInput(f"{detail}; no file was written", field="check", row=row, given=given, expected=advice)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`, and move it there if the block ends without an error; remove it otherwise."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.safetensors")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        detail, expected = f"{path} cannot be written: {error.strerror}", "a path in a folder that can be written"
        raise InvalidInput(detail, field="path", given=str(path), expected=expected) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_safetensors(path: Path, tensors: Mapping[str, Float32], *, labels: Sequence[str | int] | None) -> None:
    header: dict[str, Any] = {} if labels is None else {"__metadata__": {"labels": json.dumps(list(labels))}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    # The format's writers align the numbers to 8 bytes.
    head += b" " * (-len(head) % 8)
    with path.open("xb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.astype("<f4", copy=False).tobytes(order="C"))
        file.flush()
        os.fsync(file.fileno())


def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of floating-point numbers; raise `ValueError` if the file is not of the format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("it is not of the format of safetensors")
        header = json.loads(file.read(length))
        tensors = {}
        for name, about in header.items():
            if name == "__metadata__" or about["dtype"] not in _DTYPES:
                continue
            dtype, (begin, end) = np.dtype(_DTYPES[about["dtype"]]), about["data_offsets"]
            if end - begin != math.prod(about["shape"]) * dtype.itemsize or not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"the tensor {name!r} has wrong offsets")
            file.seek(8 + length + begin)
            values = np.frombuffer(file.read(end - begin), dtype).reshape(about["shape"])
            # bfloat16 is the upper half of a float32.
            is_bfloat16 = about["dtype"] == "BF16"
            tensors[name] = (values.astype("<u4") << 16).view("<f4") if is_bfloat16 else values
    return tensors
