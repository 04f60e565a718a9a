"""What a client receives of an answer at once."""

import json
import socket

import pytest

from tests.support.service import ServiceProcess

pytestmark = pytest.mark.slow

ANSWERS = 200
BODY = json.dumps({"adapter": None, "inputs": [[1.0] * 64]}).encode()
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUEST = b"%bContent-Length: %d\r\n\r\n" % (HEAD, len(BODY))


def _is_whole(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(body) == int(length.partition(b":")[2])


def test_the_head_and_the_body_of_an_answer_arrive_together(service: ServiceProcess) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        for _ in range(ANSWERS):
            client.sendall(REQUEST + BODY)
            # Written apart, they come apart as often as the client is quick: then what follows is out of step.
            assert _is_whole(client.recv(2**16))
