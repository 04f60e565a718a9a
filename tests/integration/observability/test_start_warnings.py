"""What a service logs at its start of a folder that was made for another base layer or feature space."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.catalog import counts as census
from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Publication, Source
from adapters.jobs.queue import JobQueue
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer, load_base_layer
from app.bootstrap import warn_about_adapters, warn_about_jobs
from tests.support.catalog_factories import submit
from tests.support.dense_oracle import random_adapter

HERE, ELSEWHERE = load_base_layer("random:10,2,42"), load_base_layer("random:10,2,43")


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path, now=time.time)
    yield opened
    opened.database.close()


def _publish(catalog: Catalog, name: str, base: BaseLayer, space: str | None = None, *, live: bool = True) -> None:
    made = random_adapter(2, 10, 1)
    adapter = Adapter(made.a_OR, made.b_RI, None, made.alpha, feature_space=space)
    catalog.publish(
        [Publication(name=name, adapter=adapter, base=base, source=Source.UPLOAD, moves_live=live)], tenant="default"
    )


def _warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert {record.levelno for record in caplog.records} <= {logging.WARNING}
    return [record.getMessage() for record in caplog.records]


def test_live_versions_of_other_base_layers_are_counted(
    catalog: Catalog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "_NAMES_AT_ONCE", 3)
    for number in range(8):
        _publish(catalog, f"old-{number}", ELSEWHERE)
    _publish(catalog, "own", HERE)
    _publish(catalog, "old-3", HERE)  # what is live of it now is of this base layer
    _publish(catalog, "draft", ELSEWHERE, live=False)
    catalog.delete("old-5", tenant="default")
    warn_about_adapters(catalog.database, HERE, None)
    (line,) = _warned(caplog)
    assert line.startswith(f"6 live adapters were made for another base layer than this service's, {HERE.fingerprint}")
    assert f"6 for {ELSEWHERE.fingerprint}. Such adapters answer 409 base_mismatch" in line
    caplog.clear()
    warn_about_adapters(catalog.database, ELSEWHERE, None)
    (line,) = _warned(caplog)
    assert line.startswith("2 live adapters were made for another base layer")


def test_live_versions_of_other_feature_spaces_are_counted(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    for name, base, space in (
        ("none", HERE, None),
        ("own", HERE, "mine"),
        ("a", HERE, "theirs"),
        ("b", ELSEWHERE, "theirs"),
    ):
        _publish(catalog, name, base, space)
    warn_about_adapters(catalog.database, HERE, "mine")
    of_base, of_space = _warned(caplog)
    assert of_base.startswith("1 live adapter was made for another base layer")
    assert of_space.startswith("1 live adapter was made for another feature space than this service's, 'mine'")
    assert "1 for 'theirs'. Such adapters answer 409 feature_space_mismatch" in of_space


def test_of_many_base_layers_the_commonest_are_named(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    queue = JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15)
    submit(queue, "own", base=HERE.fingerprint)
    for number in range(8):
        submit(queue, f"j{number}", base=f"sha256:{number}")
    submit(queue, "again", base="sha256:7")
    warn_about_jobs(catalog.database, HERE)
    (line,) = _warned(caplog)
    assert line.startswith(f"9 queued jobs are for another base layer than this service's, {HERE.fingerprint}: 2 for ")
    assert "2 for sha256:7, 1 for sha256:0" in line
    assert "and 3 for others. Such jobs wait" in line


def test_a_folder_of_this_base_layer_is_nothing_to_warn_about(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    warn_about_adapters(catalog.database, HERE, None)
    _publish(catalog, "own", HERE)
    queue = JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15)
    submit(queue, base=HERE.fingerprint)
    for space in (None, "any"):
        warn_about_adapters(catalog.database, HERE, space)
    warn_about_jobs(catalog.database, HERE)
    assert _warned(caplog) == []
