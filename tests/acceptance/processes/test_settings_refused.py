"""What the service cannot start with is said at once, by name, and it does not start."""

import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from app.processes.trainer import run_trainer
from app.settings import EXIT_CONFIG, Settings, SettingsError, load_settings
from tests.support.deadlines import scaled
from tests.support.log_lines import logging_restored
from tests.support.service import LORAPLEX, environment, free_port

pytestmark = pytest.mark.slow

WITHOUT_TORCH_SECONDS = 15
WITH_TORCH_SECONDS = 45


def _refused(arguments: list[str], seconds: float, **settings: object) -> str:
    """The one message of a command that ends by itself, and not well."""
    begin = time.monotonic()
    ended = subprocess.run(
        [LORAPLEX, *arguments], env=environment(**settings), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == EXIT_CONFIG, ended.stderr
    assert time.monotonic() - begin < scaled(seconds)
    assert "Traceback" not in ended.stderr
    assert "loraplex: " in ended.stderr
    return ended.stderr


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prot": 8000}, "LORAPLEX_PROT"),
        ({"port": "http"}, "LORAPLEX_PORT"),
        ({"port": 65536}, "LORAPLEX_PORT"),
        ({"workers": 0}, "LORAPLEX_WORKERS"),
        ({"trainers": -1}, "LORAPLEX_TRAINERS"),
        ({"workers": 1.5}, "LORAPLEX_WORKERS"),
        ({"allow_open": "perhaps"}, "LORAPLEX_ALLOW_OPEN"),
        ({"dtype": "float16"}, "LORAPLEX_DTYPE"),
        ({"lease_seconds": "nan"}, "LORAPLEX_LEASE_SECONDS"),
        ({"shutdown_grace_seconds": 0}, "LORAPLEX_SHUTDOWN_GRACE_SECONDS"),
        ({"drain_seconds": 30}, "LORAPLEX_DRAIN_SECONDS is 30, and has to be less than LORAPLEX_SHUTDOWN_GRACE"),
        ({"replica_name": "east 1"}, "LORAPLEX_REPLICA_NAME"),
        ({"executor": "dask"}, "LORAPLEX_EXECUTOR"),
        ({"executor": "ray://head"}, "LORAPLEX_EXECUTOR"),
        ({"executor": "ray://head:10001"}, "LORAPLEX_EXECUTOR is ray://head:10001, and blobs are in the folder"),
        ({"ray_gpus": -1}, "LORAPLEX_RAY_GPUS"),
        ({"max_body_bytes": 1}, "LORAPLEX_MAX_BODY_BYTES"),
        ({"cache_bytes": "1 GiB"}, "LORAPLEX_CACHE_BYTES"),
        ({"base": ""}, "LORAPLEX_BASE"),
        ({"host": "0.0.0.0"}, "LORAPLEX_ALLOW_OPEN"),
        ({"host": "::"}, "LORAPLEX_ALLOW_OPEN"),
        ({"host": "example.org"}, "LORAPLEX_ALLOW_OPEN"),
        ({"allowed_hosts": "api,https://example.org"}, "LORAPLEX_ALLOWED_HOSTS: 'https://example.org' is not"),
    ],
)
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], named: str) -> None:
    for name, value in environment(**settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=named):
        load_settings()


def test_a_service_open_to_the_network_is_started_only_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_HOST", "0.0.0.0")
    monkeypatch.setenv("LORAPLEX_ALLOW_OPEN", "true")
    assert load_settings().host == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_permission(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("LORAPLEX_HOST", host)
    assert load_settings().host == host


def test_the_clients_own_variable_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_URL", "http://127.0.0.1:8000")
    load_settings()


def test_every_bad_setting_is_said_and_the_command_ends(tmp_path: Path) -> None:
    message = _refused(["serve", "--data-dir", str(tmp_path)], WITHOUT_TORCH_SECONDS, port=-1, workers="two")
    assert "LORAPLEX_PORT" in message
    assert "LORAPLEX_WORKERS" in message


def test_an_unknown_setting_ends_the_command(tmp_path: Path) -> None:
    assert "LORAPLEX_PROT" in _refused(["serve", "--data-dir", str(tmp_path)], WITHOUT_TORCH_SECONDS, prot=8000)


def test_listening_on_every_address_without_permission_is_refused(tmp_path: Path) -> None:
    message = _refused(["serve", "--data-dir", str(tmp_path), "--host", "0.0.0.0"], WITHOUT_TORCH_SECONDS)
    assert "LORAPLEX_ALLOW_OPEN" in message


def test_a_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        message = _refused(["serve", "--data-dir", str(folder)], WITHOUT_TORCH_SECONDS)
        assert f"LORAPLEX_DATA_DIR is {folder}" in message


def test_an_address_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = str(taken.getsockname()[1])
        message = _refused(["serve", "--data-dir", str(tmp_path), "--port", port], WITHOUT_TORCH_SECONDS)
    assert f"port {port}" in message


def test_a_service_without_its_base_layer_ends(tmp_path: Path) -> None:
    arguments = ["serve", "--data-dir", str(tmp_path / "data"), "--base", str(tmp_path / "missing.safetensors")]
    assert "missing.safetensors" in _refused([*arguments, "--port", "0"], WITH_TORCH_SECONDS, trainers=0)


def test_a_trainer_without_its_base_layer_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(data_dir=tmp_path / "data", base=str(tmp_path / "missing.safetensors"))
    with logging_restored(), pytest.raises(SystemExit) as ended:
        run_trainer(settings, threading.Event())
    assert ended.value.code == EXIT_CONFIG
    assert "missing.safetensors" in capsys.readouterr().err
