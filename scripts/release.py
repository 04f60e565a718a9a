"""Build a release: the wheels of the service and its client, a bill of materials, and the digests of all of them.

    python -m scripts.release build/release

The bill of materials (SBOM) is CycloneDX 1.6 in JSON. It lists requirements.lock, which is what the image and
`make setup` install, with what each package needs and its licence as the installed package states it.
"""

import hashlib
import json
import re
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
SERVICE, CLIENT = "loraplex-server", "loraplex"
SBOM, SUMS = "loraplex.cdx.json", "SHA256SUMS"
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", re.MULTILINE)
_REQUIRED = re.compile(r"^[A-Za-z0-9._-]+")


def locked_versions(lock: str) -> dict[str, str]:
    """Return the packages of a lock file by normalized name, with their versions."""
    return {_normalized(name): version for name, version in _PINNED.findall(lock)}


def bill_of_materials(versions: dict[str, str]) -> dict[str, Any]:
    """Return the CycloneDX document of the service with these packages, which must be installed."""
    own = {name: distribution(name).version for name in (SERVICE, CLIENT)}
    components = versions | {CLIENT: own[CLIENT]}
    references = {name: _purl(name, version) for name, version in (components | {SERVICE: own[SERVICE]}).items()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _component(SERVICE, own[SERVICE], kind="application")},
        "components": [_component(name, version) for name, version in sorted(components.items())],
        "dependencies": [
            {"ref": reference, "dependsOn": sorted(references[other] for other in _needs(name) if other in references)}
            for name, reference in sorted(references.items())
        ],
    }


def build(folder: Path) -> None:
    """Write the wheels, the bill of materials and the digests into an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    wheels = [*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT), str(ROOT / "client")]
    subprocess.run(wheels, check=True)
    document = bill_of_materials(locked_versions(LOCK.read_text()))
    (folder / SBOM).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (folder / SUMS).write_text(sums)


def _component(name: str, version: str, *, kind: str = "library") -> dict[str, Any]:
    purl = _purl(name, version)
    component = {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}
    installed = distribution(name)
    if installed.version.partition("+")[0] != version.partition("+")[0]:
        raise SystemExit(f"{name} is installed as {installed.version}, and the lock has {version}: run make setup")
    licence = _licence(installed)
    return component if licence is None else component | {"licenses": [{"license": {"name": licence}}]}


def _licence(installed: Distribution) -> str | None:
    metadata = installed.metadata
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if "License ::" in text]
    expressions, texts = (metadata.get_all(name, []) for name in ("License-Expression", "License"))
    stated = [*expressions, *([", ".join(classifiers)] if classifiers else []), *filter(None, texts)]
    return stated[0].splitlines()[0] if stated else None  # some packages put the whole text there


def _needs(name: str) -> set[str]:
    """Return the packages that a package names as its own, without those of extras and other platforms' absent ones."""
    required = distribution(name).requires or []
    matches = [_REQUIRED.match(text) for text in required if "extra ==" not in text]
    return {_normalized(match[0]) for match in matches if match}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


if __name__ == "__main__":
    build(Path(sys.argv[1]))
