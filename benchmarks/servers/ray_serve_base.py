"""The base layer alone behind Ray Serve, with `@serve.batch`; one replica, its default proxy."""

import os
import signal
import threading
from typing import Any

import numpy as np
import torch

from benchmarks.servers.layer import arguments, make_linear

# Nothing is sent out, and no token is written into the home folder.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Linear:
    """One layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self._linear = make_linear(in_features, out_features)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        question = await request.json()
        return {"outputs": await self._forward(np.asarray(question["inputs"], dtype=np.float32))}

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.001)
    async def _forward(self, inputs: list[Any]) -> list[list[list[float]]]:
        with torch.inference_mode():
            outputs = self._linear(torch.from_numpy(np.concatenate(inputs))).tolist()
        return [[row] for row in outputs]


def main() -> None:
    """Serve until SIGTERM."""
    given = arguments()
    done = threading.Event()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=given.folder)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: done.set())
    serve.start(http_options={"host": "127.0.0.1", "port": given.port}, logging_config={"enable_access_log": False})
    serve.run(Linear.bind(given.in_features, given.out_features), route_prefix="/predict")
    done.wait()
    ray.shutdown()


if __name__ == "__main__":
    main()
