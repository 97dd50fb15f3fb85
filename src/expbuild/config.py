"""The configuration: one frozen model per table of the TOML file, read strictly.

The classes are the reference: every key is a field with its default and its meaning. What the file may not say is
refused with all problems at once, each as one line: `full.key[i].path: expected X, got Y`. A new option is one field
here; when its type alone does not tell what is allowed, an `Expect` beside it says so in words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import tomli
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from expbuild.config_directories import problems_across_tables, state_dir
from expbuild.config_pool import ExecutionConfig
from expbuild.config_problems import Expect, explain, one_of
from expbuild.config_storage import StorageConfig
from expbuild.config_text import toml_table
from expbuild.config_types import (
    LIST,
    AbsolutePath,
    ImplementedFunction,
    Table,
    each_once,
    is_address,
    require,
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


# ---- [server] --------------------------------------------------------------------------------------------------


class ServerConfig(Table):
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

    admin_socket: AbsolutePath | None = None
    """Where `re-server status` and `re-server why` ask; only the owner can open it. By default `admin.sock` beside the
    directory of the CAS, or in the state directory for a CAS in memory."""
    drain_timeout_seconds: Annotated[
        float, Field(ge=0, le=86_400, allow_inf_nan=False), Expect("seconds from 0 to 86400")
    ] = 60.0
    """How long running actions may take to finish after SIGTERM; 0 ends them at once. A second SIGTERM does so too.

    A service manager has to wait longer than this before it kills (`TimeoutStopSec`).
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


class TlsConfig(Table):
    """`[tls]`: without it, what clients send and get is readable on the way. The files are PEM, read once, at start."""

    certificate: AbsolutePath
    """The server's certificate, and those that lead from it to the authority clients trust, in this order."""
    key: AbsolutePath
    """The certificate's private key, not encrypted. Nobody but its owner may have any right to the file."""
    client_ca: AbsolutePath | None = None
    """Certificates of the authorities of clients. With it, only clients with a certificate of theirs can connect."""


class AuthConfig(Table):
    """`[auth]`: without it, everybody who can connect may do everything."""

    tokens_file: AbsolutePath
    """Who may call: a line `NAME read|write sha256:HEX` for each bearer token, made by `re-server new-token`.

    `read` is reading caches and watching operations, `write` everything. Read once, at start.
    """


# ---- [capabilities] --------------------------------------------------------------------------------------------


class CapabilitiesConfig(Table):
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


class Config(Table):
    """The whole configuration. Without any key it is the embedded default."""

    server: ServerConfig = Field(default_factory=ServerConfig)
    tls: TlsConfig | None = None
    auth: AuthConfig | None = None
    storage: StorageConfig = Field(default_factory=StorageConfig)
    execution: ExecutionConfig = Field(default_factory=ExecutionConfig)
    capabilities: CapabilitiesConfig = Field(default_factory=CapabilitiesConfig)

    @property
    def admin_socket(self) -> Path:
        """Where the server can be asked what it does."""
        if self.server.admin_socket is not None:
            return self.server.admin_socket
        root_dir = self.storage.cas.root_dir
        return (root_dir.parent if root_dir is not None else state_dir()) / "admin.sock"

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
