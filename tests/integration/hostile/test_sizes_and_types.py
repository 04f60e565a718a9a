"""Bodies that are too large, with and without saying so, and content types that a call does not take."""

from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from tests.conftest import Serve
from tests.integration.hostile.bodies import (
    GOOD_FILES,
    IN,
    JSON,
    MULTIPART,
    OUT,
    ROW,
    ZIP,
    multipart_of,
    to_json,
    zip_of,
)
from tests.integration.hostile.case import Case, Target, problem_of
from tests.integration.hostile.conftest import MAX_BODY_BYTES, MAX_PREDICT_JSON_BYTES
from tests.support.catalog_factories import stored_files

PREDICT = ("POST", "/predict", to_json({"adapter": None, "inputs": [ROW]}))
TRAIN = ("POST", "/adapters", to_json({"name": "fresh", "rank": 1, "data": {"inputs": [ROW], "targets": [[1] * OUT]}}))
UPLOAD = ("PUT", "/adapters/fresh", to_json({"A": [[1]] * OUT, "B": [[1] * IN]}))
ROLL_BACK = ("PUT", "/adapters/acme/aliases/live", b'{"version": 1}')


def _case(
    title: str, call: tuple[str, str, bytes], code: str, *says: str, kind: str | None = JSON, **more: Any
) -> Case:
    method, path, body = call
    headers = {} if kind is None else {"Content-Type": kind}
    return Case(name=title, method=method, path=path, code=code, says=says, body=body, headers=headers, **more)


def _padded(call: tuple[str, str, bytes], size: int) -> tuple[str, str, bytes]:
    """A good call whose body is `size` bytes long."""
    method, path, body = call
    return method, path, body + b" " * (size - len(body))


KINDS = [
    _case(f"{title} {name}", call, "unsupported_media_type", kind or "missing", kind=kind, field="Content-Type")
    for title, call in {
        "predict from": PREDICT,
        "train from": TRAIN,
        "upload": UPLOAD,
        "roll back by": ROLL_BACK,
    }.items()
    for name, kind in {
        "nothing said": None,
        "text": "text/plain",
        "a form": "application/x-www-form-urlencoded",
        "nearly JSON": "application/jsonx",
        "problem JSON": "application/problem+json",
        "JSON lines": "application/jsonl",
        "text of JSON": "text/json",
        "anything": "*/*",
        "bytes": "application/octet-stream",
        "a pickle": "application/x-pickle",
        "half a type": "application",
        "two types": "application/json, text/plain",
        "a type of 300 characters": "x/" + "y" * 298,
    }.items()
] + [
    _case("predict from a zip", PREDICT, "unsupported_media_type", ZIP, kind=ZIP),
    _case("predict from parts", PREDICT, "unsupported_media_type", "multipart/form-data", kind=MULTIPART),
    _case("train from a zip", TRAIN, "unsupported_media_type", ZIP, kind=ZIP),
    _case("roll back by parts", ROLL_BACK, "unsupported_media_type", "multipart/form-data", kind=MULTIPART),
    _case(
        "upload a zip by another name",
        UPLOAD,
        "unsupported_media_type",
        kind="application/x-zip-compressed",
        field="Content-Type",
    ),
    _case(
        "upload mixed parts",
        UPLOAD,
        "unsupported_media_type",
        "multipart/mixed",
        kind="multipart/mixed; boundary=frontier",
    ),
    _case("upload JSON as a zip", UPLOAD, "invalid_archive", "zip", kind=ZIP),
    _case("upload JSON in parts", UPLOAD, "invalid_upload", "body", kind=MULTIPART),
    _case("upload a zip as JSON", ("PUT", "/adapters/fresh", zip_of(GOOD_FILES)), "not_json", "the body"),
    _case("upload parts as JSON", ("PUT", "/adapters/fresh", multipart_of(GOOD_FILES)), "not_json", "the body"),
    _case(
        "upload parts as a zip",
        ("PUT", "/adapters/fresh", multipart_of(GOOD_FILES)),
        "invalid_archive",
        "zip",
        kind=ZIP,
    ),
]

SIZES = [
    _case(
        f"{title}, {'in pieces' if chunked else 'at once'}",
        _padded(call, size),
        "body_too_large",
        *says,
        kind=kind,
        chunked=chunked,
    )
    for chunked in (False, True)
    for title, call, size, kind, says in (
        (
            "predict from a byte too many",
            PREDICT,
            MAX_PREDICT_JSON_BYTES + 1,
            JSON,
            (str(MAX_PREDICT_JSON_BYTES), "binary"),
        ),
        ("predict from more than any body may have", PREDICT, MAX_BODY_BYTES + 1, JSON, ("bytes",)),
        ("train from a byte too many", TRAIN, MAX_BODY_BYTES + 1, JSON, (str(MAX_BODY_BYTES),)),
        ("upload a byte too many", UPLOAD, MAX_BODY_BYTES + 1, JSON, (str(MAX_BODY_BYTES),)),
        ("upload a zip of a byte too many", UPLOAD, MAX_BODY_BYTES + 1, ZIP, (str(MAX_BODY_BYTES),)),
        (
            "upload parts of a byte too many",
            ("PUT", "/adapters/fresh", multipart_of(GOOD_FILES | {"README.md": b"x" * MAX_BODY_BYTES})),
            0,
            MULTIPART,
            (str(MAX_BODY_BYTES),),
        ),
        ("roll back by a byte too many", ROLL_BACK, MAX_BODY_BYTES + 1, JSON, (str(MAX_BODY_BYTES),)),
        ("upload five times too much", UPLOAD, 5 * MAX_BODY_BYTES, JSON, (str(MAX_BODY_BYTES),)),
    )
]


@pytest.mark.parametrize("case", KINDS + SIZES, ids=lambda case: case.name)
def test_it_is_refused_to(target: Target, case: Case) -> None:
    target.refuses(case)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_exactly_the_limit_is_taken(target: Target, chunked: bool) -> None:
    case = _case("it", _padded(PREDICT, MAX_PREDICT_JSON_BYTES), "body_too_large", "bytes", chunked=chunked)
    assert target.send(case).status_code == 200


def test_a_length_of_terabytes_is_answered_before_a_byte_of_it_came(target: Target) -> None:
    url = target.client.base_url
    connection = HTTPConnection(url.host, url.port, timeout=20)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", JSON)
    connection.putheader("Content-Length", str(10**13))
    connection.endheaders()
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    members = problem_of(httpx.Response(answer.status, headers=headers, content=answer.read()))
    connection.close()
    assert members["code"] == "body_too_large"
    assert headers["connection"] == "close"


def test_a_job_past_the_queue_s_room_is_refused_until_later(serve: Serve) -> None:
    client, service = serve(max_queued_jobs=1)
    method, path, body = TRAIN
    answers = [client.request(method, path, content=body, headers={"Content-Type": JSON}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 429]
    assert problem_of(answers[1])["code"] == "queue_full"
    assert int(answers[1].headers["retry-after"]) >= 1
    assert len(stored_files(service.settings.data_dir)) == 1
