"""A thousand duplicates at once, with one idempotency key, over two worker processes: one job."""

import json
import os
import random
from pathlib import Path

import pytest

from tests.support.concurrent_clients import JSON, check_duplicates, post_duplicates
from tests.support.databases import database_url
from tests.support.service import ServiceProcess
from tests.support.storage_kinds import on_both_storages

DUPLICATES, ROWS, SEED = 1000, 200, 19
ROUNDS = int(os.environ.get("DUPLICATE_ROUNDS", "20"))
FEW = 20
"""Duplicates in each round but the first: only those that arrive before a job is stored can race."""
I, O = 8, 2


@pytest.mark.slow
@pytest.mark.soak
@on_both_storages
def test_a_thousand_duplicates_over_two_workers_make_one_job(data_folder: Path) -> None:
    draw = random.Random(SEED)
    data = {
        "inputs": [[draw.random() for _ in range(I)] for _ in range(ROWS)],
        "targets": [[draw.random() for _ in range(O)] for _ in range(ROWS)],
    }
    with ServiceProcess(data_folder, base=f"random:{I},{O},3", workers=2, trainers=0) as service:
        for number in range(ROUNDS):
            name = f"round-{number}"
            body = {"name": name, "rank": 1, "data": data, "training": {"method": "closed_form"}}
            duplicates = FEW if number else DUPLICATES
            answers = post_duplicates([service.client.base_url], body, key=name, count=duplicates)
            (job,) = service.client.get("/jobs", params={"adapter": name}).json()["data"]
            counts = check_duplicates(answers, job["id"], is_busy=database_url(data_folder) is not None)
            print(f"{name} (seed {SEED}): {duplicates} duplicates, 1 job, {dict(counts)}")
            again = service.client.post(
                "/adapters", content=json.dumps(body).encode(), headers=JSON | {"Idempotency-Key": name}
            )
            assert (again.status_code, again.json()["id"]) == (202, job["id"])
