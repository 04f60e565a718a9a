"""Keys on the command line: made in the data folder, kept in profiles, and never shown."""

import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from loraplex.cli.profiles import Profile, profiles_file, read_profiles, store_profile

from app.settings import Auth, Settings
from tests.integration.cli.conftest import Ended, invoke
from tests.integration.cli.test_output import at_a_terminal
from tests.support.keys import bearer
from tests.support.service import serving


class World(NamedTuple):
    """A service that requires keys."""

    url: str
    folder: Path

    def keys(self, *arguments: object, status: int = 0) -> Any:
        """What `loraplex keys` says, on the data folder of the service that runs."""
        ended = invoke("keys", *arguments, "--data-dir", self.folder, url="")
        assert ended.returncode == status, ended.stdout + ended.stderr
        return json.loads(ended.stdout) if status == 0 else ended.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("keys") / "data"
    with serving(Settings(data_dir=folder, base="random:4,2,3", auth=Auth.KEYS)) as (client, _):
        yield World(str(client.base_url).rstrip("/"), folder)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ended]:
    """Run a command of a user whose configuration is in a folder of the test."""

    def runs(*arguments: object, stdin: str = "", status: int = 0, variables: Mapping[str, str] | None = None) -> Ended:
        own = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "LORAPLEX_URL": "", **(variables or {})}
        ended = invoke(*arguments, url="", stdin=stdin, variables=own)
        assert ended.returncode == status, ended.stdout + ended.stderr
        assert not re.search("lpx_[0-9a-f]", ended.stdout + ended.stderr)
        return ended

    return runs


def test_keys_are_made_listed_and_revoked_in_the_data_folder_of_a_service_that_runs(world: World) -> None:
    made = world.keys("create", "--tenant", "acme", "--scope", "read", "--scopes", "train,predict", "--name", "ci")
    assert list(made) == ["id", "key", "tenant", "scopes", "expires_at"]
    assert (made["tenant"], made["scopes"], made["expires_at"]) == ("acme", ["predict", "read", "train"], None)
    listed = {key["id"]: key for key in world.keys("list", "--tenant", "acme")}
    assert (listed[made["id"]]["name"], listed[made["id"]]["revoked_at"]) == ("ci", None)
    assert made["key"] not in json.dumps(listed)
    assert world.keys("list", "--tenant", "nobody") == []
    headers = bearer(made["key"])
    assert httpx.get(f"{world.url}/base", headers=headers).status_code == 200
    assert world.keys("revoke", made["id"])["revoked_at"]
    assert httpx.get(f"{world.url}/base", headers=headers).status_code == 401


def test_a_key_can_be_made_before_a_service_has_run(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    made = World("", folder).keys("create", "--scope", "operator")
    with serving(Settings(data_dir=folder, base="random:4,2,3", auth=Auth.KEYS)) as (client, _):
        assert client.get("/base", headers=bearer(made["key"])).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--scope", "everything"), "everything is not a scope (expected some of predict, read,"),
        (("create", "--scope", "read", "--tenant", "A B"), "tenant must be"),
        (("create", "--scope", "read", "--expires-at", "soon"), "expires_at is not a time"),
        (("revoke", "nothing"), "there is no key nothing"),
    ],
)
def test_a_refused_command_says_why(world: World, arguments: tuple[str, ...], said: str) -> None:
    assert said in world.keys(*arguments, status=1)


def test_a_profile_has_the_address_and_the_key(world: World, run: Callable[..., Ended], tmp_path: Path) -> None:
    first, second = (world.keys("create", "--scope", "read")["key"] for _ in range(2))
    run("login", "--url", world.url, "--profile", "prod", stdin=f"{first}\n")
    run("login", "--url", world.url, stdin=f"{second}\n")
    file = tmp_path / "config" / "loraplex" / "profiles.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    stored = json.loads(file.read_text())
    assert {name: profile["key"] for name, profile in stored.items()} == {"prod": first, "default": second}
    for arguments in (("--profile", "prod", "adapters"), ("adapters", "--profile", "prod"), ("adapters",)):
        run(*arguments)
    # A profile is asked for a new key without its address.
    third = world.keys("create", "--scope", "predict")["key"]
    run("login", "--profile", "prod", stdin=third)
    assert json.loads(file.read_text())["prod"] == {"url": world.url, "key": third}
    assert list(file.parent.iterdir()) == [file]


def test_a_profile_of_an_operator_has_the_tenant_that_it_acts_for(
    world: World, run: Callable[..., Ended], tmp_path: Path
) -> None:
    key = world.keys("create", "--scope", "operator")["key"]
    world.keys("create", "--tenant", "initech", "--scope", "read")
    refused = run("login", "--url", world.url, "--tenant", "nobody", stdin=key, status=1)
    assert "nobody" in refused.stderr
    run("login", "--url", world.url, "--tenant", "initech", stdin=key)
    file = tmp_path / "config" / "loraplex" / "profiles.json"
    assert json.loads(file.read_text()) == {"default": {"url": world.url, "key": key, "tenant": "initech"}}
    httpx.put(
        f"{world.url}/adapters/theirs",
        json={"A": [[1.0], [1.0]], "B": [[1.0] * 4]},
        headers={**bearer(key), "X-Tenant": "initech"},
    ).raise_for_status()
    assert "theirs" in run("adapters").stdout
    assert "theirs" not in run("adapters", "--tenant", "default").stdout


def test_a_key_of_the_environment_goes_before_the_default_profile(world: World, run: Callable[..., Ended]) -> None:
    run("login", "--url", world.url, stdin=world.keys("create", "--scope", "read")["key"])
    key = world.keys("create", "--scope", "read")
    variables = {"LORAPLEX_URL": world.url, "LORAPLEX_KEY": key["key"]}
    run("adapters", variables=variables)
    world.keys("revoke", key["id"])
    refused = run("adapters", variables=variables, status=1)
    assert "was revoked" in refused.stderr
    assert f"loraplex login --url {world.url}" in refused.stderr
    run("adapters")


def test_a_key_that_the_service_refuses_is_not_kept(world: World, run: Callable[..., Ended], tmp_path: Path) -> None:
    key = world.keys("create", "--scope", "read")["key"]
    for wrong in (key[:-1], key[:30] + ("x" if key[30] != "x" else "y") + key[31:], ""):
        run("login", "--url", world.url, stdin=wrong, status=2 if not wrong else 1)
    assert not (tmp_path / "config").exists()


def test_profiles_that_others_can_read_or_that_are_malformed_are_refused(
    world: World, run: Callable[..., Ended], tmp_path: Path
) -> None:
    run("login", "--url", world.url, "--profile", "prod", stdin=world.keys("create", "--scope", "read")["key"])
    file = tmp_path / "config" / "loraplex" / "profiles.json"
    file.chmod(0o640)
    assert f"chmod 600 {file}" in run("--profile", "prod", "adapters", status=1).stderr
    file.chmod(0o600)
    assert "There is no profile 'other' (there is: prod)" in run("--profile", "other", "adapters", status=2).stderr
    assert "--profile or --url" in run("--profile", "prod", "--url", world.url, "adapters", status=2).stderr
    for content in ("", "[]", '{"prod": {}}', '{"prod": 3}'):
        file.write_text(content)
        assert "is not a file of profiles" in run("--profile", "prod", "adapters", status=1).stderr


def test_profiles_that_are_stored_at_the_same_time_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    names = [f"p{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: store_profile(name, Profile("http://a.test", name)), names))
    assert {name: profile.key for name, profile in read_profiles().items()} == {name: name for name in names}
    assert stat.S_IMODE(profiles_file().stat().st_mode) == 0o600
    assert list(profiles_file().parent.iterdir()) == [profiles_file()]


def test_a_terminal_does_not_show_the_key_that_is_typed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = world.keys("create", "--scope", "read")["key"]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    shown, status = at_a_terminal("login", "--url", world.url, typed=f"{key}\n")
    assert (status, f"Key for {world.url}: " in shown) == (0, True), shown
    assert key not in shown
    assert json.loads((tmp_path / "loraplex" / "profiles.json").read_text())["default"]["key"] == key
