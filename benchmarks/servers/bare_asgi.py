"""The limit: a bare ASGI application, orjson and numpy, and one GEMM a request. No router, no checks, no adapters.

It reads the binary form of the Open Inference Protocol too: raw float32 behind a JSON header that it skips.
"""

from typing import Any

import numpy as np
import orjson
import torch

from benchmarks.servers.layer import arguments, make_linear, run

_HEADER_LENGTH = b"inference-header-content-length"


class BareApp:
    """An ASGI application over one layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        linear = make_linear(in_features, out_features)
        self._in_features = in_features
        self._weight, self._bias = linear.weight.detach(), linear.bias.detach()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        head = next((value for name, value in scope["headers"] if name == _HEADER_LENGTH), None)
        if head is None:
            inputs = np.asarray(orjson.loads(body)["inputs"], dtype=np.float32)
            answer = orjson.dumps({"outputs": self._forward(inputs)}, option=orjson.OPT_SERIALIZE_NUMPY)
            headers = [(b"content-type", b"application/json")]
        else:
            inputs = np.frombuffer(body, dtype="<f4", offset=int(head)).reshape(-1, self._in_features)
            answer = self._forward(inputs).tobytes()
            headers = [(b"content-type", b"application/octet-stream"), (_HEADER_LENGTH, b"0")]
        headers.append((b"content-length", str(len(answer)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _forward(self, inputs: Any) -> Any:
        return torch.nn.functional.linear(torch.from_numpy(inputs), self._weight, self._bias).numpy()


if __name__ == "__main__":
    given = arguments()
    run(BareApp(given.in_features, given.out_features), given.port)
