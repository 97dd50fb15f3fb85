"""The `[storage]` tables of the configuration: where blobs and action results are kept, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic import ValidationInfo as Info

from expbuild.config_directories import default_root
from expbuild.config_text import shown
from expbuild.config_types import AbsolutePath, Table, rule


def _check_root_dir(root_dir: Path | None, info: Info) -> Path | None:
    match info.data.get("backend"):
        case "filesystem" if root_dir is None:
            raise rule('expected an absolute path (needed by backend = "filesystem"), got nothing')
        case "memory" if root_dir is not None:
            raise rule(f'expected nothing (it is only for backend = "filesystem"), got {shown(root_dir)}')
    return root_dir


class StoreConfig(Table):
    """`[storage.cas]` or `[storage.action_cache]`."""

    backend: Literal["filesystem", "memory"] = "filesystem"
    """`memory` forgets everything when the server stops, and is bounded only by the machine."""
    root_dir: Annotated[AbsolutePath | None, AfterValidator(_check_root_dir)] = None
    """The directory that is the store. For `filesystem`: required; for `memory`: not allowed."""


class StorageConfig(Table):
    """`[storage]`: blobs (`cas`) and action results (`action_cache`); by default directories in the state directory."""

    cas: StoreConfig = Field(default_factory=lambda: StoreConfig(root_dir=default_root("cas")))
    action_cache: StoreConfig = Field(default_factory=lambda: StoreConfig(root_dir=default_root("action_cache")))
