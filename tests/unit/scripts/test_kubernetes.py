"""Test scripts/kubernetes.py: the manifests are valid, and each check finds the mistake that it is for."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.http.endpoints import ENDPOINTS
from app.settings import Settings
from scripts import kubernetes
from tests.support.external_programs import skip_or_fail

# They run kubectl, and `make check` checks the manifests too.
pytestmark = pytest.mark.slow
OVERLAYS = [folder for folder in kubernetes.kustomizations() if folder != kubernetes.BASE]
Document = dict[str, Any]
Change = Callable[[dict[str, Document]], object]


def built(folder: Path) -> list[Document]:
    """What a folder is built to."""
    try:
        return [dict(manifest) for manifest in kubernetes.build(folder)]
    except SystemExit as error:
        skip_or_fail(str(error))


@pytest.fixture(scope="module")
def overlay() -> list[Document]:
    return built(OVERLAYS[0])


@pytest.fixture
def manifests(overlay: list[Document]) -> list[Document]:
    return copy.deepcopy(overlay)


def named(manifests: list[Document]) -> dict[str, Document]:
    """The manifests by kind and name, without the digest in the name of the ConfigMap."""
    return {f"{each['kind']} {each['metadata']['name'].partition('-g')[0]}": each for each in manifests}


def pod(documents: dict[str, Document], name: str = "api") -> Document:
    spec: Document = documents[f"Deployment {name}"]["spec"]["template"]["spec"]
    return spec


def container(documents: dict[str, Document], name: str = "api") -> Document:
    spec: Document = pod(documents, name)["containers"][0]
    return spec


def config(documents: dict[str, Document]) -> Document:
    (data,) = (document["data"] for document in documents.values() if document["kind"] == "ConfigMap")
    settings: Document = data
    return settings


def policy(documents: dict[str, Document], name: str) -> Document:
    spec: Document = documents[f"NetworkPolicy {name}"]["spec"]
    return spec


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_an_overlay_is_valid(folder: Path) -> None:
    assert kubernetes.problems(built(folder)) == []


def test_the_base_has_the_fields_and_types_of_kubernetes() -> None:
    assert list(kubernetes.schema_problems(built(kubernetes.BASE))) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(lambda all_: pod(all_).update(replicaz=1), "replicaz", id="unknown field"),
        pytest.param(lambda all_: all_["Deployment trainer"]["spec"].update(replicas="1"), "replicas", id="type"),
        pytest.param(lambda all_: all_["Deployment api"]["spec"].pop("selector"), "selector", id="missing field"),
        pytest.param(lambda all_: all_["Service api"].update(kind="Server"), "Server", id="unknown kind"),
        pytest.param(lambda all_: all_["Service api"].update(apiVersion="v2"), "v2", id="unknown version"),
    ],
)
def test_the_schemas_are_strict(manifests: list[Document], change: Change, problem: str) -> None:
    change(named(manifests))
    assert any(problem in line for line in kubernetes.schema_problems(manifests))


def rename_label(all_: dict[str, Document]) -> None:
    all_["Deployment api"]["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] = "web"


def literal_secret(all_: dict[str, Document]) -> None:
    entry = container(all_)["env"][0]
    entry.pop("valueFrom")
    entry["value"] = kubernetes.SECRETS[entry["name"]]


def other_metric(all_: dict[str, Document]) -> None:
    metric = all_["HorizontalPodAutoscaler api"]["spec"]["metrics"][0]["pods"]["metric"]
    metric["name"] = "loraplex_queue_hours"


MISTAKES: list[tuple[Change, str]] = [
    (lambda all_: container(all_).pop("startupProbe"), "no startupProbe"),
    (lambda all_: container(all_).pop("readinessProbe"), "no readinessProbe"),
    (lambda all_: container(all_, "trainer").pop("livenessProbe"), "no livenessProbe"),
    (lambda all_: container(all_)["resources"].pop("limits"), "memory is not its limit"),
    (lambda all_: container(all_)["resources"]["requests"].pop("cpu"), "requests no CPU"),
    (lambda all_: container(all_)["resources"]["limits"].update(memory="1Gi"), "may need"),
    (lambda all_: container(all_, "trainer").pop("securityContext"), "its securityContext"),
    (lambda all_: container(all_)["securityContext"].update(readOnlyRootFilesystem=False), "its securityContext"),
    (lambda all_: container(all_).pop("volumeMounts"), "no emptyDir"),
    (lambda all_: pod(all_)["securityContext"].update(runAsUser=0), "the securityContext of the pods"),
    (lambda all_: pod(all_).pop("automountServiceAccountToken"), "a token"),
    (lambda all_: pod(all_).pop("enableServiceLinks"), "variables of Services"),
    (lambda all_: pod(all_).pop("topologySpreadConstraints"), "one machine"),
    (lambda all_: pod(all_).update(terminationGracePeriodSeconds=30), "terminationGracePeriodSeconds is 30"),
    (lambda all_: config(all_).update(LORAPLEX_SHUTDOWN_GRACE_SECONDS="60"), "terminationGracePeriodSeconds is"),
    (lambda all_: config(all_).update(LORAPLEX_CACHE_BYTE="1"), "cache_byte"),
    (lambda all_: config(all_).update(LORAPLEX_CACHE_BYTES="-1"), "cache_bytes"),
    (lambda all_: config(all_).pop("LORAPLEX_AUTH"), "requests need no key"),
    (lambda all_: config(all_).update(OTHER="http://user:password@host"), "OTHER belongs into a Secret"),
    (lambda all_: config(all_).update(AWS_SECRET_ACCESS_KEY="x"), "AWS_SECRET_ACCESS_KEY belongs into a Secret"),
    (literal_secret, "do not come from a Secret"),
    (rename_label, "selects no pods"),
    (rename_label, "does not select its own pods"),
    (rename_label, "spread by the labels of others"),
    (lambda all_: all_["Service api"]["spec"]["ports"][0].update(targetPort="web"), "only the ports"),
    (
        lambda all_: all_["PodDisruptionBudget api"]["spec"]["selector"].update(matchLabels={"a": "b"}),
        "covers its pods",
    ),
    (other_metric, "no rule for loraplex_queue_hours"),
    (
        lambda all_: all_["HorizontalPodAutoscaler api"]["spec"]["scaleTargetRef"].update(name="web"),
        "no Deployment web",
    ),
    (lambda all_: policy(all_, "deny-all").update(policyTypes=["Ingress"]), "denies everything"),
    (lambda all_: policy(all_, "api-from-ingress")["ingress"][0].pop("from"), "anyone may connect"),
    (lambda all_: policy(all_, "api-from-ingress")["ingress"][0]["ports"].clear(), "has the ports ['http']"),
    (lambda all_: policy(all_, "storage")["egress"][0]["ports"].pop(0), "may connect to"),
    (lambda all_: policy(all_, "dns")["egress"].append({"to": []}), "may connect to"),
    (lambda all_: all_["Deployment trainer"]["metadata"].update(namespace="other"), "several namespaces"),
]


@pytest.mark.parametrize(("change", "problem"), MISTAKES, ids=[problem for _, problem in MISTAKES])
def test_a_mistake_is_found(manifests: list[Document], change: Change, problem: str) -> None:
    change(named(manifests))
    assert any(problem in line for line in kubernetes.other_problems(manifests))


def test_a_secret_in_the_manifests_is_found(manifests: list[Document]) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"url": "x"}}
    assert any("Secret keys" in line for line in kubernetes.other_problems([*manifests, secret]))


def test_a_rule_of_the_adapter_for_another_metric_is_found(
    manifests: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(kubernetes.ADAPTER.read_text().replace("loraplex_queue_seconds_bucket", "loraplex_wait_bucket"))
    monkeypatch.setattr(kubernetes, "ADAPTER", rules)
    assert any(
        "loraplex_wait_bucket, which /metrics does not have" in each for each in kubernetes.other_problems(manifests)
    )


def test_the_probes_ask_for_endpoints_that_need_no_key(manifests: list[Document]) -> None:
    api = container(named(manifests))
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    paths = {api[probe]["httpGet"]["path"] for probe in probes}
    assert paths <= {endpoint.path for endpoint in ENDPOINTS if endpoint.scope is None}
    assert {api[probe]["httpGet"]["port"] for probe in probes} == {"http"}
    assert [port["containerPort"] for port in api["ports"]] == [Settings.model_fields["port"].default]


def test_both_workloads_have_the_same_secrets_and_the_same_image(manifests: list[Document]) -> None:
    documents = named(manifests)
    secrets = [
        [entry for entry in container(documents, name)["env"] if "secretKeyRef" in entry.get("valueFrom", {})]
        for name in ("api", "trainer")
    ]
    assert secrets[0] == secrets[1]
    images = {container(documents, name)["image"] for name in ("api", "trainer")}
    assert len(images) == 1
    assert re.fullmatch(r".+:[0-9][^:]*", images.pop())


def test_an_invalid_folder_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    monkeypatch.setattr(kubernetes, "ROOT", tmp_path)
    monkeypatch.setattr(kubernetes, "kustomizations", lambda: [tmp_path])
    try:
        assert kubernetes.main() == 1
    except SystemExit as error:
        skip_or_fail(str(error))
    assert "missing.yaml" in capsys.readouterr().out
