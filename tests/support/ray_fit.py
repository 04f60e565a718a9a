"""Process that fits a request on a Ray cluster or in a child process: `python -m tests.support.ray_fit ADDRESS FOLDER`.

A process of its own, because ray reads the variables of the cluster's token when it is imported. An empty ADDRESS is a
child process. The folder has `process.json` and `request.json`. It prints the digest of each adapter by its position.
"""

import json
import sys
from pathlib import Path

from adapters.lora.adapter import digest_of
from adapters.training.execution.fit_client import Done, Failed, FitRequest, Fitter, FitterDied, Note, Outcomes
from adapters.training.execution.fit_task import FitProcess
from tests.support.service import eventually


def main() -> None:
    """Fit, and print."""
    address, folder = sys.argv[1], Path(sys.argv[2])
    process = FitProcess.from_json((folder / "process.json").read_text())
    request = FitRequest.from_json(json.loads((folder / "request.json").read_text()))
    fitter: Fitter = process.open()
    if address:
        from adapters.training.execution.ray_fitter import RayFitter

        fitter = RayFitter(process, address=address)
    eventually(lambda: _is_ready(fitter), what="a connection")
    fitter.begin(request)
    digests, frame = dict[int, str](), None
    while not isinstance(frame, Done | Failed):
        frame = fitter.next_frame(1.0)
        if isinstance(frame, Outcomes):
            digests |= {
                one.position: digest_of(content) for one, content in zip(frame.trained, frame.contents, strict=True)
            }
        elif isinstance(frame, Note):
            print(frame.text, file=sys.stderr)
    fitter.kill()
    error = dict(frame.error) if isinstance(frame, Failed) else None
    print(json.dumps({"digests": digests, "error": error}))


def _is_ready(fitter: Fitter) -> bool:
    """Return whether the cluster is ready. Like a trainer, connect again to one that refuses while it starts."""
    try:
        return fitter.is_ready(1.0)
    except FitterDied:
        fitter.kill()
        return False


if __name__ == "__main__":
    main()
