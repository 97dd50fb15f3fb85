"""Where things lie unless configured otherwise, and what holds between tables: no two directories overlap."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expbuild.config_text import shown
from expbuild.errors import ConfigError


def state_dir() -> Path:
    """Return the directory our state lies under unless configured otherwise.

    /var/lib/expbuild as root, else expbuild/ in XDG_STATE_HOME or ~/.local/state. Raises ConfigError for a user who
    has no home directory.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/expbuild")
    state_home = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(state_home):
        return Path(state_home, "expbuild")
    try:
        return Path.home() / ".local/state/expbuild"
    except RuntimeError as error:
        problem = "this user has no home directory for the server's state: set HOME or XDG_STATE_HOME"
        raise ConfigError([problem], "environment") from error


def default_root(store: str) -> Path:
    return state_dir() / {"cas": "cas", "action_cache": "cache"}[store]


def default_work_dir(kind: str) -> Path:
    return state_dir() / "work" / kind


def problems_across_tables(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong between tables. Takes a document as read, where anything may be missing or malformed."""
    pool = _table_at(document, "execution", "pool")
    if pool.get("workers") in ([], ()) and _table_at(document, "capabilities").get("exec_enabled", True) is True:
        yield "execution.pool.workers: expected at least one worker while capabilities.exec_enabled, got an empty list"
    directories: dict[str, object] = {}
    for store in ("cas", "action_cache"):
        table = _table_at(document, "storage", store)
        directories[f"storage.{store}.root_dir"] = table.get("root_dir") if table else default_root(store)
    stores = list(directories)
    workers = pool.get("workers", [{"type": "host"}])
    for i, worker in enumerate(workers if isinstance(workers, (list, tuple)) else []):
        if isinstance(worker, Mapping):
            work_dir = worker["work_dir"] if "work_dir" in worker else default_work_dir(str(worker.get("type")))
            directories[f"execution.pool.workers[{i}].work_dir"] = work_dir
    known = {key: Path(os.path.normpath(d)) for key, d in directories.items() if isinstance(d, (str, Path))}
    for key, directory in known.items():
        for store in stores[: stores.index(key)] if key in stores else stores:
            root = known.get(store)
            if root is not None and (directory.is_relative_to(root) or root.is_relative_to(directory)):
                expected = f"expected a directory neither inside nor around {store} ({shown(root)})"
                yield f"{key}: {expected}, got {shown(directory)}"


def _table_at(document: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    table: Any = document
    for key in path:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table if isinstance(table, Mapping) else {}
