"""The configuration: one frozen model per table of the TOML file, read strictly.

The classes are the reference: every key is a field with its default and its meaning. What the file may not say is
refused with all problems at once, each as one line: `full.key[i].path: expected X, got Y`. A new option is one field
here; when its type alone does not tell what is allowed, an `Expect` beside it says so in words.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

import tomli
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic import ValidationInfo as Info
from pydantic_core import PydanticCustomError

from expbuild.config_directories import default_root, default_work_dir, problems_across_tables
from expbuild.config_problems import Expect, explain, one_of
from expbuild.config_text import shown, toml_table
from expbuild.config_types import (
    LIST,
    NAME_OR_ID,
    AbsolutePath,
    Count,
    ImplementedFunction,
    Platform,
    Seconds,
    UserOrId,
    each_once,
    is_address,
    pattern,
    require,
    rule,
)
from expbuild.digest import DigestFunction
from expbuild.errors import ConfigError

RESERVED_INSTANCE_SEGMENTS = frozenset(
    {"blobs", "uploads", "actions", "actionResults", "operations", "capabilities", "compressed-blobs"}
)
"""Segments no instance name may contain: in resource names they mark where the instance name ends (REAPI)."""

_MAX_FILE_BYTES = 1 << 20


def is_well_formed_instance_name(name: str) -> bool:
    """Whether `name` can be an instance name: "" or segments joined by "/", none of them empty or reserved."""
    if not name:
        return True
    return name.isprintable() and all(s and s not in RESERVED_INSTANCE_SEGMENTS for s in name.split("/"))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class _Table(BaseModel):
    """A table of the file: unknown keys refused, no value converted, immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


# ---- [server] --------------------------------------------------------------------------------------------------


class ServerConfig(_Table):
    """`[server]`: where we listen and what we are called."""

    address: Annotated[str, require(is_address), Expect('"host:port" (IPv6: "[host]:port")')] = "127.0.0.1:8980"
    """Host and port to listen on; port 0 takes any free port."""
    instance_name: Annotated[
        str,
        require(is_well_formed_instance_name),
        Expect(f"segments joined by single slashes, none of them {one_of(sorted(RESERVED_INSTANCE_SEGMENTS))}"),
    ] = ""
    """The default instance."""
    strict_instance_name: bool = False
    """Refuse every instance name but `instance_name`; otherwise each well-formed name has its own action cache."""

    transport: Literal["auto", "grpcio", "native"] = "auto"
    """What speaks HTTP/2: `native` answers several times as many calls per second, and is the extra `expbuild[native]`.

    `auto` takes it where it is installed, except with TLS, which it has not, and with tokens: it takes a message of any
    size into memory before anybody looks at the token.
    """

    @property
    def host(self) -> str:
        """The host of `address`, without the brackets of an IPv6 address."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of `address`; 0 means any free one."""
        return int(self.address.rpartition(":")[2])


# ---- [tls], [auth] ---------------------------------------------------------------------------------------------


class TlsConfig(_Table):
    """`[tls]`: without it, what clients send and get is readable on the way. The files are PEM, read once, at start."""

    certificate: AbsolutePath
    """The server's certificate, and those that lead from it to the authority clients trust, in this order."""
    key: AbsolutePath
    """The certificate's private key, not encrypted. Nobody but its owner may have any right to the file."""
    client_ca: AbsolutePath | None = None
    """Certificates of the authorities of clients. With it, only clients with a certificate of theirs can connect."""


class AuthConfig(_Table):
    """`[auth]`: without it, everybody who can connect may do everything."""

    tokens_file: AbsolutePath
    """Who may call: a line `NAME read|write sha256:HEX` for each bearer token, made by `re-server new-token`.

    `read` is reading caches and watching operations, `write` everything. Read once, at start.
    """


# ---- [storage] -------------------------------------------------------------------------------------------------


def _check_root_dir(root_dir: Path | None, info: Info) -> Path | None:
    match info.data.get("backend"):
        case "filesystem" if root_dir is None:
            raise rule('expected an absolute path (needed by backend = "filesystem"), got nothing')
        case "memory" if root_dir is not None:
            raise rule(f'expected nothing (it is only for backend = "filesystem"), got {shown(root_dir)}')
    return root_dir


class StoreConfig(_Table):
    """`[storage.cas]` or `[storage.action_cache]`."""

    backend: Literal["filesystem", "memory"] = "filesystem"
    """`memory` forgets everything when the server stops, and is bounded only by the machine."""
    root_dir: Annotated[AbsolutePath | None, AfterValidator(_check_root_dir)] = None
    """The directory that is the store. For `filesystem`: required; for `memory`: not allowed."""


class StorageConfig(_Table):
    """`[storage]`: blobs (`cas`) and action results (`action_cache`); by default directories in the state directory."""

    cas: StoreConfig = Field(default_factory=lambda: StoreConfig(root_dir=default_root("cas")))
    action_cache: StoreConfig = Field(default_factory=lambda: StoreConfig(root_dir=default_root("action_cache")))


# ---- [execution] -----------------------------------------------------------------------------------------------


def _check_run_as_group(group: str | None, info: Info) -> str | None:
    if group is not None and "run_as_user" in info.data and info.data["run_as_user"] is None:
        raise rule(f"expected run_as_user beside it, got only {shown(group)}")
    return group


class HostWorkerConfig(_Table):
    """`[[execution.pool.workers]]` with `type = "host"`: commands run as processes of this machine."""

    type: Literal["host"] = "host"
    count: Count = Field(default_factory=_cores)
    """How many actions run at once; by default as many as there are cores."""
    work_dir: AbsolutePath = Field(default_factory=lambda: default_work_dir("host"))
    """Where input roots are prepared; best on the file system of the CAS. Never inside a store, or around one."""
    use_chroot: bool = False
    """Give each action a private root made of namespaces; the server does not start where that is impossible."""
    env_whitelist: Annotated[
        tuple[Annotated[str, pattern("[A-Za-z_][A-Za-z0-9_]*"), Expect("the name of an environment variable")], ...],
        LIST,
    ] = ()
    """Variables of the server passed on to commands, below those of the command itself."""
    run_as_user: UserOrId | None = None
    """The user commands run as; needs the right to switch users."""
    run_as_group: Annotated[UserOrId | None, AfterValidator(_check_run_as_group)] = None
    """The group commands run as; without it the primary group of `run_as_user`."""
    platform: Platform = Field(default_factory=dict)
    """Platform properties declared beside OSFamily and Arch."""


class VolumeConfig(_Table):
    """`[[execution.pool.workers.volumes]]`: a directory of this machine that containers see."""

    host_path: AbsolutePath
    """The directory here."""
    container_path: Annotated[
        AbsolutePath, require(lambda path: path != Path("/")), Expect('an absolute path other than "/"')
    ]
    """Where containers see it."""
    read_only: bool = True
    """Whether commands can change it. What they write there is shared by all of them."""


def _check_volumes(volumes: tuple[VolumeConfig, ...]) -> tuple[VolumeConfig, ...]:
    targets = [volume.container_path for volume in volumes]
    for target in targets:
        if targets.count(target) > 1:
            raise rule(f"expected a different container_path in each, got {shown(target)} twice")
    return volumes


class DockerWorkerConfig(_Table):
    """`[[execution.pool.workers]]` with `type = "docker"`: commands run in containers of one image."""

    type: Literal["docker"] = "docker"
    count: Count = 1
    """How many actions run at once."""
    image: Annotated[str, pattern(r"[A-Za-z0-9][^\s]*"), Expect("the name of a container image")]
    """The image; it is also the value of the declared property `container-image`."""
    always_pull: bool = False
    """Ask the registry at every start; otherwise only when the image is not there."""
    cpu_limit: Annotated[float, Field(ge=0.01, le=100_000), Expect("a number of cores of at least 0.01")] | None = None
    """Cores a container may use; unlimited by default."""
    memory_limit: Annotated[int, Field(ge=6 << 20, lt=1 << 63), Expect("at least 6291456 bytes")] | None = None
    """Bytes of memory a container may use; unlimited by default. (Docker accepts nothing below 6 MiB.)"""
    network_mode: Literal["none", "bridge", "host"] = "none"
    """The network containers see."""
    user: Annotated[str, pattern(f"{NAME_OR_ID}(:{NAME_OR_ID})?"), Expect('"user" or "user:group"')] | None = None
    """Whom commands run as, by names of the image or by number; by default whom the image says."""
    volumes: Annotated[tuple[VolumeConfig, ...], LIST, AfterValidator(_check_volumes)] = ()
    """Directories of this machine that containers see."""
    work_dir: AbsolutePath = Field(default_factory=lambda: default_work_dir("docker"))
    """Where input roots are prepared; the Docker daemon must see the same directory under the same name."""
    docker_host: (
        Annotated[
            str,
            pattern(r"unix:///\S+|tcp://[^\s/:]+(:[0-9]{1,5})?/?|tcp://\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?/?"),
            Expect('"unix:///path" or "tcp://host:port"'),
        ]
        | None
    ) = None
    """The Docker daemon; by default the one DOCKER_HOST names, else the standard socket."""
    platform: Platform = Field(default_factory=dict)
    """Platform properties declared beside OSFamily, Arch, container and container-image."""


WorkerConfig = Annotated[HostWorkerConfig | DockerWorkerConfig, Field(discriminator="type")]


def _check_max_timeout(max_timeout_s: float, info: Info) -> float:
    default_s = info.data.get("default_task_timeout_seconds", 0)
    if max_timeout_s < default_s:
        raise rule(f"expected at least default_task_timeout_seconds ({default_s:g}), got {max_timeout_s:g}")
    return max_timeout_s


class PoolConfig(_Table):
    """`[execution.pool]`: the queue, its times and the workers."""

    max_queue_size: Count = 1000
    """Actions that may wait; past it, Execute is answered RESOURCE_EXHAUSTED."""
    scheduler_interval_ms: Annotated[int, Field(ge=1, le=60_000), Expect("an integer from 1 to 60000")] = 100
    """The longest time between two looks at the queue; events wake the scheduler at once."""
    default_task_timeout_seconds: Seconds = 3600.0
    """The timeout of an action that names none."""
    max_task_timeout_seconds: Annotated[Seconds, AfterValidator(_check_max_timeout)] = Field(
        default_factory=lambda data: max(86_400.0, data["default_task_timeout_seconds"])
    )
    """The longest timeout an action may ask for. By default a day, or the default timeout where that is longer."""
    result_ttl_seconds: Seconds = 300.0
    """How long a finished operation stays attachable."""
    abandoned_grace_seconds: Seconds = 300.0
    """An execution that nobody watches any more is cancelled after this long."""
    workers: Annotated[tuple[WorkerConfig, ...], LIST] = Field(default_factory=lambda: (HostWorkerConfig(),))
    """What runs the actions, in order of preference. At least one while `capabilities.exec_enabled`."""


class ExecutionConfig(_Table):
    """`[execution]`."""

    backend: Literal["pool"] = "pool"
    """Where actions run: in the pool of this process."""
    pool: PoolConfig = Field(default_factory=PoolConfig)


# ---- [capabilities] --------------------------------------------------------------------------------------------


class CapabilitiesConfig(_Table):
    """`[capabilities]`: what clients are told and allowed."""

    digest_functions: Annotated[
        tuple[ImplementedFunction, ...],
        LIST,
        require(len),
        AfterValidator(each_once),
        Expect(f"a list with at least one of {', '.join(f.name for f in DigestFunction)}"),
    ] = (DigestFunction.SHA256,)
    """The digest functions clients may use; the first is the default."""
    max_batch_total_size_bytes: Annotated[
        int, Field(ge=1024, le=15 << 20), Expect("an integer from 1024 to 15728640")
    ] = 4 << 20
    """Largest sum of blob sizes in one batch request. (A whole message may have 16 MiB.)"""
    supported_compressors: Annotated[
        tuple[Literal["ZSTD", "DEFLATE", "IDENTITY"], ...],
        LIST,
        AfterValidator(each_once),
        AfterValidator(lambda names: tuple(name for name in names if name != "IDENTITY")),
    ] = ("ZSTD", "DEFLATE")
    """Compressors beside IDENTITY, which is always served and may be listed."""
    exec_enabled: bool = True
    """Whether we execute actions; without it we are a cache."""
    action_cache_update_enabled: bool = True
    """Whether clients may write action results."""
    symlink_absolute_path_strategy: Literal["ALLOWED", "DISALLOWED"] = "ALLOWED"
    """Whether symbolic links in outputs and inputs may point to absolute paths."""


class Config(_Table):
    """The whole configuration. Without any key it is the embedded default."""

    server: ServerConfig = Field(default_factory=ServerConfig)
    tls: TlsConfig | None = None
    auth: AuthConfig | None = None
    storage: StorageConfig = Field(default_factory=StorageConfig)
    execution: ExecutionConfig = Field(default_factory=ExecutionConfig)
    capabilities: CapabilitiesConfig = Field(default_factory=CapabilitiesConfig)

    @model_validator(mode="after")
    def _check_across_tables(self) -> Self:
        problems = list(problems_across_tables(self.model_dump(exclude_none=True)))
        if problems:
            raise PydanticCustomError("across_tables", "{text}", {"text": "; ".join(problems)})
        return self


# ---- reading and writing ---------------------------------------------------------------------------------------


def default_config() -> Config:
    """Return the embedded default: local address, a host worker per core, state in the state directory."""
    return Config()


def load_config(path: Path) -> Config:
    """Read the file. Raises ConfigError with every problem, also when the file cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError([f"cannot read {path}: {reason}"], str(path)) from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError([f"{path} is larger than {_MAX_FILE_BYTES} bytes"], str(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"{path}:{line}: expected UTF-8 text, got byte 0x{data[error.start]:02x}"
        raise ConfigError([problem], str(path)) from error
    return parse_config(text, str(path))


def parse_config(text: str, source: str) -> Config:
    """Read TOML text. `source` names it in errors. Raises ConfigError with every problem."""
    try:
        document = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        problem = f"{source}:{error.lineno}:{error.colno}: not valid TOML: {error.msg}"
        raise ConfigError([problem], source) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise ConfigError([f"{source}: not valid TOML: {error}"], source) from error
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        problems = [explain(e, Config) for e in error.errors(include_url=False) if e["type"] not in _NOT_A_PROBLEM]
        raise ConfigError([*problems, *problems_across_tables(document)], source) from None


_NOT_A_PROBLEM = frozenset(
    {
        "across_tables",  # listed on its own, because pydantic stops at problems inside the tables
        "default_factory_not_called",  # the echo of another problem in the same table
    }
)


def render_config(config: Config) -> str:
    """Return the configuration as TOML text that `parse_config` reads back to an equal one."""
    return "\n".join(toml_table((), config.model_dump(exclude_none=True))).lstrip("\n") + "\n"
