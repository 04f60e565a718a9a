"""Settings: environment variables `LORAPLEX_*`, each with its bounds, default and description."""

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters.errors import BaseNotLoadable, CatalogNotLoadable
from adapters.storage.blob_location import BlobLocation
from app.http.host_policy import parse_allowed_hosts

PREFIX = "LORAPLEX_"
POSTGRESQL = "postgresql+psycopg://"
# Values of `EXECUTOR`: child processes, and the beginning of the address of a cluster.
LOCAL, RAY_CLIENT = "local", "ray://"
BUNDLED = "digits"
# Exit status (sysexits.h) of a process that cannot start with these settings, so that a restart is useless.
EXIT_CONFIG = 78
_CLIENT_SETTINGS = {"LORAPLEX_URL", "LORAPLEX_KEY"}


class SettingsError(Exception):
    """Settings with which the service cannot start; the message names each of them."""


class Auth(StrEnum):
    """Whether requests need a key."""

    OPEN = "open"
    """Every caller may do everything."""
    KEYS = "keys"


class LogFormat(StrEnum):
    """Format of the log."""

    AUTO = "auto"
    """`console` if standard error is a terminal, else `json`."""
    JSON = "json"
    CONSOLE = "console"


class LogRequests(StrEnum):
    """Requests that have a line in the log."""

    ALL = "all"
    FAILED = "failed"
    NONE = "none"


class Settings(BaseSettings):
    """Settings of the service. The docstrings of the fields are the descriptions in the documentation."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str = Field(BUNDLED, min_length=1)
    """The base layer: `digits` (the bundled classifier), a safetensors path, `random:IN,OUT,SEED`, `identity:DIM` or
    `zeros:IN,OUT`."""
    base_weight_key: str = Field("weight", min_length=1)
    """Name of W in the safetensors file."""
    base_bias_key: str = Field("bias", min_length=1)
    """Name of b in the file, which may have none."""
    base_labels: str | None = Field(None, min_length=1)
    """Labels of the first outputs of the base layer: a JSON list, or the path of a file with one. By default, the entry
    `labels` in the metadata of the base layer's file, if there is one."""
    feature_space: str | None = Field(None, min_length=1, max_length=200)
    """Name of the encoder that feeds the layer, such as `minilm-l6-v2@1`. It is recorded in versions and checked,
    because the width alone does not distinguish encoders."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of W and b on CUDA; on the CPU always float32."""
    data_dir: Annotated[Path, AfterValidator(Path.absolute)] = Path("data")
    """Folder of all persistent data and of temporary files."""
    database_url: str | None = None
    """Database of the catalogue: `postgresql+psycopg://user:password@host/name`, which needs the extra `postgres`. By
    default, a file in the data folder (SQLite)."""
    max_stale_seconds: float = Field(0, ge=0, le=86_400)
    """Seconds for which adapters in memory go on answering if the database of `DATABASE_URL` cannot be reached, with
    `Age` in the answer. With 0, every answer includes every acknowledged change."""
    blob_url: str | None = Field(None, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._/-]*)?$")
    """`s3://bucket/prefix` of the bytes of adapters and data sets; by default they are in a folder in `DATA_DIR`. The
    usual `AWS_*` variables have the credentials and the region, and `AWS_ENDPOINT_URL` names another server than
    AWS's. It needs the extra `s3`."""
    blob_cache_bytes: int = Field(10 * 2**30, ge=0, le=2**50)
    """Maximum size of the copies of blobs in a bucket, in `DATA_DIR/blob-cache`, in bytes, for all processes of a
    machine. Files that were used within the last minute may exceed it."""
    allow_mixed_storage: bool = False
    """Allow a database of `DATABASE_URL` with blobs in the data folder, which all processes then have to share, and a
    bucket with SQLite, whose file is on one machine only. Allow a Ray cluster whose nodes share the data folder."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    tls_cert: Annotated[Path, AfterValidator(Path.absolute)] | None = None
    """File (PEM) with the certificate of the service and those that sign it. With it, the service speaks HTTPS only."""
    tls_key: Annotated[Path, AfterValidator(Path.absolute)] | None = None
    """File (PEM) with the private key of the certificate, without a passphrase."""
    workers: int = Field(1, ge=1, le=64)
    """Number of processes that answer requests, each with its own cache."""
    trainers: int = Field(1, ge=0, le=64)
    """Number of processes that train; 0 if `loraplex trainer` runs separately."""
    auth: Auth = Auth.OPEN
    """`keys`: every request needs a key, except health checks and the sign-in page. `open`: anyone who can reach the
    port may do everything."""
    allow_open: bool = False
    """Allow `AUTH=open` on other addresses than loopback: the network in front of the service is trusted then."""
    allowed_hosts: str | None = None
    """Host names that requests may be addressed to, separated by commas, in addition to `localhost`, `127.0.0.1`,
    `[::1]` and the value of `LORAPLEX_HOST` if it is not a wildcard. Ports are ignored; `*` allows any host."""
    max_body_bytes: int = Field(64 * 2**20, ge=1024, le=2**31)
    """Maximum size of a request body, in bytes."""
    max_head_bytes: int = Field(64 * 2**10, ge=2**12, le=2**20)
    """Maximum size of the head of a request (its line and its headers), and of trailers, in bytes; a larger one is 431.
    """
    max_connections: int = Field(8192, ge=1, le=2**20)
    """Maximum number of open connections, per worker; fewer if the limit of open files is lower. Beyond it, the
    connection that has been idle longest is closed."""
    max_dataset_bytes: int = Field(4 * 2**30, ge=1024, le=2**44)
    """Maximum size of a data set, in bytes: as uploaded, and as stored."""
    max_predict_json_bytes: int = Field(4 * 2**20, ge=1024, le=2**31)
    """Maximum size of the JSON of `/predict` and of `/v2/…/infer`, in bytes, because JSON is parsed in one step."""
    max_inflight_body_bytes: int = Field(512 * 2**20, ge=1024, le=2**44)
    """Maximum size of all request bodies in memory, in bytes, per worker; beyond it, requests are 503, except those of
    a tenant with less than an equal share. A larger body than this is never accepted. Data sets are streamed to a file
    and not counted."""
    max_rows: int = Field(4096, ge=1, le=2**20)
    """Maximum number of rows in one predict request."""
    max_rank: int = Field(256, ge=1, le=2**14)
    """Maximum rank of an adapter."""
    max_queued_jobs: int = Field(100, ge=1, le=10**6)
    """Maximum number of queued jobs; beyond it, requests are 429."""
    max_groups: int = Field(100_000, ge=1, le=10**7)
    """Maximum number of adapters that one job trains."""
    trainer_memory_bytes: int = Field(4 * 2**30, ge=2**29, le=2**44)
    """Maximum memory of the fit process, and of the process that reads an uploaded data set, in bytes; a training that
    is estimated to need more is refused."""
    trainer_threads: int = Field(1, ge=1, le=256)
    """Threads of a fit. Another number may result in other digests."""
    executor: str = Field("local", pattern=r"^(local|ray|ray://[A-Za-z0-9._-]+:[0-9]{1,5})$")
    """Where fits run: `local` (a child process of the trainer), `ray` (a Ray cluster that each trainer starts on its
    machine), or `ray://host:port` (Ray Client of a cluster). Ray needs the extra `ray`, and a cluster needs `BLOB_URL`,
    or `ALLOW_MIXED_STORAGE=true` if its nodes share `DATA_DIR`."""
    ray_gpus: float = Field(0, ge=0, le=64)
    """GPUs that a fit asks for on a Ray cluster, such as 0.5 for two fits on a GPU; with 0, fits run on CPUs there."""
    cache_bytes: int = Field(2**30, ge=0, le=2**44)
    """Size of the adapter cache, in bytes, per worker."""
    queue_rows: int = Field(16_384, ge=1, le=2**24)
    """Maximum number of waiting rows of predict requests, per worker; beyond it, a request is 429 unless its tenant has
    less than an equal share."""
    max_batch_rows: int = Field(256, ge=1, le=2**16)
    """Maximum number of rows in a batch. A larger request is split, so that other requests wait for at most one batch.
    """
    lease_seconds: float = Field(15, ge=1, le=3600)
    """Seconds after its last heartbeat after which a trainer counts as dead, and after which a stopped child process
    (SIGSTOP) is killed."""
    shutdown_grace_seconds: float = Field(30, ge=1, le=3600)
    """Seconds that requests in flight have to finish after SIGTERM, `DRAIN_SECONDS` included."""
    drain_seconds: float = Field(0.5, ge=0, le=3600)
    """Seconds after SIGTERM in which the service still accepts requests, while `/readyz` answers 503 and each answer
    closes its connection. A load balancer needs that long to notice; fewer than `SHUTDOWN_GRACE_SECONDS`."""
    replica_name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Name of this replica in the header `X-Served-By` of each answer. By default, the host name if `DATABASE_URL` is
    set, and otherwise answers have no such header."""
    quarantine_days: int = Field(7, ge=0, le=3650)
    """Days that files to which the catalogue does not refer are kept in `quarantine/`; 0 removes them at the next
    purge."""
    trash_days: int = Field(7, ge=0, le=3650)
    """Days that the bytes of deleted adapters are kept, so that they can be restored; 0 removes them at once."""
    scrub_days: int = Field(30, ge=0, le=3650)
    """Days within which every stored file is read again in the background and compared with its digest; 0 turns that
    off."""
    log_format: LogFormat = LogFormat.AUTO
    """`json` (one object per line), `console` (text), or `auto`: `console` if standard error is a terminal, otherwise
    `json`."""
    log_requests: LogRequests = LogRequests.ALL
    """Log a line for each request (`all`), for each failed request (`failed`: 400 and above), or for `none`. A process
    writes at most 1000 lines per second for requests that succeeded and 1000 for those that failed, and then one with
    the number of lines that were left out."""
    traces: bool = False
    """Send OpenTelemetry traces by OTLP over HTTP to the address in the standard `OTEL_*` variables
    (`OTEL_EXPORTER_OTLP_ENDPOINT`, by default http://localhost:4318)."""

    @field_validator("base")
    @classmethod
    def _absolute_if_file(cls, base: str) -> str:
        return str(Path(base).absolute()) if base != BUNDLED and Path(base).is_file() else base

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, setting: str | None) -> str | None:
        if setting is not None and not setting.startswith(POSTGRESQL):
            raise ValueError(f"it has to begin with {POSTGRESQL}")
        if setting is not None and find_spec("psycopg") is None:
            raise ValueError('the driver is not installed: pip install "loraplex-server[postgres]"')
        return setting

    @field_validator("base_labels")
    @classmethod
    def _absolute_if_path(cls, setting: str | None) -> str | None:
        return setting if setting is None or setting.lstrip().startswith("[") else str(Path(setting).absolute())

    @field_validator("allowed_hosts")
    @classmethod
    def _is_a_list_of_hosts(cls, setting: str | None) -> str | None:
        parse_allowed_hosts(setting or "")
        return setting

    @property
    def blob_location(self) -> BlobLocation:
        """Location of the blobs."""
        return BlobLocation(
            folder=self.data_dir,
            url=self.blob_url,
            cache_bytes=self.blob_cache_bytes,
            quarantine_days=self.quarantine_days,
        )

    @property
    def served_by(self) -> str | None:
        """Value of `X-Served-By`; None for no such header."""
        if self.replica_name is not None or self.database_url is None:
            return self.replica_name
        return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]

    @model_validator(mode="after")
    def _drain_within_grace(self) -> "Settings":
        if self.drain_seconds >= self.shutdown_grace_seconds:
            raise ValueError(
                f"{PREFIX}DRAIN_SECONDS is {self.drain_seconds:g}, and has to be less than "
                f"{PREFIX}SHUTDOWN_GRACE_SECONDS, which is {self.shutdown_grace_seconds:g}"
            )
        return self

    @model_validator(mode="after")
    def _certificate_with_key(self) -> "Settings":
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("KEY", "CERT") if self.tls_cert is None else ("CERT", "KEY")
            raise ValueError(f"{PREFIX}TLS_{given} needs {PREFIX}TLS_{missing}: TLS takes a certificate and its key")
        return self

    @model_validator(mode="after")
    def _storage_of_one_kind(self) -> "Settings":
        if self.blob_url is not None and find_spec("obstore") is None:
            raise ValueError(f'{PREFIX}BLOB_URL needs an extra: pip install "loraplex-server[s3]"')
        if self.allow_mixed_storage or (self.database_url is None) == (self.blob_url is None):
            return self
        if self.blob_url is None:
            raise ValueError(
                f"{PREFIX}DATABASE_URL is set, and blobs are in the folder {PREFIX}DATA_DIR: set "
                f"{PREFIX}ALLOW_MIXED_STORAGE=true if all processes share that folder"
            )
        raise ValueError(
            f"{PREFIX}BLOB_URL is {self.blob_url}, and the catalogue is SQLite, which is on one machine only: set "
            f"{PREFIX}ALLOW_MIXED_STORAGE=true if that is on purpose"
        )

    @model_validator(mode="after")
    def _cluster_that_finds_the_blobs(self) -> "Settings":
        if self.executor != LOCAL and find_spec("ray") is None:
            raise ValueError(f'{PREFIX}EXECUTOR={self.executor} needs an extra: pip install "loraplex-server[ray]"')
        if self.executor.startswith(RAY_CLIENT) and self.blob_url is None and not self.allow_mixed_storage:
            raise ValueError(
                f"{PREFIX}EXECUTOR is {self.executor}, and blobs are in the folder {PREFIX}DATA_DIR: set "
                f"{PREFIX}BLOB_URL, or {PREFIX}ALLOW_MIXED_STORAGE=true if all nodes share that folder"
            )
        return self

    @model_validator(mode="after")
    def _open_only_on_purpose(self) -> "Settings":
        if self.auth is Auth.OPEN and not self.allow_open and not _is_loopback(self.host):
            raise ValueError(
                f"{PREFIX}HOST is {self.host}, which is not loopback, and requests need no key: set {PREFIX}AUTH=keys "
                f"(and create a key with loraplex keys create), or {PREFIX}ALLOW_OPEN=true where the network in front "
                "of the service is trusted"
            )
        return self


def load_settings(overrides: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of the environment, overridden by options of the command line.

    Raises `SettingsError` for an invalid value and for a `LORAPLEX_` name that is not a setting.
    """
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | _CLIENT_SETTINGS
    unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        names = ", ".join(sorted(known - _CLIENT_SETTINGS))
        raise SettingsError(f"not a setting: {', '.join(unknown)}; the settings are: {names}")
    try:
        return Settings(**{name: value for name, value in (overrides or {}).items() if value is not None})
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(problem) for problem in error.errors())) from None


def make_data_dir(settings: Settings) -> None:
    """Create the data folder if it is missing; raise `SettingsError` if it cannot be created or written."""
    folder = settings.data_dir
    reason = "it is not writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = str(error.strerror)
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise SettingsError(f"{PREFIX}DATA_DIR is {folder}, which cannot be used: {reason}")


def as_environment(settings: Settings) -> dict[str, str]:
    """Return this process's environment with every setting, for a child process."""
    values = settings.model_dump(mode="json", exclude_none=True)
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return inherited | {f"{PREFIX}{name.upper()}": str(value) for name, value in values.items()}


def _describe(problem: Any) -> str:
    variable = f"{PREFIX}{str(problem['loc'][0]).upper()}: " if problem["loc"] else ""
    return variable + str(problem["msg"]).removeprefix("Value error, ")


def description_of(name: str) -> str:
    """Return the description of a setting as one line."""
    return " ".join(str(Settings.model_fields[name].description).split())


@contextmanager
def exit_if_unusable() -> Iterator[None]:
    """End the process with `EXIT_CONFIG` if the settings, the base layer or the data folder cannot be used."""
    try:
        yield
    except (SettingsError, BaseNotLoadable, CatalogNotLoadable) as error:
        reason = str(error)
    except (IsADirectoryError, NotADirectoryError) as error:
        reason = f"the data folder cannot be used: {error}"
    else:
        return
    print(f"loraplex: {reason}", file=sys.stderr)
    sys.exit(EXIT_CONFIG)


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
