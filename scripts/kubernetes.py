"""Check deploy/kubernetes: what `kubectl kustomize` builds, against the schemas of Kubernetes and the code.

    python -m scripts.kubernetes          print the problems of the base and of each overlay; exit 1 if there are any

Nothing here needs a cluster or a network. The schemas are those of `kubernetes-validate`, in their strict form: a field
that Kubernetes does not have is a problem. The other checks hold the manifests against what the service does: settings,
metrics, ports, users and folders are those of the code.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from pydantic import ValidationError

from app.observability.metrics.definitions import DEFINITIONS, Kind
from app.settings import POSTGRESQL, PREFIX, Settings

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
BASE = FOLDER / "base"
ADAPTER = FOLDER / "prometheus-adapter.yaml"
"""Values of the Prometheus adapter, with the rules of the metrics that replicas are scaled by."""
VERSIONS = ("1.27", kubernetes_validate.latest_version())
"""The oldest and the newest Kubernetes whose schemas hold."""
SECRETS = {"LORAPLEX_DATABASE_URL": f"{POSTGRESQL}user:password@database/name"} | dict.fromkeys(
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "secret"
)
"""Variables that come from a Secret, with values of their form."""
POD_IP = "10.0.0.7"
EGRESS = {("UDP", 53), ("TCP", 53), ("TCP", 5432), ("TCP", 443)}
"""DNS, PostgreSQL and the bucket."""
_MIB = 2**20
_UNITS = {"Mi": _MIB, "Gi": 2**30}
# The figures of docs/sizing.md: worker, supervisor and reader of large JSON; trainer and fit process.
_API_BYTES, _TRAINER_BYTES = (480 + 50 + 640) * _MIB, (280 + 240) * _MIB
_DATASET_READER_BYTES = 2**30
_CACHED_SHARE = 1.1
# Seconds between the signal and the end of a process that answers nothing any more.
_SECONDS_TO_END = 5
_PASSWORD = re.compile(r"://[^/@]*:[^/@]+@")

Manifest = Mapping[str, Any]


def kustomizations() -> Sequence[Path]:
    """Return the folders that `kubectl kustomize` builds: the base, and the overlays."""
    return [BASE, *sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))]


def build(folder: Path) -> Sequence[Manifest]:
    """Return the manifests of a folder; raise `CalledProcessError` with the message of kubectl."""
    own = Path(sys.executable).with_name("kubectl")
    kubectl = str(own) if own.exists() else shutil.which("kubectl")
    if kubectl is None:
        raise SystemExit("kubectl is not installed (1.27 or newer), and PyPI has none for this machine")
    built = subprocess.run([kubectl, "kustomize", folder], check=True, capture_output=True, text=True)
    return [manifest for manifest in yaml.safe_load_all(built.stdout) if manifest]


def problems(manifests: Sequence[Manifest]) -> Sequence[str]:
    """Return what is wrong with the manifests that a folder is built to, in sentences."""
    # The other checks read fields that the schemas require.
    return list(schema_problems(manifests)) or list(other_problems(manifests))


def other_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield what is wrong with manifests that the schemas accept."""
    checks = (_selectors, _secrets, _scaling, _network)
    yield from chain.from_iterable(check(manifests) for check in checks)
    for workload in _of_kind(manifests, "Deployment"):
        yield from _pod(workload, manifests)


def schema_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield what the schemas of Kubernetes refuse: unknown kinds and fields, wrong types, missing fields."""
    for version in VERSIONS:
        for manifest in manifests:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                path = ".".join(map(str, error.path))
                yield f"{_title(manifest)}: Kubernetes {version}: {path}: {error.message}"
            except kubernetes_validate.SchemaNotFoundError as error:
                yield f"{_title(manifest)}: {error.message}"


def environment(workload: Manifest, manifests: Sequence[Manifest]) -> dict[str, str]:
    """Return the variables of the container of a workload, with examples in place of secrets and addresses."""
    (container,) = _pod_spec(workload)["containers"]
    maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in _of_kind(manifests, "ConfigMap")}
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        variables |= maps[source["configMapRef"]["name"]]
    # A reference `$(NAME)` is to an earlier entry of this list, and not to one of `envFrom`.
    listed: dict[str, str] = {}
    for entry in container.get("env", []):
        match entry:
            case {"name": name, "value": value}:
                listed[name] = re.sub(r"\$\((\w+)\)", lambda match: listed.get(match[1], match[0]), value)
            case {"name": name, "valueFrom": {"configMapKeyRef": key}}:
                listed[name] = maps[key["name"]][key["key"]]
            case {"name": name, "valueFrom": {"secretKeyRef": _}}:
                listed[name] = SECRETS.get(name, "secret")
            case {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}:
                listed[name] = POD_IP
    return variables | listed


def settings_of(workload: Manifest, manifests: Sequence[Manifest]) -> Settings:
    """Return the settings that a workload has; raise `ValidationError` for an unknown name or a wrong value."""
    variables = environment(workload, manifests)
    names = [name for name in variables if name.startswith(PREFIX)]
    return Settings(**{name.removeprefix(PREFIX).lower(): variables[name] for name in names})  # type: ignore[arg-type]


def _pod(workload: Manifest, manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield the problems of the pods of a workload."""
    title, spec = _title(workload), _pod_spec(workload)
    try:
        settings = settings_of(workload, manifests)
    except ValidationError as error:
        yield f"{title}: {error}"
        return
    if spec.get("automountServiceAccountToken") is not False:
        yield f"{title}: the pods have a token of a service account"
    if spec.get("enableServiceLinks") is not False:
        yield f"{title}: variables of Services would count as settings that do not exist"
    user = int(re.findall(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1])
    security = {"runAsNonRoot": True, "runAsUser": user, "seccompProfile": {"type": "RuntimeDefault"}}
    if not spec.get("securityContext", {}).items() >= security.items():
        yield f"{title}: the securityContext of the pods lacks some of {security}"
    if not spec.get("topologySpreadConstraints"):
        yield f"{title}: all pods may be on one machine"
    grace, needed = spec.get("terminationGracePeriodSeconds", 0), _seconds_to_end(spec, settings)
    if grace < needed:
        yield f"{title}: terminationGracePeriodSeconds is {grace}, and the pods take up to {needed:g}"
    for container in spec["containers"]:
        yield from (f"{title}: {problem}" for problem in _container(container, spec, settings))


def _container(container: Manifest, spec: Manifest, settings: Settings) -> Iterator[str]:
    for probe in ("startupProbe", "livenessProbe", *(["readinessProbe"] if container.get("ports") else [])):
        if probe not in container:
            yield f"it has no {probe}"
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    if container.get("securityContext") != security:
        yield f"its securityContext is not {security}"
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    if "cpu" not in requests:
        yield "it requests no CPU"
    # What is above the request can be taken back at any time, by ending the pod.
    for name in ("memory", "ephemeral-storage"):
        if name not in limits or requests.get(name) != limits[name]:
            yield f"its request of {name} is not its limit"
    needed = _memory_bytes(settings, trains=container["args"][0] == "trainer")
    if _bytes(limits.get("memory", "0Mi")) < needed:
        yield f"it may need {needed / _MIB:.0f} MiB of memory by docs/sizing.md, and its limit is lower"
    yield from _data_folder(container, spec, settings)


def _data_folder(container: Manifest, spec: Manifest, settings: Settings) -> Iterator[str]:
    folder = re.findall(rf"{PREFIX}DATA_DIR=(\S+)", (ROOT / "Dockerfile").read_text())[0]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container.get("volumeMounts", [])}
    limit = _bytes(mounts.get(folder, {}).get("emptyDir", {}).get("sizeLimit", "0Mi"))
    needed = settings.blob_cache_bytes + settings.max_dataset_bytes
    if limit < needed:
        yield f"{folder} has no emptyDir of at least {needed / _MIB:.0f} MiB, for the cache of blobs and an upload"
    if _bytes(container.get("resources", {}).get("limits", {}).get("ephemeral-storage", "0Mi")) < limit:
        yield f"its ephemeral-storage is less than the sizeLimit of {folder}"


def _memory_bytes(settings: Settings, *, trains: bool) -> float:
    """Return the memory that a container may need, by docs/sizing.md, with one worker and a small base layer."""
    if trains:
        return _TRAINER_BYTES + settings.trainer_memory_bytes
    return (
        _API_BYTES
        + 2 * min(_DATASET_READER_BYTES, settings.trainer_memory_bytes)
        + _CACHED_SHARE * settings.cache_bytes
        + 2 * settings.max_inflight_body_bytes
    )


def _seconds_to_end(spec: Manifest, settings: Settings) -> float:
    """Return the longest time between the end of a pod and the end of its processes, in seconds."""
    pauses = []
    for container in spec["containers"]:
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        pauses.append(float(command[1]))
    return max(pauses) + settings.shutdown_grace_seconds + _SECONDS_TO_END


def _selectors(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield selectors that select no pods, pods that end all at once, and references to nothing."""
    workloads = _of_kind(manifests, "Deployment")
    for manifest in manifests:
        for selector in _selectors_of(manifest):
            if not any(_selects(selector, workload) for workload in workloads):
                yield f"{_title(manifest)}: {selector} selects no pods"
    for workload in workloads:
        if not _selects(workload["spec"]["selector"]["matchLabels"], workload):
            yield f"{_title(workload)}: its selector does not select its own pods"
        for constraint in _pod_spec(workload).get("topologySpreadConstraints", []):
            if not _selects(constraint["labelSelector"]["matchLabels"], workload):
                yield f"{_title(workload)}: it is spread by the labels of others"
        budgets = _of_kind(manifests, "PodDisruptionBudget")
        if sum(_selects(budget["spec"]["selector"]["matchLabels"], workload) for budget in budgets) != 1:
            yield f"{_title(workload)}: not one PodDisruptionBudget, which evictions follow, covers its pods"
    for service in _of_kind(manifests, "Service"):
        selected = [workload for workload in workloads if _selects(service["spec"]["selector"], workload)]
        ports = {port["name"] for workload in selected for port in _ports(workload)}
        if not {port["targetPort"] for port in service["spec"]["ports"]} <= ports:
            yield f"{_title(service)}: the pods have only the ports {sorted(ports)}"
    if len({workload["metadata"]["namespace"] for workload in workloads}) > 1:
        yield "the workloads are in several namespaces"


def _secrets(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield secrets that are written here, and settings that should be secret and are not."""
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            yield f"{_title(manifest)}: secrets are created outside of this folder"
        for name, value in manifest.get("data", {}).items():
            if name in SECRETS or _PASSWORD.search(value):
                yield f"{_title(manifest)}: {name} belongs into a Secret"
    for workload in _of_kind(manifests, "Deployment"):
        for container in _pod_spec(workload)["containers"]:
            referenced = {
                entry["name"] for entry in container.get("env", []) if "secretKeyRef" in entry.get("valueFrom", {})
            }
            if missing := SECRETS.keys() - referenced:
                yield f"{_title(workload)}: {sorted(missing)} do not come from a Secret"


def _scaling(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield autoscalers of something that does not exist, and metrics that `/metrics` does not have."""
    rules = {rule["name"]["as"]: rule for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]}
    names = {(workload["kind"], workload["metadata"]["name"]) for workload in manifests}
    for scaler in _of_kind(manifests, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) not in names:
            yield f"{_title(scaler)}: there is no {target['kind']} {target['name']}"
        for metric in scaler["spec"]["metrics"]:
            name = metric["pods"]["metric"]["name"]
            if name not in rules:
                yield f"{_title(scaler)}: {ADAPTER.name} has no rule for {name}"
                continue
            series = rules[name]["seriesQuery"].partition("{")[0]
            histogram = DEFINITIONS.get(series.removesuffix("_bucket"))
            if series not in DEFINITIONS and (histogram is None or histogram.kind is not Kind.HISTOGRAM):
                yield f"{ADAPTER.name}: {name} is computed from {series}, which /metrics does not have"


def _network(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield ports that pods need and cannot use, and those that they can use and do not need."""
    policies = [manifest["spec"] for manifest in _of_kind(manifests, "NetworkPolicy")]
    denial = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if denial not in policies:
        yield "no NetworkPolicy denies everything that the others do not allow"
    for workload in _of_kind(manifests, "Deployment"):
        own = [policy for policy in policies if _selects(policy["podSelector"].get("matchLabels", {}), workload)]
        rules = [rule for policy in own for rule in policy.get("ingress", [])]
        if not all(rule.get("from") for rule in rules):
            yield f"{_title(workload)}: anyone may connect to it"
        ports = {port["name"] for port in _ports(workload)}
        allowed: set[Any] = {port["port"] for rule in rules for port in rule["ports"]}
        if allowed != ports:
            yield f"{_title(workload)}: it has the ports {sorted(ports)}, and others may connect to {sorted(allowed)}"
        rules = [rule for policy in own for rule in policy.get("egress", [])]
        reached = {(port["protocol"], port["port"]) for rule in rules for port in rule.get("ports", [])}
        if reached != EGRESS or not all(rule.get("ports") for rule in rules):
            yield f"{_title(workload)}: it may connect to {sorted(reached)}, and needs {sorted(EGRESS)}"


def _selectors_of(manifest: Manifest) -> Iterator[Mapping[str, str]]:
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "Service":
            yield spec["selector"]
        case "PodDisruptionBudget":
            yield spec["selector"]["matchLabels"]
        case "NetworkPolicy":
            yield spec["podSelector"].get("matchLabels", {})


def _selects(labels: Mapping[str, str], workload: Manifest) -> bool:
    own: Mapping[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels.items() <= own.items()


def _of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def _pod_spec(workload: Manifest) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def _ports(workload: Manifest) -> list[Mapping[str, Any]]:
    return [port for container in _pod_spec(workload)["containers"] for port in container.get("ports", [])]


def _title(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


def main() -> int:
    """Print the problems of every folder; return the exit status."""
    failed = False
    for folder in kustomizations():
        name = folder.relative_to(ROOT)
        try:
            # The base is not complete: its settings name no bucket, which an overlay does.
            found = (schema_problems if folder == BASE else problems)(build(folder))
            lines = list(found)
        except subprocess.CalledProcessError as error:
            lines = [error.stderr.strip()]
        failed = failed or bool(lines)
        print("\n".join(f"{name}: {line}" for line in lines) or f"{name}: valid")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
