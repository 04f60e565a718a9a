"""Infer requests whose lengths lie, whose JSON is none, and whose paths lead nowhere."""

import gzip
import struct
from typing import Any

import httpx
import pytest

from tests.integration.hostile.bodies import IN, JSON, LEFT_OUT, ROW, to_json
from tests.integration.hostile.case import Case, Target, protocol_error_of
from tests.integration.hostile.conftest import MAX_BODY_BYTES, MAX_PREDICT_JSON_BYTES, MAX_ROWS
from tests.integration.hostile.test_infer import CONTENT, INFER, LENGTH, check_code, infer, named

SIZE = len(CONTENT)


def _text(size: object = SIZE, **changes: Any) -> bytes:
    """The JSON of a good request of bytes, but for what is said of their number."""
    parameters = LEFT_OUT if size is LEFT_OUT else {"binary_data_size": size}
    own = {"name": "inputs", "shape": [1, IN], "datatype": "FP32", "parameters": parameters}
    return to_json({"inputs": [own | changes]})


GOOD = _text()
IN_JSON = to_json({"inputs": [{"name": "inputs", "shape": [1, IN], "datatype": "FP32", "data": ROW}]})

LENGTHS = [
    infer(f"take {named(length)} for the header length", code, LENGTH, *says, body=GOOD + CONTENT, length=length)
    for length, code, says in (
        ("", "wrong_type", []),
        ("-1", "wrong_type", ["-1"]),
        ("+5", "wrong_type", ["+5"]),
        ("1.0", "wrong_type", ["1.0"]),
        ("1e2", "wrong_type", ["1e2"]),
        ("0x10", "wrong_type", ["0x10"]),
        ("1_0", "wrong_type", ["1_0"]),
        ("1 2", "wrong_type", ["1 2"]),
        ("one", "wrong_type", ["one"]),
        ("²", "wrong_type", [LENGTH]),
        ("9" * 5000, "wrong_type", ["999"]),
        (len(GOOD + CONTENT) + 1, "wrong_shape", [str(len(GOOD + CONTENT) + 1)]),
        (MAX_PREDICT_JSON_BYTES, "wrong_shape", [str(MAX_PREDICT_JSON_BYTES)]),
        (MAX_PREDICT_JSON_BYTES + 1, "body_too_large", [str(MAX_PREDICT_JSON_BYTES)]),
        (2**31, "body_too_large", [str(2**31)]),
    )
]
BODIES = [
    infer(title, code, *says, body=body, length=length)
    for title, code, says, body, length in (
        ("take JSON cut short", "not_json", ["not JSON"], GOOD + CONTENT, len(GOOD) - 1),
        ("take a byte of the tensor for JSON", "not_json", ["JSON"], GOOD + CONTENT, len(GOOD) + 1),
        ("take all of a binary body for JSON", "not_json", ["JSON"], GOOD + CONTENT, LEFT_OUT),
        ("take the tensor's size without its start", "missing_field", [LENGTH, "whole body is JSON"], GOOD, LEFT_OUT),
        ("take a tensor that is not there", "wrong_shape", ["0 bytes follow"], GOOD, len(GOOD)),
        ("take a tensor cut short", "wrong_shape", ["39 bytes", "40"], GOOD + CONTENT[:-1], len(GOOD)),
        ("take a tensor with a byte more", "wrong_shape", ["41 bytes"], GOOD + CONTENT + b"\0", len(GOOD)),
        ("take a second tensor", "wrong_shape", ["80 bytes"], GOOD + CONTENT * 2, len(GOOD)),
        ("take bytes after JSON", "wrong_shape", ["40 bytes follow"], IN_JSON + CONTENT, len(IN_JSON)),
        ("take an empty body", "not_json", ["JSON"], b"", LEFT_OUT),
        ("take no rows", "wrong_shape", ["0 bytes"], b"", 0),
        ("take half a row", "wrong_shape", ["20 bytes"], CONTENT[:20], 0),
        ("take JSON for rows", "wrong_shape", ["bytes"], GOOD, 0),
        ("take too many rows", "out_of_range", [f"{SIZE * (MAX_ROWS + 1)} bytes"], CONTENT * (MAX_ROWS + 1), 0),
        ("take rows of NaN", "not_finite", ["row 0, column 0"], struct.pack("<f", float("nan")) * IN, 0),
    )
]  # fmt: skip

SIZES = [
    infer(f"take {named(size)} for the tensor's size", code, "binary_data_size", body=text + CONTENT, length=len(text))
    for size, code in (
        ("40", "wrong_type"),
        (40.0, "wrong_type"),
        (True, "wrong_type"),
        (None, "wrong_type"),
        ([40], "wrong_type"),
        (-40, "wrong_shape"),
        (0, "wrong_shape"),
        (39, "wrong_shape"),
        (2**64 + 40, "wrong_shape"),
        (10**300, "wrong_shape"),
        (LEFT_OUT, "missing_field"),
    )
    for text in [_text(size)]
] + [
    infer("take data twice", "invalid_combination", "binary_data_size", body=text + CONTENT, length=len(text))
    for text in [_text(data=ROW)]
]

TEXTS = [
    infer(f"take {title}", code, *says, body=body)
    for title, code, says, body in (
        ("NUL for JSON", "not_json", ["JSON"], b"\0"),
        ("invalid UTF-8", "not_json", ["UTF-8"], IN_JSON.replace(b"FP32", b"FP\xff2")),
        ("UTF-16", "not_json", ["JSON"], IN_JSON.decode().encode("utf-16")),
        ("a mark of the byte order", "not_json", ["JSON"], b"\xef\xbb\xbf" + IN_JSON),
        ("JSON with a comma too many", "not_json", ["JSON"], IN_JSON.replace(b"]}", b",]}")),
        ("JSON with more after it", "not_json", ["JSON"], IN_JSON + b"{}"),
        ("lists in lists", "not_json", ["deep"], b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("inputs twice", "duplicate_key", ["inputs"], IN_JSON[:-1] + b"," + IN_JSON[1:]),
        ("shape twice", "duplicate_key", ["shape"], IN_JSON.replace(b'"shape"', b'"shape": [2, 10], "shape"')),
        ("a parameter twice", "duplicate_key", ["'p'"], IN_JSON[:-1] + b', "parameters": {"p": 1, "p": 1}}'),
        ("too much JSON", "body_too_large", ["binary"], IN_JSON + b" " * MAX_PREDICT_JSON_BYTES),
        ("too much of everything", "body_too_large", ["bytes"], IN_JSON + b" " * MAX_BODY_BYTES),
    )
] + [
    infer("take a shape twice before bytes", "duplicate_key", "shape", body=text + CONTENT, length=len(text))
    for text in [GOOD.replace(b'"shape"', b'"shape": [2, 10], "shape"')]
]

HEADERS = [
    infer(f"take {encoding} bytes", "unsupported_media_type", encoding, body=gzip.compress(IN_JSON),
          headers={"Content-Encoding": encoding})
    for encoding in ("gzip", "deflate", "br", "identity, gzip", "GZIP")
] + [
    infer("take rows of another encoder", "feature_space_mismatch", "other@1", body=IN_JSON,
          headers={"X-Feature-Space": "other@1"})
]  # fmt: skip

PATHS = [
    infer(f"infer with {path[:60]}", code, *says, body=IN_JSON, path=f"/v2/models/{path}")
    for path, code, says in (
        ("nobody/infer", "adapter_not_found", ["nobody"]),
        ("ACME/infer", "adapter_not_found", ["ACME"]),
        ("draft/infer", "adapter_not_live", ["draft@1"]),
        ("draft/versions/2/infer", "version_not_found", ["2"]),
        ("acme/versions/3/infer", "version_not_found", ["3"]),
        ("acme/versions/0/infer", "version_not_found", ["0"]),
        ("acme/versions/01/infer", "version_not_found", ["01"]),
        ("acme/versions/-1/infer", "version_not_found", ["-1"]),
        ("acme/versions/live/infer", "version_not_found", ["live"]),
        ("acme/versions/%C2%B2/infer", "version_not_found", ["²"]),
        (f"acme/versions/{'9' * 5000}/infer", "version_not_found", ["more than 100 digits"]),
        ("__base__/versions/2/infer", "version_not_found", ["2"]),
        ("foreign/infer", "base_mismatch", ["foreign@1"]),
        ("elsewhere/infer", "feature_space_mismatch", ["another-encoder@2"]),
        ("acme@1/infer", "invalid_name", ["acme@1"]),
        ("__Base__/infer", "invalid_name", ["__Base__"]),
        ("../infer", "invalid_name", [".."]),
        ("%2e%2e/infer", "invalid_name", [".."]),
        ("acme%00/infer", "invalid_name", ["acme\0"]),
        ("acme%0A/infer", "invalid_name", ["acme\n"]),
        ("acme%FF/infer", "invalid_name", ["acme"]),
        (f"{'x' * 5000}/infer", "invalid_name", ["xxxx"]),
        ("%D0%B0cme/infer", "invalid_name", ["аcme"]),
        ("a%2Fb/infer", "route_not_found", ["a/b"]),
        ("infer", "method_not_allowed", ["POST"]),
        ("/infer", "route_not_found", ["/v2/models//infer"]),
        ("acme/versions//infer", "version_not_found", ["version"]),
        ("acme/versions/1/2/infer", "route_not_found", ["1/2"]),
        ("acme/infer/", "route_not_found", ["infer/"]),
        ("acme/versions/infer", "method_not_allowed", ["versions/infer"]),
        ("acme/infer%0A", "route_not_found", ["acme/infer"]),
        ("acme/versions/1/infer%0A", "route_not_found", ["1/infer"]),
    )
]


@pytest.mark.parametrize("case", LENGTHS + BODIES + SIZES + TEXTS + HEADERS + PATHS, ids=lambda case: case.name)
def test_infer_refuses_to(target: Target, case: Case) -> None:
    target.refuses_in_protocol(case)


@pytest.mark.parametrize("case", BODIES + SIZES, ids=lambda case: case.name)
def test_the_log_has_the_code_of_who_tries_to(case: Case) -> None:
    check_code(case)


def test_too_much_json_is_refused_although_nobody_says_how_much(target: Target) -> None:
    body = IN_JSON + b" " * MAX_PREDICT_JSON_BYTES
    target.refuses_in_protocol(infer("take it", "body_too_large", "bytes", body=body, chunked=True))


def test_a_header_length_that_is_there_twice_is_refused(target: Target) -> None:
    headers = [("Content-Type", JSON), (LENGTH, str(len(GOOD))), (LENGTH, str(len(GOOD)))]
    answer = target.client.post(INFER, content=GOOD + CONTENT, headers=headers)
    assert answer.status_code == 422
    assert LENGTH in protocol_error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", INFER, 405, "GET"),
        ("POST", "/v2", 405, "POST"),
        ("POST", "/v2/models/acme", 405, "POST"),
        ("GET", "/v2/nothing", 404, "nothing"),
        ("GET", "/v2/models", 404, "/v2/models"),
        ("GET", "/v2/models/stats", 404, "stats"),
        ("GET", "/v2/models/acme/stats", 404, "stats"),
        ("GET", "/v2/models/acme/trace/setting", 404, "trace"),
        ("GET", "/v2/systemsharedmemory/status", 404, "systemsharedmemory"),
        ("POST", "/v2/repository/models/acme/load", 404, "load"),
        ("POST", "/v2/repository/models/acme/unload", 404, "unload"),
        ("GET", "/v2/models/nobody/ready", 404, "nobody"),
        ("GET", "/v2/models/foreign/ready", 409, "foreign@1"),
        ("GET", "/v2/models/elsewhere", 409, "another-encoder@2"),
        ("GET", "/v2/models/acme@1/config", 422, "acme@1"),
        ("GET", "/v2/models/acme/versions/9", 404, "9"),
        ("GET", "/v2/models/__base__/versions/2/ready", 404, "2"),
    ],
)
def test_every_error_of_the_protocol_is_one_text(
    target: Target, method: str, path: str, status: int, says: str
) -> None:
    answer = target.client.request(method, path)
    assert answer.status_code == status
    assert says in protocol_error_of(answer)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"[]", 422, "object"),
        (b'{"ready": 1}', 422, "ready"),
        (b'{"ready": "true"}', 422, "ready"),
        (b'{"Ready": true}', 422, "Ready"),
        (b'{"ready": true, "ready": false}', 422, "ready"),
        (b"{", 400, "JSON"),
        (b" " * 5000 + b"{}", 413, "4096"),
    ],
)
def test_the_index_refuses_a_bad_body(target: Target, body: bytes, status: int, says: str) -> None:
    answer = target.client.post("/v2/repository/index", content=body)
    assert answer.status_code == status
    assert says in protocol_error_of(answer)


def test_a_refused_method_comes_with_those_that_are_taken(target: Target) -> None:
    assert target.client.delete(INFER).headers["allow"] == "POST"
    assert target.client.delete("/v2/repository/index").headers["allow"] == "GET, POST"


def test_good_requests_are_answered_after_all_that(target: Target) -> None:
    def ask(body: bytes, **headers: str) -> httpx.Response:
        return target.client.post(INFER, content=body, headers=headers).raise_for_status()

    numbers = ask(IN_JSON).json()["outputs"][0]["data"]
    binary = ask(GOOD + CONTENT, **{LENGTH: str(len(GOOD))}).json()["outputs"][0]["data"]
    assert (
        numbers
        == binary
        == target.client.post("/predict", json={"adapter": "acme", "inputs": [ROW]}).json()["outputs"][0]
    )
