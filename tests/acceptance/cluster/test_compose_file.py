"""deploy/compose.scale.yml and deploy/haproxy.cfg, without an engine and without containers."""

import os
import re
import subprocess
from typing import Any

import pytest
import yaml

from app.settings import PREFIX, Settings
from tests.support.cluster import HAPROXY_CONFIG
from tests.support.external_programs import program

FOLDER = HAPROXY_CONFIG.parent
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.scale.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [service for service in SERVICES.values() if "LORAPLEX_DATABASE_URL" in service.get("environment", {})]
SECRETS = {"POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_haproxy_accepts_its_configuration() -> None:
    addresses = {"API_1": "127.0.0.1:1", "API_2": "127.0.0.1:2"}
    checked = subprocess.run(
        [program("haproxy"), "-c", "-f", HAPROXY_CONFIG], env=os.environ | addresses, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr


def test_haproxy_names_the_services_of_the_compose_file() -> None:
    servers = re.findall(r'server (\S+) "\$\{\w+-(\S+):8000\}"', HAPROXY_CONFIG.read_text())
    assert {name for pair in servers for name in pair} == {name for name in SERVICES if name.startswith("api")}


def test_the_settings_of_the_compose_file_exist() -> None:
    names = {name for service in OURS for name in service["environment"] if name.startswith(PREFIX)}
    assert names <= {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    grace = {float(service["environment"]["LORAPLEX_SHUTDOWN_GRACE_SECONDS"]) for service in OURS}
    assert max(grace) < min(float(service["stop_grace_period"].removesuffix("s")) for service in OURS)


def test_a_drain_is_longer_than_haproxy_takes_to_notice_it() -> None:
    def seconds(name: str) -> float:
        match = re.search(rf"\b{name} (\d+)(ms|s)\b", HAPROXY_CONFIG.read_text())
        assert match is not None
        return int(match[1]) / (1000 if match[2] == "ms" else 1)

    failures = re.search(r"\bfall (\d+)\b", HAPROXY_CONFIG.read_text())
    assert failures is not None
    notices = seconds("inter") + (int(failures[1]) - 1) * seconds("fastinter") + seconds("timeout check")
    assert notices < min(float(service["environment"]["LORAPLEX_DRAIN_SECONDS"]) for service in OURS)


def test_replicas_start_when_the_bucket_was_made() -> None:
    for service in OURS:
        bucket = re.fullmatch(r"s3://(\w+)/.*", service["environment"]["LORAPLEX_BLOB_URL"])
        assert bucket is not None
        assert f's3.bucket.create -name {bucket[1]}"' in SERVICES["bucket"]["command"][0]
        assert service["depends_on"]["bucket"] == {"condition": "service_completed_successfully"}


def test_no_secret_has_a_default() -> None:
    text = (FOLDER / "compose.scale.yml").read_text()
    for secret in SECRETS:
        uses = re.findall(rf"\$\{{{secret}\b([^}}]*)\}}", text)
        assert uses, secret
        assert all(use.startswith(":?") for use in uses), secret
    example = (FOLDER / "env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == SECRETS


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in service or name == "haproxy"
