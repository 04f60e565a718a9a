"""Make a data folder with the code of an earlier commit, for the test that the current code opens it.

    python -m scripts.make_data_folder [COMMIT]

The service of COMMIT runs with the packages of this environment. It is used over HTTP until the folder holds every kind
of thing that a folder can hold, and killed while one adapter and one fleet are half trained and other jobs are queued.
The same code then answers from a copy of the folder and finishes the jobs in it. `ARCHIVE` gets the killed folder, the
base layer, and what the code of COMMIT answered and made of the jobs.
"""

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save, save_file

from benchmarks.processes import ROOT, Server, get, start_service

COMMIT = "152316c"
ARCHIVE = ROOT / "tests" / "acceptance" / "data_folder.tar.xz"
DEADLINE_SECONDS = 120.0
IN, OUT = 6, 3
LABELS = ["cat", "dog", "horse"]
PUBLISHED_BY_JOBS = ("half@1", "half-0@1", "half-599@1", "queued-exact@1", "acme", "queued-t0@1", "exact@3")
ENDED = ("succeeded", "failed", "cancelled")
SETTINGS: Mapping[str, Any] = {"trainers": 2, "lease_seconds": 1, "feature_space": "made-up@1"}
"""A short lease makes checkpoints frequent: there is one every third of it."""

Json = dict[str, Any]


def main() -> None:
    """Make the archive."""
    parser = argparse.ArgumentParser(description="Make a data folder with the code of an earlier commit.")
    parser.add_argument("commit", nargs="?", default=COMMIT)
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory(prefix="loraplex-folder-") as name:
        work = Path(name)
        code = _check_out(commit, work / "code")
        _write_base(work / "base.safetensors")
        with _serve(code, work / "data") as client:
            _upload(client)
            _train(client)
            jobs = _start_jobs(client, work / "data")
        shutil.copytree(work / "data", work / "copy")
        recorded: Json = {"commit": commit, "settings": dict(SETTINGS)}
        with _serve(code, work / "copy", trainers=0) as client:
            recorded |= {
                "names": _names(client),
                "answers": _answers(client),
                "predictions": _predictions(client, _references(client)),
            }
        with _serve(code, work / "copy") as client:
            recorded["jobs"] = {kind: _ended(client, job_id) for kind, job_id in jobs.items()}
            recorded["predictions_after_jobs"] = _predictions(client, PUBLISHED_BY_JOBS)
        _write_archive(work, recorded)
    print(f"{ARCHIVE.relative_to(ROOT)}: {ARCHIVE.stat().st_size:,} bytes")


def _check_out(commit: str, folder: Path) -> Path:
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _write_base(path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {"weight": generator.normal(size=(OUT, IN)), "bias": generator.normal(size=OUT)}
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, path)


@contextmanager
def _serve(code: Path, folder: Path, **settings: Any) -> Iterator[httpx.Client]:
    """Run the service of the code in `code` on `folder`, and kill all its processes at the end."""
    server = start_service(folder, str(folder.parent / "base.safetensors"), root=code, **{**SETTINGS, **settings})
    try:
        server.wait_until(get("/readyz"))
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
            yield client
    finally:
        _kill(server)


def _kill(server: Server) -> None:
    """Kill the processes as a power failure would: all at one moment."""
    server.pause()
    for process in server.tree():
        process.kill()


def _upload(client: httpx.Client) -> None:
    """Fill the catalogue with uploads of each form, rolled back, deleted and made again, and with data sets."""
    variants: list[Json] = [{}, {"labels": LABELS}, {"alpha": 3.0}, {"labels": [7, 8]}]
    for seed, more in enumerate(variants):
        _put(client, "/adapters/acme", json={**_factors(seed, rank=2), **more})
    _put(client, "/adapters/acme/aliases/live", json={"version": 2})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": ["linear"]}
    files = {
        "adapter_model.safetensors": save(_peft_tensors(7, rank=2)),
        "adapter_config.json": json.dumps(config).encode(),
    }
    _put(client, "/adapters/peft", files={name: (name, content) for name, content in files.items()})
    _put(client, "/adapters/again", json=_factors(8, rank=1))
    client.delete("/adapters/again").raise_for_status()
    _put(client, "/adapters/again", json=_factors(9, rank=1))
    _put(client, "/adapters/gone", json=_factors(10, rank=1))
    client.delete("/adapters/gone").raise_for_status()
    for seed in (1, 2):
        _put(client, "/datasets/tickets", content=_table(200, seed=seed), headers={"content-type": "text/csv"})
    _put(client, "/datasets/gone", content=_table(5, seed=3), headers={"content-type": "text/csv"})
    client.delete("/datasets/gone").raise_for_status()


def _train(client: httpx.Client) -> None:
    """Train with each method, update, and leave jobs that failed, were cancelled and were reverted."""
    exact = {"method": "closed_form", "ridge": 0.5, "keep_statistics": True}
    data = {"dataset": "tickets@1", "inputs": {"prefix": "e_"}, "targets": {"prefix": "y_"}}
    split = {"by": "group", "fraction": 0.2}
    _succeed(client, name="exact", rank=2, data={**data, "group": "tenant"}, split=split, training=exact)
    update = {"add": {**data, "dataset": "tickets@2"}, "forget": _rows(0, table=1, rows=3)}
    assert _ended(client, _queue(client, "/adapters/exact/update", update))["status"] == "succeeded"
    prior = {**exact, "prior": {"adapter": "acme"}, "keep_statistics": False, "ridge": "auto", "bias": True}
    _succeed(client, name="shrunk", rank="auto", data=_rows(11, rows=120), training=prior)
    classes = {"dataset": "tickets", "inputs": {"prefix": "e_"}, "targets": {"column": "topic"}, "labels": LABELS}
    stopping = {"loss": "cross_entropy", "epochs": 30, "class_weights": "balanced", "early_stopping": {"patience": 3}}
    gate = {"when": "if_better", "metric": "accuracy", "min_rows": 10}
    split = {"by": "rows", "fraction": 0.25, "stratify": True}
    _succeed(client, name="gradient", rank=2, data=classes, split=split, training=stopping, publish=gate)
    started = {"init": {"adapter": "acme@1"}, "epochs": 3, "schedule": "cosine", "warmup_steps": 2, "clip_norm": 1.0}
    _succeed(client, name="started", rank=2, data=_rows(12, rows=20), training={"method": "sgd", **started})
    fleet = {**data, "group_by": "tenant"}
    _succeed(client, name="fleet-{tenant}", rank=1, data=fleet, training={"method": "closed_form", "ridge": 1.0})
    moved = _succeed(client, name="fleet-{tenant}", rank=1, data=fleet, training={"epochs": 2})
    client.post(f"/jobs/{moved['id']}/revert").raise_for_status()
    diverging = {"method": "sgd", "learning_rate": 1e6, "epochs": 100}
    failed = _queue(
        client, "/adapters", {"name": "failed", "rank": 1, "data": _rows(13, rows=20), "training": diverging}
    )
    assert _ended(client, failed)["status"] == "failed"
    cancelled = _queue(client, "/adapters", _long_training("cancelled"))
    client.post(f"/jobs/{cancelled}/cancel").raise_for_status()


def _start_jobs(client: httpx.Client, folder: Path) -> dict[str, str]:
    """Queue jobs of each kind, and return when two of them are half done, with the jobs' ids."""
    exact = {"method": "closed_form", "ridge": 0.5, "keep_statistics": True}
    groups = [number % 600 for number in range(3000)]
    fleet = {"name": "half-{group}", "rank": 1, "data": {**_rows(20, rows=3000), "groups": groups}}
    half = {
        "half": _queue(client, "/adapters", _long_training("half")),
        "half-fleet": _queue(client, "/adapters", {**fleet, "training": {"epochs": 200, "batch_size": 1}}),
    }
    _wait_for(lambda: _get(client, f"/jobs/{half['half']}")["status"] == "running", "the start of a training")
    data = {"dataset": "tickets@2", "inputs": {"prefix": "e_"}, "targets": {"prefix": "y_"}}
    gate = {"when": "if_better", "min_rows": 10}
    open_settings = {"learning_rate": "auto", "epochs": 5}
    queued: dict[str, Json] = {
        "exact": {"name": "queued-exact", "rank": 2, "data": data, "training": exact},
        "gradient": {"name": "acme", "rank": "auto", "data": _rows(21, rows=100), "training": open_settings},
        "fleet": {
            "name": "queued-{tenant}",
            "rank": 1,
            "data": {**data, "group_by": "tenant"},
            "training": {"epochs": 3},
        },
    }
    queued["gradient"] |= {"publish": gate, "split": {"by": "rows", "fraction": 0.2}}
    jobs = {kind: _queue(client, "/adapters", body) for kind, body in queued.items()}
    jobs["update"] = _queue(client, "/adapters/exact/update", {"forget": _rows(0, table=2, rows=4)})

    def is_half_done() -> bool:
        progress = _get(client, f"/jobs/{half['half-fleet']}")["progress"]
        has_checkpoint = any((folder / "checkpoints").glob(f"{half['half']}.*.safetensors"))
        return has_checkpoint and 0 < progress.get("adapters", {}).get("published", 0) < 600

    _wait_for(is_half_done, "a checkpoint and the first adapters of a fleet")
    return half | jobs


def _long_training(name: str) -> Json:
    """Return a training of a few seconds."""
    training = {"method": "adamw", "batch_size": 8, "epochs": 250, "schedule": "linear"}
    return {"name": name, "rank": 2, "data": _rows(14, rows=160), "training": training}


def _answers(client: httpx.Client) -> Json:
    """Return what the service says of each thing that it holds, by path."""
    paths = ["/datasets/tickets", "/datasets/tickets/versions/1", "/datasets/tickets/preview?limit=2"]
    paths += [f"/jobs/{job['id']}" for job in _get(client, "/jobs?limit=100")["data"]]
    paths += [f"/adapters/{name}" for name in _names(client)]
    paths += [f"/adapters/{name}/versions/{version}" for name, version in _versions(client)]
    return {path: _get(client, path) for path in paths}


def _names(client: httpx.Client) -> list[str]:
    """Return the names of the adapters, without those of the half-trained fleet."""
    names = (adapter["name"] for adapter in _get(client, "/adapters?limit=1000")["data"])
    return [name for name in names if not name.startswith("half-")]


def _versions(client: httpx.Client) -> list[tuple[str, int]]:
    """Return the versions of those adapters, oldest first."""
    versions = {name: _get(client, f"/adapters/{name}/versions")["data"] for name in _names(client)}
    return [(name, version["version"]) for name, listed in versions.items() for version in reversed(listed)]


def _references(client: httpx.Client) -> list[str | None]:
    """Return the base layer (null), each name and each version."""
    return [None, *_names(client), *(f"{name}@{version}" for name, version in _versions(client))]


def _predictions(client: httpx.Client, references: Sequence[str | None]) -> list[Json]:
    """Return requests for the same rows from each adapter, with their answers."""
    inputs = np.random.default_rng(99).normal(size=(4, IN)).round(3).tolist()
    requests: list[Json] = [{"adapter": reference, "inputs": inputs} for reference in references]
    requests.append({"adapter": "acme@2", "inputs": inputs, "return": ["labels", "probabilities"], "top_k": 2})
    return [{"request": each, "answer": _sent(client.post("/predict", json=each)).json()} for each in requests]


def _ended(client: httpx.Client, job_id: str) -> Json:
    """Wait for the end of a job, and return it."""
    _wait_for(lambda: _get(client, f"/jobs/{job_id}")["status"] in ENDED, f"the end of job {job_id}")
    return {key: value for key, value in _get(client, f"/jobs/{job_id}").items() if key != "history"}


def _succeed(client: httpx.Client, **body: Any) -> Json:
    job = _ended(client, _queue(client, "/adapters", body))
    assert job["status"] == "succeeded", job
    return job


def _queue(client: httpx.Client, path: str, body: Json) -> str:
    job_id: str = _sent(client.post(path, json=body)).json()["id"]
    return job_id


def _put(client: httpx.Client, path: str, **request: Any) -> None:
    _sent(client.put(path, **request))


def _get(client: httpx.Client, path: str) -> Any:
    return _sent(client.get(path)).json()


def _sent(response: httpx.Response) -> httpx.Response:
    assert response.is_success, response.text
    return response


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen in {DEADLINE_SECONDS} s"
        time.sleep(0.02)


def _factors(seed: int, *, rank: int) -> Json:
    generator = np.random.default_rng(seed)
    a_OR, b_RI = generator.normal(size=(OUT, rank)), generator.normal(size=(rank, IN))
    return {"A": a_OR.round(3).tolist(), "B": b_RI.round(3).tolist()}


def _peft_tensors(seed: int, *, rank: int) -> dict[str, Any]:
    """Return factors as PEFT names them: its A is our B."""
    factors = _factors(seed, rank=rank)
    names = {"lora_A": "B", "lora_B": "A"}
    return {
        f"base_model.model.linear.{peft}.weight": np.array(factors[ours], np.float32) for peft, ours in names.items()
    }


def _rows(seed: int, *, rows: int, table: int | None = None) -> Json:
    """Return rows inline: random ones, or the first ones of the data set that was made with the seed `table`."""
    generator = np.random.default_rng(seed if table is None else table)
    x_NI, y_NO = _numbers(generator, rows if table is None else 200)
    return {"inputs": x_NI[:rows].tolist(), "targets": y_NO[:rows].tolist()}


def _table(rows: int, *, seed: int) -> bytes:
    """Return a CSV file of inputs `e_…`, targets `y_…`, a tenant and a topic."""
    x_NI, y_NO = _numbers(np.random.default_rng(seed), rows)
    names = [*(f"e_{column}" for column in range(IN)), *(f"y_{column}" for column in range(OUT)), "tenant", "topic"]
    lines = [",".join(names)]
    for number, (x_I, y_O) in enumerate(zip(x_NI, y_NO, strict=True)):
        lines.append(",".join(map(str, [*x_I, *y_O, f"t{number % 10}", LABELS[int(np.argmax(y_O))]])))
    return "\n".join(lines).encode()


def _numbers(generator: np.random.Generator, rows: int) -> tuple[Any, Any]:
    return generator.normal(size=(rows, IN)).round(3), generator.normal(size=(rows, OUT)).round(3)


def _write_archive(work: Path, recorded: Json) -> None:
    (work / "recorded.json").write_text(json.dumps(recorded, indent=1))
    ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        for name in ("base.safetensors", "data", "recorded.json"):
            archive.add(work / name, name)


if __name__ == "__main__":
    main()
