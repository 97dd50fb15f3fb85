"""Control groups of actions: limits that hold for all processes of an action together. Standard library only.

Version 1 and the unified version 2 are told apart by what is mounted; what is not there, or not ours to use, is left
out, and the caller falls back to limits per process.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

CONTROLLERS = ("memory", "pids", "cpu")
_CPU_PERIOD_US = 100_000
_SERVER_GROUP = "expbuild-server"
_REMOVE_S = 2.0


class Cgroup:
    """The groups of one action, one directory for each controller or one for all of them."""

    def __init__(self, directories: Mapping[str, Path], *, unified: bool) -> None:
        self.directories = directories
        self._unified = unified

    def paths(self) -> list[str]:
        """Return the directories, each once: a process joins by writing 0 to the file cgroup.procs of each."""
        return sorted({str(path) for path in self.directories.values()})

    def limit(self, memory_bytes: int | None, cpus: float | None, processes: int | None) -> None:
        """Set what is not None, as far as there is a controller for it. Raises OSError."""
        if memory_bytes is not None and "memory" in self.directories:
            self._limit_memory(self.directories["memory"], memory_bytes)
        if cpus is not None and "cpu" in self.directories:
            quota_us = max(1000, round(cpus * _CPU_PERIOD_US))
            directory = self.directories["cpu"]
            if self._unified:
                _write(directory / "cpu.max", f"{quota_us} {_CPU_PERIOD_US}")
            else:
                _write(directory / "cpu.cfs_period_us", str(_CPU_PERIOD_US))
                _write(directory / "cpu.cfs_quota_us", str(quota_us))
        if processes is not None and "pids" in self.directories:
            _write(self.directories["pids"] / "pids.max", str(processes))

    def memory_peak_bytes(self) -> int | None:
        """Return the most memory the action had at once; None when nobody counted."""
        directory = self.directories.get("memory")
        if directory is None:
            return None
        text = _read(directory / ("memory.peak" if self._unified else "memory.max_usage_in_bytes"))
        return int(text) if text else None

    def out_of_memory(self) -> bool:
        """Whether a process of the action was killed because the limit of memory was reached."""
        directory = self.directories.get("memory")
        if directory is None:
            return False
        text = _read(directory / ("memory.events" if self._unified else "memory.oom_control"))
        return any(line.split() != ["oom_kill", "0"] for line in text.splitlines() if line.startswith("oom_kill "))

    def remove(self) -> None:
        """Remove the groups, in which nothing lives any more."""
        for path in self.paths():
            _remove(Path(path))

    def _limit_memory(self, directory: Path, limit_bytes: int) -> None:
        if self._unified:
            _write(directory / "memory.max", str(limit_bytes))
            _try_write(directory / "memory.swap.max", "0")
            _try_write(directory / "memory.oom.group", "1")
        else:
            _write(directory / "memory.limit_in_bytes", str(limit_bytes))
            _try_write(directory / "memory.memsw.limit_in_bytes", str(limit_bytes))


class CgroupHome:
    """The directories below which the groups of our actions are made."""

    def __init__(self, directories: Mapping[str, Path], *, unified: bool) -> None:
        self._directories = directories
        self._unified = unified

    @property
    def controllers(self) -> frozenset[str]:
        """What can be limited."""
        return frozenset(self._directories)

    def create(self, name: str, controllers: frozenset[str]) -> Cgroup:
        """Make a group with those of the controllers that there are. Raises OSError."""
        made: dict[str, Path] = {}
        for controller in controllers & self.controllers:
            path = self._directories[controller] / name
            path.mkdir(exist_ok=True)
            made[controller] = path
        return Cgroup(made, unified=self._unified)

    def close(self) -> None:
        """Remove the directories, and the groups in them that are empty."""
        for path in set(self._directories.values()):
            _remove_with_children(path)


def find_home() -> CgroupHome:
    """Return where this process can make groups, having removed what a dead one has left there."""
    unified, split = _mounts()
    found = {} if unified is None else _unified_home(unified)
    if found:
        return CgroupHome(found, unified=True)
    return CgroupHome(
        {name: home for name, own in split.items() if (home := _make_home(own)) is not None}, unified=False
    )


def _mounts() -> tuple[Path | None, dict[str, Path]]:
    """Return our own group: that of the unified hierarchy, and those of each controller of version 1."""
    own: dict[str, str] = {}
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    unified: Path | None = None
    split: dict[str, Path] = {}
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, mounted_at = before.split(" ")[3:5]
        if kind == "cgroup2" and "" in own:
            unified = _below(mounted_at, root, own[""])
        elif kind == "cgroup":
            for controller in set(options.split(" ")[-1].split(",")) & set(CONTROLLERS) & own.keys():
                split[controller] = _below(mounted_at, root, own[controller])
    return unified, split


def _below(mounted_at: str, root: str, own: str) -> Path:
    """Return the directory of group `own` where a mount shows the hierarchy from `root` on."""
    relative = own[len(root) :] if root != "/" and own.startswith(root) else own
    return Path(mounted_at, relative.lstrip("/"))


def _unified_home(own: Path) -> dict[str, Path]:
    """Return where groups of version 2 can be made: only in a group that is ours alone, which systemd calls delegated.

    There processes can be in leaves only, so the server moves to one first.
    """
    if own.name == _SERVER_GROUP:
        own = own.parent
    usable = [name for name in CONTROLLERS if name in _read(own / "cgroup.controllers").split()]
    if "memory" not in usable or not os.access(own / "cgroup.subtree_control", os.W_OK):
        return {}
    strangers = set(_read(own / "cgroup.procs").split()) - {str(os.getpid()), str(os.getppid())}
    is_root = not (own / "cgroup.type").exists()
    if strangers and not is_root:
        return {}
    try:
        if not is_root:
            (own / _SERVER_GROUP).mkdir(exist_ok=True)
            for pid in _read(own / "cgroup.procs").split():
                _write(own / _SERVER_GROUP / "cgroup.procs", pid)
        home = _make_home(own)
        if home is None:
            return {}
        for directory in (own, home):
            _write(directory / "cgroup.subtree_control", " ".join(f"+{name}" for name in usable))
    except OSError:
        return {}
    return dict.fromkeys(usable, home)


def _make_home(own: Path) -> Path | None:
    with contextlib.suppress(OSError):
        for left in own.glob("expbuild-[0-9]*"):
            if not Path("/proc", left.name.removeprefix("expbuild-")).exists():
                _remove_with_children(left)
    home = own / f"expbuild-{os.getpid()}"
    try:
        home.mkdir(exist_ok=True)
    except OSError:
        return None
    return home


def _remove_with_children(path: Path) -> None:
    with contextlib.suppress(OSError):
        for child in path.iterdir():
            if child.is_dir():
                _remove(child, 0.0)
    _remove(path, 0.0)


def _remove(path: Path, patience_s: float = _REMOVE_S) -> None:
    """Remove a group; the kernel lets the dead go a moment after they were reaped."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() >= give_up:
                return
            time.sleep(0.002)
        else:
            return


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="ascii") as file:
        file.write(text)


def _try_write(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        _write(path, text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
