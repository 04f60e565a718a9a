"""Good bodies with bytes flipped, inserted and removed, and with values swapped for awkward ones."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import NewFolder
from tests.integration.hostile.bodies import (
    A_NAME,
    B_NAME,
    CONFIG_FILE,
    GOOD_FILES,
    IN,
    JSON,
    MULTIPART,
    OUT,
    ROW,
    TEN_THOUSAND_DIGITS,
    TENSOR_FILE,
    ZIP,
    Raw,
    multipart_of,
    safetensors,
    to_json,
    zip_of,
)
from tests.integration.hostile.case import problem_of
from tests.integration.hostile.conftest import settings_for
from tests.integration.hostile.test_safetensors import A_ENTRY, B_ENTRY, CONTENT
from tests.support.service import serving

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
# The web framework leaves the temporary file of a part that never ends to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning"
)


class Call(NamedTuple):
    """A call and the body that it takes."""

    method: str
    path: str
    kind: str
    body: Any


PREDICT = Call("POST", "/predict", JSON, {"adapter": "acme@1", "inputs": [ROW, ROW]})
BY_ROW = Call("POST", "/predict", JSON, {"adapters": ["acme", None, "acme@1"], "inputs": [ROW] * 3})
TRAIN = Call(
    "POST",
    "/adapters",
    JSON,
    {
        "name": "mutated",
        "rank": 2,
        "alpha": 4.0,
        "data": {"inputs": [ROW] * 2, "targets": [[1.0, -1.0]] * 2},
        "training": {"method": "sgd", "loss": "mse", "epochs": 2, "seed": 1, "init": {"adapter": "acme"}},
        "publish": "never",
    },
)
FIT = Call(
    "POST",
    "/adapters",
    JSON,
    TRAIN.body | {"training": {"method": "closed_form", "ridge": 0.5, "validation_fraction": 0.5}},
)
UPLOAD = Call(
    "PUT", "/adapters/mutated", JSON, {"A": [[1.0, 0.5]] * OUT, "B": [ROW, ROW], "alpha": 2, "bias": [0, 1.5]}
)
PEFT = Call("PUT", "/adapters/mutated", JSON, {"lora_A": [ROW], "lora_B": [[1]] * OUT, "lora_alpha": 3})
ROLL_BACK = Call("PUT", "/adapters/acme/aliases/live", JSON, {"version": 1})
CONFIG = {
    "peft_type": "LORA",
    "r": 1,
    "lora_alpha": 1,
    "rank_pattern": {"linear": 1},
    "use_rslora": True,
    "bias": "none",
}
HEADER = {"__metadata__": {"format": "pt", "loraplex": "{}"}, B_NAME: B_ENTRY, A_NAME: A_ENTRY}

AWKWARD: list[Any] = [
    *(None, True, False, "", "acme", "acme@", "../x", "\ud800", "NaN", "1", "а" * 200),
    *(0, -1, 1, 2, 1.5, 2.0, -0.0, 5e-324, 1e-40, 3.4e38, 2**31, 2**63, 2**64, 10**30, 10**350, TEN_THOUSAND_DIGITS),
    *(Raw(text) for text in ("NaN", "Infinity", "-Infinity", "1e39", "1e400", "1E-400", '{"a": 1, "a": 2}')),
    *([], {}, [[]], [None], [ROW], [[1]], {"A": 1}, {"adapter": "acme"}, Raw("[" * 900 + "]" * 900)),
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "remove", "cut", "repeat"]), st.integers(0, 1 << 16), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)
SWAPS = st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from(AWKWARD)), min_size=1, max_size=2)


@pytest.fixture(scope="module")
def worker(new_folder: NewFolder) -> Iterator[httpx.Client]:
    """A worker with one adapter, and room for every job that a mutation may still be."""
    folder = new_folder("mutations")
    with serving(settings_for(folder, max_queued_jobs=10**6)) as (client, _):
        _send(client, UPLOAD._replace(path="/adapters/acme")).raise_for_status()
        yield client


def _send(client: httpx.Client, call: Call) -> httpx.Response:
    content = call.body if isinstance(call.body, bytes) else to_json(call.body)
    return client.request(call.method, call.path, content=content, headers={"Content-Type": call.kind})


def _check(client: httpx.Client, call: Call) -> None:
    """That a call is taken or refused as it should, and that what it made can be used."""
    answer = _send(client, call)
    if answer.status_code >= 400:
        problem_of(answer)
        return
    assert answer.status_code in (200, 201, 202)
    if call.path == "/adapters/mutated":
        body = {"adapter": "mutated", "inputs": [[1e3] * IN]}
        used = _send(client, PREDICT._replace(body=body))
        assert used.status_code == 200 or problem_of(used)["code"] == "output_not_finite"
        assert client.get("/adapters/mutated/download").status_code == 200


def _mutated(body: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    mutated = bytearray(body)
    for kind, where, byte in edits:
        at = where % (len(mutated) + 1)
        if kind == "flip" and at < len(mutated):
            mutated[at] ^= byte or 1
        elif kind == "insert":
            mutated.insert(at, byte)
        elif kind == "remove":
            del mutated[at : at + 1 + byte % 8]
        elif kind == "cut":
            del mutated[at:]
        else:
            mutated[at:at] = mutated[at : at + byte]
    return bytes(mutated)


def _swapped(value: Any, swaps: list[tuple[int, Any]]) -> Any:
    """`value` with some of the values within it, or itself, swapped."""
    for where, awkward in swaps:
        places = list(_places(value))
        value = _replaced(value, places[where % len(places)], awkward)
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(item, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = _replaced(value[path[0]], path[1:], new)
    return changed


JSON_CALLS = pytest.mark.parametrize(
    "call",
    [PREDICT, BY_ROW, TRAIN, FIT, UPLOAD, PEFT, ROLL_BACK],
    ids=["predict", "predict by row", "train", "fit", "upload", "upload PEFT's names", "roll back"],
)
FORMS = pytest.mark.parametrize("form", ["zipped", "in parts"])


def _upload(form: str, files: dict[str, bytes]) -> Call:
    zipped = form == "zipped"
    body = zip_of(files) if zipped else multipart_of(files)
    return Call("PUT", "/adapters/mutated", ZIP if zipped else MULTIPART, body)


@JSON_CALLS
@FEW
@given(edits=EDITS)
def test_no_byte_of_json_provokes_a_failure(
    worker: httpx.Client, call: Call, edits: list[tuple[str, int, int]]
) -> None:
    _check(worker, call._replace(body=_mutated(to_json(call.body), edits)))


@JSON_CALLS
@FEW
@given(swaps=SWAPS)
def test_no_value_in_json_provokes_a_failure(worker: httpx.Client, call: Call, swaps: list[tuple[int, Any]]) -> None:
    _check(worker, call._replace(body=_swapped(call.body, swaps)))


@FORMS
@FEW
@given(edits=EDITS)
def test_no_byte_of_an_archive_provokes_a_failure(
    worker: httpx.Client, form: str, edits: list[tuple[str, int, int]]
) -> None:
    call = _upload(form, dict(GOOD_FILES))
    _check(worker, call._replace(body=_mutated(call.body, edits)))


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
@FEW
@given(edits=EDITS)
def test_no_byte_of_peft_s_files_provokes_a_failure(
    worker: httpx.Client, file: str, edits: list[tuple[str, int, int]]
) -> None:
    _check(worker, _upload("zipped", {**GOOD_FILES, file: _mutated(GOOD_FILES[file], edits)}))


@FEW
@given(swaps=SWAPS)
def test_no_value_in_peft_s_config_provokes_a_failure(worker: httpx.Client, swaps: list[tuple[int, Any]]) -> None:
    _check(worker, _upload("in parts", {**GOOD_FILES, CONFIG_FILE: to_json(_swapped(CONFIG, swaps))}))


@FEW
@given(swaps=SWAPS)
def test_no_value_in_a_safetensors_header_provokes_a_failure(
    worker: httpx.Client, swaps: list[tuple[int, Any]]
) -> None:
    file = safetensors(to_json(_swapped(HEADER, swaps)), CONTENT)
    _check(worker, _upload("zipped", {**GOOD_FILES, TENSOR_FILE: file}))


def test_what_is_mutated_is_good_to_begin_with(worker: httpx.Client) -> None:
    whole = safetensors(to_json(HEADER), CONTENT)
    parts = _upload("in parts", {CONFIG_FILE: to_json(CONFIG), TENSOR_FILE: whole})
    archive = _upload("zipped", dict(GOOD_FILES))
    for call in (PREDICT, BY_ROW, TRAIN, FIT, UPLOAD, PEFT, ROLL_BACK, archive, parts):
        assert _send(worker, call).status_code < 300, call
