"""Profiles: addresses of services with a key for each, in a file that only its user can read.

Arguments of a process can be read by every user of a machine, so no command takes a key as an argument.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

from loraplex.calls import KEY_VARIABLE, URL_VARIABLE, address, given
from loraplex.cli.errors import BadFile, WrongUsage

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

DEFAULT_PROFILE = "default"
_FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class Profile:
    """Address of a service, and a key for it; None if it needs none."""

    url: str
    key: str | None = field(repr=False)
    tenant: str | None = None
    """Tenant that an operator acts for; None for `default`, and for the key's own."""


def profiles_file() -> Path:
    """Return the path of the file, which may not exist."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "loraplex" / "profiles.json"


def find_profile(name: str | None, *, url: str | None) -> Profile:
    """Return the address and the key for a command: those of a profile, or of `url` and the environment.

    The profile `default` is used if nothing else says where the service is. Raises `WrongUsage` and `BadFile`.
    """
    if name is not None and url is not None:
        raise WrongUsage("A profile has the address already: say either --profile or --url.")
    if name is not None:
        profiles = read_profiles()
        if name not in profiles:
            known = ", ".join(sorted(profiles)) or "none"
            raise WrongUsage(f"There is no profile {name!r} (there is: {known}): loraplex login --profile {name}")
        return profiles[name]
    environment = (os.environ.get(URL_VARIABLE), os.environ.get(KEY_VARIABLE))
    if url is None and not any(environment) and (stored := read_profiles().get(DEFAULT_PROFILE)) is not None:
        return stored
    return Profile(address(url), os.environ.get(KEY_VARIABLE) or None)


def read_profiles() -> dict[str, Profile]:
    """Return all profiles by name; raise `BadFile` if the file is malformed, or if other users can read it."""
    file = profiles_file()
    try:
        with file.open("rb") as opened:
            if os.name == "posix" and os.fstat(opened.fileno()).st_mode & _FOR_OTHERS:
                raise BadFile(f"Other users can read {file}, which has keys: chmod 600 {file}")
            stored = json.load(opened)
        return {
            str(name): Profile(str(entry["url"]), str(entry["key"]), entry.get("tenant"))
            for name, entry in stored.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{file} is not a file of profiles: {type(error).__name__}") from None


def store_profile(name: str, profile: Profile) -> Path:
    """Store a profile, in place of one of the same name; return the path of the file."""
    file = profiles_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(file.parent):
        _write(file, read_profiles() | {name: profile})
    return file


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process store a profile meanwhile: it would put back the profiles from before this one."""
    if fcntl is None:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(file: Path, profiles: Mapping[str, Profile]) -> None:
    # A temporary file has mode 600 from the beginning, and the old file stays whole until the new one is.
    with NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as written:
        try:
            json.dump({key: given(asdict(value)) for key, value in sorted(profiles.items())}, written, indent=2)
            written.close()
            os.replace(written.name, file)
        except BaseException:
            os.unlink(written.name)
            raise
