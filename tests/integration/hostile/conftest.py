"""The service that every case is sent to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapters.catalog.versions import Publication, Source
from adapters.errors import FitFailed
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from app.bootstrap import load_base
from app.service import Service
from app.settings import Settings
from tests.conftest import NewFolder
from tests.integration.hostile.bodies import IN, OUT
from tests.integration.hostile.case import Target
from tests.support.service import serving

FEATURE_SPACE = "minilm@1"
MAX_BODY_BYTES, MAX_PREDICT_JSON_BYTES = 1_200_000, 700_000
MAX_ROWS, MAX_RANK = 16, 8


def settings_for(data_dir: Path, **changes: object) -> Settings:
    """Small limits, so that passing them is cheap."""
    values: dict[str, object] = {
        "data_dir": data_dir,
        "base": f"random:{IN},{OUT},42",
        "feature_space": FEATURE_SPACE,
        "max_body_bytes": MAX_BODY_BYTES,
        "max_predict_json_bytes": MAX_PREDICT_JSON_BYTES,
        "max_rows": MAX_ROWS,
        "max_rank": MAX_RANK,
    }
    return Settings.model_validate(values | changes)


@pytest.fixture(scope="package")
def target(new_folder: NewFolder) -> Iterator[Target]:
    """One worker with adapters of every kind, two jobs that wait and one that failed: no case may change it."""
    settings = settings_for(new_folder("hostile"))
    with serving(settings) as (client, service):
        for a in ([[1.0, 0.0], [0.5, 2.0]], [[0.0, 1.0], [1.0, 0.0]]):
            client.put("/adapters/acme", json={"A": a, "B": [[1.0] * IN, [0.5] * IN]}).raise_for_status()
        other_base = load_base(settings.model_copy(update={"base": f"random:{IN},{OUT},7"}))
        _publish(service, "draft", live=False)
        _publish(service, "negative", alpha=-2.0)
        _publish(service, "foreign", base=other_base)
        _publish(service, "elsewhere", feature_space="another-encoder@2")
        for _ in range(3):
            data = {"inputs": [[1.0] * IN] * 4, "targets": [[1.0] * OUT] * 4}
            client.post("/adapters", json={"name": "acme", "rank": 1, "data": data}).raise_for_status()
        claim = service.queue.claim(base=service.base.fingerprint)
        assert claim is not None
        service.queue.fail(claim, FitFailed("on purpose").members(), history=[])
        tried = Target(client, service, ["acme", "draft", "negative", "foreign", "elsewhere"])
        yield tried
        tried.is_untouched()


def _publish(
    service: Service,
    name: str,
    *,
    alpha: float = 2.0,
    base: BaseLayer | None = None,
    feature_space: str = FEATURE_SPACE,
    live: bool = True,
) -> None:
    adapter = Adapter(torch.ones(OUT, 2), torch.ones(2, IN), None, alpha, feature_space=feature_space)
    base = base or service.base
    publication = Publication(name=name, adapter=adapter, base=base, source=Source.UPLOAD, moves_live=live)
    service.catalog.publish([publication], tenant="default")
