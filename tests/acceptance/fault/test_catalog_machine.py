"""The catalogue over HTTP equals a dictionary, whatever is done to it.

`FAULT_STEPS` is how many steps are done at least.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.acceptance.crash.oracle import BASE
from tests.acceptance.fault.catalog_machine import CatalogMachine
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.slow

STEPS = chosen_count("FAULT_STEPS", 150)
_STEPS_AN_EXAMPLE = 50


@pytest.fixture
def service(data_folder: Path) -> Iterator[ServiceProcess]:
    """A service of two workers that trains."""
    with ServiceProcess(data_folder, base=BASE, workers=2, max_queued_jobs=1000) as started:
        yield started


@pytest.mark.timeout(scaled(300 + STEPS))
def test_every_answer_about_the_catalogue_is_that_of_a_dictionary(service: ServiceProcess) -> None:
    drawn = chosen_seed()
    with recorded("catalogue machine", drawn) as counts:
        CatalogMachine.service, CatalogMachine.counts = service, Counter()
        bounds = settings(
            max_examples=max(STEPS // _STEPS_AN_EXAMPLE, 1),
            stateful_step_count=_STEPS_AN_EXAMPLE,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        try:
            run_state_machine_as_test(seed(drawn)(CatalogMachine), settings=bounds)
        finally:
            counts.update(CatalogMachine.counts)
        assert counts["steps"] >= STEPS / 2
        assert counts["concurrent predictions: 200"] > 0
