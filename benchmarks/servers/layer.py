"""The one linear layer that every peer serves, and how a peer is started: `python -m benchmarks.servers.NAME`."""

# I in_features · O out_features
import argparse
from typing import Any

import torch
import uvicorn
from torch import nn

SEED = 42


def arguments() -> argparse.Namespace:
    """Parse the arguments of a peer: port, shape of the layer, and number and rank of adapters if it has any."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--in-features", type=int, required=True)
    parser.add_argument("--out-features", type=int, required=True)
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--folder", default="", help="for temporary files")
    return parser.parse_args()


def make_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return the layer that loraplex calls `random:IN,OUT,42`; use one thread and no gradients."""
    torch.set_num_threads(1)
    linear = nn.Linear(in_features, out_features)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out_features, in_features, generator=generator))
        linear.bias.zero_()
    return linear.requires_grad_(False).eval()


def run(app: Any, port: int) -> None:
    """One worker process on uvicorn with uvloop and httptools, without an access log."""
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        backlog=2048,
        # As loraplex: the paced client's connections rest for longer than uvicorn's 5 s.
        timeout_keep_alive=75,
    )
