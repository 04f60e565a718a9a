"""Flipped bits in blobs and in pages of the catalogue: an answer is right or an error, and the doctor finds them.

`FAULT_FLIPS` is how many bits are flipped, one at a time.
"""

# N rows · I in_features · O out_features
import random
import shutil
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest

from adapters.errors import CatalogNotLoadable
from adapters.maintenance.doctor import diagnose
from app.settings import Settings
from tests.support.catalog_factories import INPUTS_NI, as_upload, dense_answer, make_adapter, publication
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.service import serving

pytestmark = pytest.mark.slow

FLIPS = chosen_count("FAULT_FLIPS", 16)
NAMES = {f"adapter-{seed}": seed for seed in range(6)}
"""Adapters with the seeds of their factors; the last three share a blob."""
TABLE = b"x,y\n" + b"".join(b"%d,%d\n" % (row, -row) for row in range(50))
ROWS = [{"x": row, "y": -row} for row in range(50)]
_PAGE = "catalog.sqlite3"
_CODES = {"blob_corrupt", "storage_failed"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder without damage."""
    folder = tmp_path_factory.mktemp("sound") / "data"
    with serving(_settings(folder)) as (client, service):
        for name, seed in list(NAMES.items())[:3]:
            client.put(f"/adapters/{name}", json=as_upload(make_adapter(seed))).raise_for_status()
        service.catalog.publish([publication(name, seed) for name, seed in list(NAMES.items())[3:]], tenant="default")
        client.put("/datasets/rows", content=TABLE, headers={"Content-Type": "text/csv"}).raise_for_status()
    return folder


def _settings(folder: Path) -> Settings:
    return Settings(data_dir=folder, base="random:10,2,42", cache_bytes=0)


@pytest.mark.timeout(scaled(240 + 3 * FLIPS))
def test_a_flipped_bit_is_never_answered_with_and_is_found(sound: Path, tmp_path: Path) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    with recorded("flipped bits", seed) as counts:
        for number in range(FLIPS):
            folder = shutil.copytree(sound, tmp_path / str(number))
            in_catalog = number % 2 == 1
            choices = [folder / _PAGE] if in_catalog else _blobs(folder)
            where = _flip(draw.choice(choices), draw)
            try:
                _check(folder, counts, in_catalog=in_catalog)
            except BaseException as error:
                error.add_note(f"the flipped bit: {where}")
                raise
            counts["flips"] += 1
            shutil.rmtree(folder)
    assert counts["answers that are right"] > 0
    assert counts["answers with an error"] > 0


def _blobs(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "blobs").iterdir() if path.name != "store-id")


def _flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit % 8} of byte {bit // 8} of {path.name}"


def _check(folder: Path, counts: Counter[str], *, in_catalog: bool) -> None:
    """Ask for everything, then let the doctor look."""
    kind = "in the catalogue" if in_catalog else "in blobs"
    before = len(diagnose(folder).findings)
    try:
        with serving(_settings(folder)) as (client, _):
            is_harmless = _check_answers(client, counts, in_catalog=in_catalog)
    except CatalogNotLoadable:
        counts[f"refused starts, flips {kind}"] += 1
        is_harmless = False
    is_found = before > 0
    counts[f"found by the doctor, flips {kind}"] += is_found
    if not is_found:
        counts[f"without a finding, flips {kind}"] += 1
        counts[f"without a finding but with an error, flips {kind}"] += not is_harmless
        assert in_catalog, "the doctor finds every flipped bit of a blob"


def _check_answers(client: httpx.Client, counts: Counter[str], *, in_catalog: bool) -> bool:
    """Return whether everything was answered; assert that nothing was answered wrongly."""
    is_whole = True
    for name, seed in NAMES.items():
        answered = client.post("/predict", json={"adapter": name, "inputs": INPUTS_NI.tolist()})
        if _is_answer(answered, counts, in_catalog=in_catalog):
            assert answered.json()["adapter"]["digest"] == make_adapter(seed).digest
            expected = dense_answer(make_adapter(seed))
            np.testing.assert_allclose(answered.json()["outputs"], expected, rtol=1e-4, atol=1e-4)
        else:
            is_whole = False
        is_whole &= _is_answer(client.get(f"/adapters/{name}/download"), counts, in_catalog=in_catalog)
    preview = client.get("/datasets/rows/preview", params={"limit": 100})
    if _is_answer(preview, counts, in_catalog=in_catalog):
        assert preview.json()["rows"] == ROWS
    else:
        is_whole = False
    for path in ("/adapters", "/datasets", "/jobs"):
        is_whole &= _is_answer(client.get(path), counts, in_catalog=in_catalog)
    return is_whole


def _is_answer(answered: httpx.Response, counts: Counter[str], *, in_catalog: bool) -> bool:
    """Return whether it is no error; assert that an error has a code for damage.

    A name in a damaged row of the catalogue may be missing.
    """
    if answered.status_code == 200:
        counts["answers that are right"] += 1
        return True
    code: str = answered.json()["code"]
    counts["answers with an error"] += 1
    counts[f"answered {answered.status_code} {code}"] += 1
    assert code in _CODES or (in_catalog and answered.status_code == 404), f"{answered.request.url}: {answered.text}"
    return False
