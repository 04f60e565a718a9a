"""What the catalogue holds, as a scrape shows it, and a scrape while nobody can read it."""

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.catalog import counts as census
from adapters.catalog.catalog import Catalog
from adapters.catalog.counts import CatalogCounts
from adapters.jobs.job import JobStatus
from adapters.jobs.queue import JobQueue
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import load_base_layer
from app.observability.metrics import exposition as figures_of
from app.observability.metrics.exposition import CatalogMetrics
from app.observability.metrics.metric_values import MetricValues
from tests.conftest import Serve
from tests.support.catalog_factories import BASE, publication, submit
from tests.support.concurrent_clients import publish
from tests.support.deadlines import scaled
from tests.support.metrics_exposition import scrape, scraped, series, shown_of, total
from tests.support.service import eventually

DATA = {"inputs": [[1.0] * 10] * 4, "targets": [[0.0, 1.0]] * 4}
MOST_SECONDS = 5.0


def _adapter(seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return Adapter(torch.randn(2, 1, generator=draw), torch.randn(1, 10, generator=draw), None, alpha=1.0)


def test_the_counts_of_tenants_are_their_own_and_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(tmp_path, now=lambda: 0.0)
    monkeypatch.setattr(census, "_NAMES_AT_ONCE", 3)
    names = {"a": range(7), "default": range(2, 5), "z": range(10)}
    for tenant, numbers in names.items():
        catalog.publish([publication(f"name-{number}", number) for number in numbers], tenant=tenant)
    catalog.publish([publication("name-3")], tenant="z")
    catalog.delete("name-2", tenant="a")
    counts = [census.count_catalog(catalog.database, base="", now=0.0, tenant=tenant) for tenant in (*names, None)]
    assert [(one.adapters, one.versions) for one in counts] == [(6, 6), (3, 3), (10, 11), (19, 20)]
    assert sum(one.version_bytes for one in counts[:3]) == counts[3].version_bytes
    assert sum(one.trashed_bytes for one in counts[:3]) == counts[0].trashed_bytes == counts[3].trashed_bytes > 0
    assert census.count_live_by_base(catalog.database) == {(BASE.fingerprint, None): 19}
    catalog.close()


def test_it_shows_what_is_there(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "_NAMES_AT_ONCE", 3)
    client, service = serve()
    publish(service.catalog, service.base, {f"name-{number}": _adapter(number) for number in range(10)})
    publish(service.catalog, service.base, {"name-4": _adapter(99)})
    client.delete("/adapters/name-7").raise_for_status()
    client.put("/datasets/rows", content="a,b\n1,2\n", headers={"Content-Type": "text/csv"}).raise_for_status()
    jobs = [client.post("/adapters", json={"name": "a", "rank": 1, "data": DATA}).json()["id"] for _ in range(3)]
    client.post(f"/jobs/{jobs[0]}/cancel").raise_for_status()
    shown = scraped(client, lambda shown: shown[series("jobs", status="queued")] == 2)
    listed = client.get("/adapters", params={"limit": 1000}).json()["data"]
    versions = [each for one in listed for each in client.get(f"/adapters/{one['name']}/versions").json()["data"]]
    assert shown[series("adapters")] == len(listed) == 9
    assert shown[series("versions")] == len(versions) == 10
    assert shown[series("version_bytes")] == sum(each["bytes"] for each in versions)
    assert shown[series("datasets")] == 1
    assert shown[series("dataset_bytes")] > 0
    assert {status: shown[series("jobs", status=status)] for status in JobStatus} == {
        JobStatus.QUEUED: 2,
        JobStatus.RUNNING: 0,
        JobStatus.SUCCEEDED: 0,
        JobStatus.FAILED: 0,
        JobStatus.CANCELLED: 1,
    }
    assert 0 < shown[series("oldest_queued_job_seconds")] < 60
    assert 0 < shown[series("disk_free_bytes")] <= shown[series("disk_size_bytes")]


def test_a_job_for_another_base_layer_does_not_make_the_oldest_wait(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path, now=time.time)
    queue = JobQueue(catalog.database, catalog.writer, now=lambda: 100.0, lease_seconds=15)
    submit(queue, "old", base="other")
    assert census.count_catalog(catalog.database, base="mine", now=160.0).oldest_queued_seconds == 0
    assert census.count_catalog(catalog.database, base="other", now=160.0).oldest_queued_seconds == 60
    assert census.count_catalog(catalog.database, base="mine", now=160.0).jobs[JobStatus.QUEUED] == 1
    catalog.database.close()


def test_a_count_is_shown_for_a_second(tmp_path: Path) -> None:
    catalog, clock = Catalog(tmp_path, now=time.time), [100.0]
    counting = CatalogMetrics(catalog, base="", now=time.time, monotonic=lambda: clock[0])

    def adapters() -> float:
        figures = MetricValues()
        counting.record(figures)
        return shown_of(figures)[series("adapters")]

    assert adapters() == 0
    publish(catalog, load_base_layer("random:10,2,42"), {"late": _adapter(1)})
    clock[0] += 0.9
    assert adapters() == 0
    clock[0] += 0.2
    assert adapters() == 1
    counting.close()
    catalog.database.close()


def test_those_who_ask_at_once_share_one_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, counts = Catalog(tmp_path, now=time.time), 0
    counting = CatalogMetrics(catalog, base="", now=time.time, monotonic=lambda: 100.0)
    everyone_asks = threading.Barrier(9)

    def count(*given: Any, **named: Any) -> CatalogCounts:
        nonlocal counts
        counts += 1
        return census.count_catalog(*given, **named)

    def ask() -> CatalogCounts | None:
        everyone_asks.wait()
        return counting.census()

    monkeypatch.setattr(figures_of, "count_catalog", count)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask) for _ in range(8)]
        everyone_asks.wait()
        assert len({id(each.result()) for each in asked}) == counts == 1
    counting.close()
    catalog.database.close()


def test_a_locked_catalogue_keeps_a_scrape_from_nothing_else(serve: Serve, tmp_path: Path) -> None:
    client, service = serve()
    service.metrics.record_publish(0.1, 7)
    lock = sqlite3.connect(service.catalog.database.name, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    shown = scrape(client)
    assert time.monotonic() - began < scaled(MOST_SECONDS)
    assert shown[series("catalog_up")] == 0
    assert series("adapters") not in shown
    assert shown[series("adapters_published_total", source="upload")] == 7
    assert total(shown, "processes", role="worker") == 1
    lock.execute("ROLLBACK")
    lock.close()
    scraped(client, lambda shown: shown[series("catalog_up")] == 1 and series("adapters") in shown)


def test_a_broken_catalogue_does_not_either(serve: Serve) -> None:
    client, service = serve()
    path = Path(service.catalog.database.name)
    service.catalog.database.close()
    path.write_bytes(np.random.default_rng(0).bytes(8192))
    shown = eventually(lambda: scrape(client))
    assert shown[series("catalog_up")] == 0
    assert total(shown, "processes", role="worker") == 1
