import json
import re

from scripts.release import CLIENT, LOCK, SERVICE, bill_of_materials, locked_versions

DOCUMENT = bill_of_materials(locked_versions(LOCK.read_text()))


def test_every_locked_package_is_listed_with_its_version() -> None:
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    listed = {f"{part['name']}=={part['version']}" for part in DOCUMENT["components"] if part["name"] != CLIENT}
    assert listed == {re.sub(r"[-_.]+", "-", line.split()[0].partition("==")[0]).lower() + "==" +
                      line.split()[0].partition("==")[2] for line in lines}  # fmt: skip


def test_the_references_of_the_document_hold() -> None:
    parts = [*DOCUMENT["components"], DOCUMENT["metadata"]["component"]]
    references = [part["bom-ref"] for part in parts]
    assert len(set(references)) == len(references)
    for entry in DOCUMENT["dependencies"]:
        assert {entry["ref"], *entry["dependsOn"]} <= set(references)
    needs = {entry["ref"].split("/")[1].split("@")[0]: entry["dependsOn"] for entry in DOCUMENT["dependencies"]}
    assert any("/uvicorn@" in reference for reference in needs[SERVICE])
    assert any("/starlette@" in reference for reference in needs["fastapi"])


def test_the_document_says_nothing_of_this_machine() -> None:
    assert "file://" not in json.dumps(DOCUMENT)
