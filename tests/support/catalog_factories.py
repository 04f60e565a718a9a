"""Adapters to publish, and the dense layer that says what they must answer."""

# N rows · I in_features · O out_features · R rank
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection

from adapters.catalog.catalog import Catalog, Record
from adapters.catalog.versions import Publication, Published, Source, Version
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import NO_REPORTS, JobAdapter
from adapters.jobs.queue import JobQueue
from adapters.jobs.training_job import Provenance, TrainingJob
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import STORE_ID
from adapters.training.evaluation.gate import Gate
from adapters.training.settings import TrainingSpec
from tests.support.databases import blob_location, rows_of
from tests.support.external_programs import skip_or_fail

BASE = load_base_layer("random:10,2,42")
INPUTS_NI = torch.randn(5, BASE.in_features, generator=torch.Generator().manual_seed(7))


def make_adapter(seed: int, *, rank: int = 2, base: BaseLayer = BASE) -> Adapter:
    """Another adapter for each seed."""
    generator = torch.Generator().manual_seed(seed)
    a_OR = torch.randn(base.out_features, rank, generator=generator)
    return Adapter(a_OR, torch.randn(rank, base.in_features, generator=generator), None, alpha=float(rank))


def publication(name: str, seed: int = 0, **fields: object) -> Publication:
    """An upload of `make_adapter(seed)`."""
    values: dict[str, object] = {"adapter": make_adapter(seed), "base": BASE, "source": Source.UPLOAD} | fields
    return Publication(name=name, **values)  # type: ignore[arg-type]


def put(catalog: Catalog, name: str, seed: int = 0) -> Version:
    """Publish `make_adapter(seed)` under a name."""
    return catalog.put(publication(name, seed), tenant="default")[0]


def training_job(**description: Any) -> TrainingJob:
    """Return a training that shows this description."""
    return TrainingJob(
        spec=TrainingSpec(rank=1, alpha=1.0),
        gate=Gate(),
        labels=None,
        steps=9,
        adapters=1,
        is_fleet=False,
        provenance=Provenance(data={}),
        description=description,
    )


def write_orphan(catalog: Catalog, content: bytes) -> str:
    """Write a blob without a pending row, as a crash leaves one; return its name."""
    name = f"{catalog.revision():012x}-{uuid.uuid4().hex}"
    catalog.blobs.write(name, content)
    return name


def submit(queue: JobQueue, job_id: str = "j", *, adapter: str = "acme", **fields: Any) -> Job:
    """Queue a job that trains one adapter."""
    return submit_job(queue, job_id, adapter=adapter, adapters=[JobAdapter(adapter, None, 1)], **fields)


def submit_fleet(queue: JobQueue, names: Sequence[str], job_id: str = "j", **fields: Any) -> Job:
    """Queue a job that trains these."""
    adapters = [JobAdapter(name, name, 1, position=position) for position, name in enumerate(names)]
    return submit_job(queue, job_id, adapter="{tenant}", adapters=adapters, **fields)


def submit_job(queue: JobQueue, job_id: str, **fields: Any) -> Job:
    """Queue a job with these arguments of `JobQueue.submit` and defaults for others."""
    usual: dict[str, Any] = {
        "tenant": "default",
        "base": "",
        "feature_space": None,
        "training": training_job(),
        "data": b"rows",
    }
    return queue.submit(job_id, **usual | {"max_queued": 100} | fields)


def claimed(queue: JobQueue, *, base: str = "") -> Job:
    """What a trainer with this base layer takes next."""
    claim = queue.claim(base=base)
    assert claim is not None
    return claim


def publish_for(
    catalog: Catalog,
    queue: JobQueue,
    claim: Job,
    trained: Sequence[JobAdapter],
    *,
    record: Record | None = None,
    reports: Mapping[int, Mapping[str, Any]] = NO_REPORTS,
    **fields: Any,
) -> list[Published]:
    """Publish these of a job's adapters as its trainer does; the seed of each is its position."""

    def both(connection: Connection, published: Sequence[Published]) -> None:
        queue.record(connection, claim, published, reports)
        if record is not None:
            record(connection, published)

    made = [
        publication(one.name, one.position, source=Source.JOB, job=claim.id, position=one.position, **fields)
        for one in trained
    ]
    return catalog.publish(
        made, admit=lambda at, publications: queue.admit(at, claim, publications), record=both, tenant=claim.tenant
    )


def finish(catalog: Catalog, queue: JobQueue, claim: Job) -> Version:
    """Publish what a job of one adapter trained, and end it."""

    def end(connection: Connection, published: Sequence[Published]) -> None:
        version = published[0].version
        result = {"name": version.adapter, "version": version.version, "digest": version.digest}
        queue.succeed(claim, result=result, progress={}, metrics={"train_loss": 1.0}, history=[], connection=connection)

    return publish_for(catalog, queue, claim, queue.adapters(claim.id, tenant=claim.tenant), record=end)[0].version


def skip_unless_cached(file: Path) -> None:
    """Skip the test where the kernel does not say of this file, just written, that it has it in memory."""
    with file.open("rb") as opened:
        try:
            os.preadv(opened.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except (AttributeError, OSError):
            skip_or_fail("this system cannot tell what is in memory")


def as_upload(adapter: Adapter) -> dict[str, object]:
    """The JSON body that uploads an adapter."""
    return {"A": adapter.a_OR.tolist(), "B": adapter.b_RI.tolist(), "alpha": adapter.alpha}


def dense_answer(adapter: Adapter | None, x_NI: torch.Tensor = INPUTS_NI, base: BaseLayer = BASE) -> torch.Tensor:
    """(N, I) → (N, O) in float64, by the weight that the service never forms."""
    weight_OI = base.weight_OI.double()
    if adapter is not None:
        weight_OI = weight_OI + adapter.alpha / adapter.rank * adapter.a_OR.double() @ adapter.b_RI.double()
    bias_O = 0.0 if base.bias_O is None else base.bias_O.double()
    return x_NI.double() @ weight_OI.T + bias_O


def stored_files(folder: Path) -> set[str]:
    """What lies in the folder of blobs, or of objects, but for its store id."""
    if (location := blob_location(folder)).url is not None:
        return _objects_in(location, "blobs")
    return {path.name for path in (folder / "blobs").iterdir()} - {STORE_ID}


def stored_bytes(folder: Path, name: str) -> bytes:
    """The bytes of a blob, read past the code under test."""
    if (location := blob_location(folder)).url is None:
        return (folder / "blobs" / name).read_bytes()
    from tests.support.object_server import bucket_of

    return bytes(bucket_of(location).get(f"blobs/{name}").bytes())


def quarantined_files(folder: Path) -> set[str]:
    """The blobs that lie in quarantine, by the names that they had."""
    if (location := blob_location(folder)).url is not None:
        return {name.partition("-")[2] for name in _objects_in(location, "quarantine")}
    return {path.name.partition("-")[2] for path in (folder / "quarantine").glob("*")}


def _objects_in(location: BlobLocation, folder: str) -> set[str]:
    # What it needs is an extra.
    from tests.support.object_server import objects_in

    return objects_in(location, folder)


def referenced_files(folder: Path) -> set[str]:
    """What the catalogue's rows refer to, read past the code under test."""
    statements = (
        "SELECT file FROM versions",
        "SELECT file FROM trashed_versions",
        "SELECT statistics FROM versions WHERE statistics IS NOT NULL",
        "SELECT data_file FROM jobs WHERE data_file IS NOT NULL",
        "SELECT file FROM dataset_versions",
    )
    return {str(row[0]) for statement in statements for row in rows_of(folder, statement)}


def migrate(path: Path, revision: str) -> None:
    """Create a catalogue, or migrate it, with the tables of an earlier revision of the migrations."""
    engine = sa.create_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[2] / "adapters" / "storage" / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
