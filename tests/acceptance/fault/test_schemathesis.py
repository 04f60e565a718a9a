"""Schemathesis against the whole API, with all checks but one: every answer is one that the document describes.

`FAULT_CASES` is how many requests are made at least, half of them in sequences.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from adapters.access.keys import Scope
from app.settings import Auth, Settings
from tests.acceptance.crash.oracle import BASE
from tests.support.databases import database_settings
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.keys import bearer, make_key
from tests.support.service import serving

pytestmark = pytest.mark.slow

CASES = chosen_count("FAULT_CASES", 150)
_EXCLUDED = [positive_data_acceptance]
"""The document cannot say all that a request must fulfil, such as lists of one length."""
_STEPS_AN_EXAMPLE = 10
# Besides those that Schemathesis expects for a request that does not fit the document: such a body may be too large.
_REFUSALS = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
_CONFIG = {"checks": {"negative_data_rejection": {"expected-statuses": _REFUSALS}}}


@pytest.fixture
def client(data_folder: Path) -> Iterator[httpx.Client]:
    """A client of a service that trains, with the key of an operator."""
    chosen: dict[str, Any] = {"data_dir": data_folder, "base": BASE} | database_settings(data_folder)
    own = Settings(auth=Auth.KEYS, max_queued_jobs=10_000, **chosen)
    with serving(own, trainer=True) as (connected, service):
        connected.headers.update(bearer(make_key(service.keys, "default", Scope.OPERATOR)))
        yield connected


def _bounds(examples: int, **more: Any) -> settings:
    return settings(
        database=None,
        deadline=None,
        max_examples=examples,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        **more,
    )


def _schema(client: httpx.Client) -> Any:
    document = client.get("/openapi.json").raise_for_status().json()
    return schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict(_CONFIG))


def _call(client: httpx.Client, case: Any, counts: Counter[str]) -> Any:
    """Send a request; count it and the status of its answer, which is no 500."""
    headers = {"Authorization": client.headers["Authorization"]}
    answered = case.call(base_url=str(client.base_url).rstrip("/"), headers=headers)
    counts["cases"] += 1
    counts[f"answered {answered.status_code}"] += 1
    assert answered.status_code != 500, answered.text
    return answered


@pytest.mark.timeout(scaled(300 + CASES))
def test_every_call_answers_as_its_document_says(client: httpx.Client) -> None:
    drawn = chosen_seed()
    operations = [result.ok() for result in _schema(client).get_all_operations()]
    with recorded("Schemathesis, calls", drawn) as counts:
        for mode in GenerationMode:
            cases = st.one_of([operation.as_strategy(mode) for operation in operations])

            @seed(drawn)
            @_bounds(max(CASES // 4, 1))
            @given(cases)
            def exchange(case: Any) -> None:
                case.validate_response(_call(client, case, counts), excluded_checks=_EXCLUDED)

            exchange()
        assert counts["cases"] >= CASES // 4


@pytest.mark.timeout(scaled(300 + CASES))
def test_every_sequence_of_calls_answers_as_its_document_says(client: httpx.Client) -> None:
    drawn = chosen_seed()
    counted: Counter[str] = Counter()

    class Machine(_schema(client).as_state_machine()):  # type: ignore[misc]
        def call(self, case: Any, **_: Any) -> Any:
            return _call(client, case, counted)

        def validate_response(self, response: Any, case: Any, **_: Any) -> None:
            case.validate_response(response, excluded_checks=_EXCLUDED)

    with recorded("Schemathesis, sequences", drawn) as counts:
        bounds = _bounds(max(CASES // 2 // _STEPS_AN_EXAMPLE, 1), stateful_step_count=_STEPS_AN_EXAMPLE)
        try:
            run_state_machine_as_test(seed(drawn)(Machine), settings=bounds)
        finally:
            counts.update(counted)
        assert counts["cases"] > 0
