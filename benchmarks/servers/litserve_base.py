"""The base layer alone behind LitServe, with its dynamic batching."""

from typing import Any

import litserve as ls
import numpy as np
import torch

from benchmarks.servers.layer import arguments, make_linear


class LinearAPI(ls.LitAPI):
    """One layer."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(**options)
        self._shape = in_features, out_features

    def setup(self, device: str) -> None:
        """Load the layer in the worker process."""
        self.linear = make_linear(*self._shape).to(device)

    def decode_request(self, request: dict[str, Any]) -> Any:
        """One request's rows."""
        return np.asarray(request["inputs"], dtype=np.float32)

    def batch(self, inputs: list[Any]) -> Any:
        """Return the rows of all requests; every request here has one."""
        return np.concatenate(inputs)

    def predict(self, x: Any) -> Any:
        """One GEMM for the whole batch."""
        with torch.inference_mode():
            return self.linear(torch.from_numpy(x)).numpy()

    def unbatch(self, output: Any) -> Any:
        """Return one row for each request."""
        return list(output[:, None, :])

    def encode_response(self, output: Any) -> dict[str, Any]:
        """One answer."""
        return {"outputs": output.tolist()}


if __name__ == "__main__":
    given = arguments()
    api = LinearAPI(given.in_features, given.out_features, max_batch_size=64, batch_timeout=0.001)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=given.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
