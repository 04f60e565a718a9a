"""A client of replicas that writes to a connection without waiting, and adapters whose answers are known."""

import http.client
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.support.catalog_factories import INPUTS_NI, as_upload, dense_answer, make_adapter
from tests.support.deadlines import scaled


class Sample(NamedTuple):
    """An adapter to upload, and what an answer with it must have."""

    body: bytes
    digest: str
    outputs: Any


@cache
def sample(seed: int) -> Sample:
    """The adapter of a seed."""
    adapter = make_adapter(seed)
    return Sample(json.dumps(as_upload(adapter)).encode(), adapter.digest, dense_answer(adapter).numpy())


def question(reference: str) -> bytes:
    """The body of a `POST /predict` of the inputs that `sample` has the outputs of."""
    return json.dumps({"adapter": reference, "inputs": INPUTS_NI.tolist()}).encode()


class Answer(NamedTuple):
    """Status, headers by their names in lower case, and body of an answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        """The JSON."""
        return json.loads(self.content)


class Connection:
    """A kept-alive connection to a replica, which can be written to without waiting for the answer."""

    def __init__(self, port: int, key: str | None = None, *, seconds: float = 60.0) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=scaled(seconds))
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def send(self, method: str, path: str, body: bytes | None = None, *, key: str | None = None) -> None:
        """Send a request, with another key if there is one."""
        headers = self._headers | ({"Authorization": f"Bearer {key}"} if key else {})
        self._connection.request(method, path, body, headers)

    def receive(self) -> Answer:
        """The answer to the request that was sent last."""
        answer = self._connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, headers, answer.read())

    def ask(self, method: str, path: str, body: bytes | None = None, *, key: str | None = None) -> Answer:
        """Send a request and return the answer. Errors of the connection are raised, and the next call connects."""
        try:
            self.send(method, path, body, key=key)
            return self.receive()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def connect(self) -> None:
        """Connect, if there is no connection."""
        if self._connection.sock is None:
            self._connection.connect()

    def close(self) -> None:
        """Close it."""
        self._connection.close()


def is_right(answer: Answer, digest_outputs: Mapping[str, Any]) -> bool:
    """Whether an answer has the outputs of the version that it names, by the digests of all samples."""
    outputs = digest_outputs.get(answer.body["adapter"]["digest"])
    return outputs is not None and bool(np.allclose(answer.body["outputs"], outputs, rtol=1e-4, atol=1e-4))
