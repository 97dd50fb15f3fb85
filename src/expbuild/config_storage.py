"""The `[storage]` tables of the configuration: where blobs and action results are kept, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic import ValidationInfo as Info

from expbuild.config_directories import default_root
from expbuild.config_problems import Expect
from expbuild.config_text import shown
from expbuild.config_types import AbsolutePath, Table, rule


def _check_root_dir(root_dir: Path | None, info: Info) -> Path | None:
    match info.data.get("backend"):
        case "filesystem" if root_dir is None:
            raise rule('expected an absolute path (needed by backend = "filesystem"), got nothing')
        case "memory" if root_dir is not None:
            raise rule(f'expected nothing (it is only for backend = "filesystem"), got {shown(root_dir)}')
    return root_dir


def _check_limit(limit: int | None, info: Info) -> int | None:
    if limit is not None and info.data.get("backend") == "memory":
        raise rule(f'expected nothing (it is only for backend = "filesystem"), got {limit}')
    return limit


_Bytes = Annotated[int, Field(ge=0, le=1 << 60), Expect("a number of bytes")]


class StoreConfig(Table):
    """`[storage.action_cache]`, and what `[storage.cas]` has in common with it."""

    backend: Literal["filesystem", "memory"] = "filesystem"
    """`memory` forgets everything when the server stops, and is bounded only by the machine."""
    root_dir: Annotated[AbsolutePath | None, AfterValidator(_check_root_dir)] = None
    """The directory that is the store. For `filesystem`: required; for `memory`: not allowed."""
    max_size_bytes: Annotated[_Bytes | None, AfterValidator(_check_limit)] = None
    """What the store may take on the disk; past it, what was used longest ago goes. By default only the disk counts."""
    min_free_bytes: Annotated[_Bytes | None, AfterValidator(_check_limit)] = None
    """What is left free on the file system. By default 1 GiB, or a twentieth of a file system smaller than 20 GiB."""
    durability: Literal["none", "ordered", "strict"] = "none"
    """What is on the disk before an upload is answered: nothing, its bytes, or its bytes and its name.

    It matters after a power cut only, and decides what is lost then. Nothing damaged is served in any case.
    """


class CasConfig(StoreConfig):
    """`[storage.cas]`."""

    min_age_seconds: Annotated[float, Field(ge=0, le=31_536_000), Expect("a number of seconds")] = 10_800.0
    """How long a client may count on a blob it was told about. Only a full disk, or store, makes this shorter."""
    verify_on_read: bool = True
    """Hash blobs as they are read, and once before they become inputs. Without it, only after a power cut."""
    scrub_bytes_per_second: Annotated[int, Field(ge=0, le=1 << 40), Expect("a number of bytes")] = 20_000_000
    """How fast the whole store is verified in the background, once a week; 0: never."""


class StorageConfig(Table):
    """`[storage]`: blobs (`cas`) and action results (`action_cache`); by default directories in the state directory."""

    cas: CasConfig = Field(default_factory=lambda: CasConfig(root_dir=default_root("cas")))
    action_cache: StoreConfig = Field(default_factory=lambda: StoreConfig(root_dir=default_root("action_cache")))
