"""What trainings take of memory: each in a process of its own, forked from one that has only loaded torch.

Cases come on standard input as JSON, one a line: the path of the data, the layer's shape, the spec, and how much
memory the process may use. The most that each used of its own goes out, one line each.
"""

import json
import os
import resource
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.comparison import ComparedVersion, compare_versions
from adapters.training.execution import fit_child as fit_process  # noqa: F401 - what a process that fits has loaded
from adapters.training.fit import fit
from adapters.training.fleet import fit_fleet
from adapters.training.settings import TrainingSpec

_SECONDS_BETWEEN_LOOKS = 0.001


def main() -> None:
    """Measure each case."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        receiving, sending = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiving)
            try:
                answer = _measured(json.loads(line))
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(sending, json.dumps(answer).encode())
            os._exit(0)
        os.close(sending)
        with os.fdopen(receiving) as pipe:
            print(pipe.read(), flush=True)
        os.waitpid(child, 0)


def _measured(case: Mapping[str, Any]) -> dict[str, Any]:
    watch = _Watch()
    limit = case["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    I, O = case["in_features"], case["out_features"]
    base = BaseLayer(torch.randn(O, I), torch.zeros(O), source="", fingerprint="sha256:", weight_norm=1.0)
    spec = TrainingSpec.from_json(case["spec"])
    data = TrainingData.open(Path(case["path"]))
    if case["is_evaluation"]:
        labels = tuple(range(O))
        # The outputs of the base layer are matched in another order.
        versions = [ComparedVersion(reference=None), ComparedVersion(reference=None, labels=labels[::-1])]
        compare_versions(base, data, spec, versions, labels=labels)
    elif data.groups_N is not None:
        for outcomes in fit_fleet(base, data, spec):
            assert all(outcome.error is None for outcome in outcomes)
    else:
        fit(base, data, replace(spec, keep_statistics=spec.is_exact))
    return watch.end()


class _Watch(threading.Thread):
    """Looks at how much private, writable memory the process has: what RLIMIT_DATA limits."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self.before = self.most = _private_bytes()
        self.start()

    def run(self) -> None:
        """Until `end`."""
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            self.most = max(self.most, _private_bytes())

    def end(self) -> dict[str, int]:
        """What it was at the beginning, and the most that it was."""
        self._over.set()
        self.join()
        return {"before": self.before, "most": max(self.most, _private_bytes())}


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))


if __name__ == "__main__":
    main()
