"""`POST /predict`."""

import asyncio
from collections.abc import Mapping
from functools import partial

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adapters.errors import LoraplexError
from app.http.bodies import JSON, content_type
from app.http.dependencies import ServiceOf
from app.http.errors import problem
from app.service import Service
from app.serving.asgi import (
    Handed,
    Headers,
    Small,
    answer,
    check_feature_space,
    disconnected,
    read_body,
    remember,
    server_timing,
    timeout_seconds,
)
from app.serving.labelling import write_wanted
from app.serving.queue_entry import Outcome
from app.serving.request import read_quickly
from app.serving.response import (
    MEMBERS,
    most_json_bytes,
    read_question,
    write_answer,
    write_many_numbers,
    write_numbers,
)

ROUTE = "/predict"
URL = ROUTE.encode()
_JSON = JSON.encode()
_CONTENT_TYPE = (b"content-type", _JSON)
_HINT = ": send fewer rows in each request, or the binary form (POST /v2/models/{name}/infer with binary tensors)"


async def predict(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a `POST /predict`, which the edge hands over as it came."""
    headers = dict(scope["headers"])
    try:
        if headers.get(b"content-type") != _JSON:
            content_type(headers.get(b"content-type", b"").decode("latin-1"), JSON)
        check_feature_space(service, headers, scope)
        timeout = timeout_seconds(headers)
        await service.batcher.admit(timeout_seconds=timeout)
        body = await read_body(headers, receive, max_bytes=most_json_bytes(service), hint=_HINT)
        question = await read_question(service, body)
        outcome = await service.batcher.ask(
            question, timeout_seconds=timeout, gone=partial(disconnected, receive), entered=remember(scope)
        )
        if question.wanted is None:
            body = write_answer(question, outcome, await write_many_numbers(outcome.outputs_NO))
        else:
            members = await asyncio.to_thread(write_wanted, question.wanted, outcome)
            body = write_answer(question, outcome, members, MEMBERS)
    except LoraplexError as error:
        await problem(error)(scope, receive, send)
        return
    except ClientDisconnect:
        return
    await answer(send, body, _headers(outcome))


def read_small(service: Service, _url: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Small | None:
    """A small `POST /predict`, where it has the form that most have."""
    if headers.get(b"content-type") != _JSON:
        return None
    question = read_quickly(body, service.base, max_rows=service.settings.max_rows, parser=service.parser)
    if question is None:
        return None
    return Small(
        question,
        lambda outcome: (write_answer(question, outcome, write_numbers(outcome.outputs_NO)), _headers(outcome)),
        ROUTE,
    )


def _headers(outcome: Outcome) -> Headers:
    return _CONTENT_TYPE, server_timing(outcome)


async def post_predict(service: ServiceOf) -> Response:
    """One adapter for all rows (`adapter`), or each row its own (`adapters`); `null` is the bare base layer.

    Requests that wait are computed together, whatever adapters they name. `return` asks for probabilities and labels,
    and `top_k` for so many of them.
    """
    return Handed(predict, service)
