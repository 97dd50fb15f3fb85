"""The root directory of a store: its format, its owner, and whether what it holds can be trusted as it lies there.

Beside the entries, a root has `FORMAT` (what wrote it), `lock` (held by its owner), `STATE` (which boot of the machine
used it, and how) and `tmp/`. Several processes may share a root; one of them, the owner, evicts and scrubs.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import structlog

from expbuild.errors import StartupError

log = structlog.get_logger()

_VERSION = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_AWAY = re.compile(r"away\.([0-9a-z_.-]+)", re.ASCII)


class Durability(enum.Enum):
    """What is on the disk before an upload is answered. None of them matters to a killed process, only to a power cut.

    Whatever is chosen, nothing damaged is served: after a power cut every blob is verified before it is used.
    """

    NONE = "none"
    """Nothing: the system writes within a minute or so."""
    ORDERED = "ordered"
    """The blob's bytes, before its name appears: what has a name is whole, names of the last seconds may be lost."""
    STRICT = "strict"
    """The bytes and the name: what was answered is there."""


class StoreRoot:
    """A root directory, opened; created for the server alone (0700) where it does not exist.

    key: the configuration key that names the root, for errors. kind: what is stored there, for FORMAT.
    at_risk: the machine went down with unwritten data, so every entry is verified before it is used.
    Raises StartupError.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        kind: str,
        *,
        durability: Durability = Durability.NONE,
        subdirectories: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.key = key
        self.durability = durability
        self.is_owner = False
        self.at_risk = False
        self._lock_fd = -1
        self._format = f"expbuild {kind} {_VERSION}\n"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_new = all(entry.name == "lost+found" for entry in path.iterdir())
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._check_format()
                for name in subdirectories:
                    (path / name).mkdir(parents=True, exist_ok=True)
                self._begin(is_new)
                self.try_own()
                self._empty_temp_directory()
            except BaseException:
                self._release()
                raise
        except OSError as error:
            raise StartupError(
                f"{key}: cannot use {path}: {error.strerror}; choose a directory the server may write"
            ) from error

    def try_own(self) -> bool:
        """Become the owner unless another process is. The owner's death frees the place."""
        if not self.is_owner:
            fd = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            self._lock_fd, self.is_owner = fd, True
        return True

    def verified(self) -> None:
        """Note that every entry was found whole: nothing is at risk any more."""
        if self.at_risk:
            self.at_risk = False
            self._write_state({**self._read_state(), "at_risk": False})
            log.info("storage.verified", root=str(self.path))

    def close(self) -> None:
        """Note a clean stop, where that means something, and let the next process own the root."""
        if self.fd < 0:
            return
        with contextlib.suppress(OSError):  # without the note, the next start is careful
            state = self._read_state()
            if self.is_owner and self.durability is not Durability.NONE and not state.get("unsynced"):
                self._write_state({**state, "clean": True})
        self._release()

    def _begin(self, is_new: bool) -> None:
        """Find out whether the machine went down while data was unwritten, and note that it may now happen again.

        Only a mark of a clean stop must be gone from the disk before anything is written: whatever else of STATE a
        power cut loses makes the next start careful.
        """
        boot = _BOOT_ID.read_text().strip()
        state = {"boot_id": boot} if is_new else self._read_state()
        same_boot = state.get("boot_id") == boot
        was_safe = same_boot or (state.get("clean") is True and not state.get("unsynced"))
        self.at_risk = bool(state.get("at_risk")) or not was_safe
        unsynced = self.durability is Durability.NONE or bool(same_boot and state.get("unsynced"))
        now = {"boot_id": boot, "unsynced": unsynced, "at_risk": self.at_risk, "clean": False}
        if now != state:
            self._write_state(now, sync=bool(state.get("clean")))
        if self.at_risk:
            log.warning(
                "storage.at_risk",
                root=str(self.path),
                reason="the machine went down while this store was in use; entries are verified before they are used",
            )

    def _read_state(self) -> dict[str, object]:
        try:
            state = json.loads((self.path / "STATE").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _write_state(self, state: dict[str, object], *, sync: bool = True) -> None:
        replace_file(self.fd, "STATE", json.dumps(state).encode(), sync=sync)

    def _check_format(self) -> None:
        """Refuse what another version wrote. An empty FORMAT is what a power cut left of a new one."""
        with contextlib.suppress(FileNotFoundError):
            found = (self.path / "FORMAT").read_text(errors="replace")[:80]
            if found == self._format:
                return
            if found:
                raise StartupError(
                    f"{self.key}: {self.path} has the format {found.strip()!r}, and this version of re-server reads "
                    f"{self._format.strip()!r}; choose another directory, or the version that wrote this one"
                )
        replace_file(self.fd, "FORMAT", self._format.encode(), sync=True)

    def _empty_temp_directory(self) -> None:
        """Create `tmp/`, or put it in order after a crash: half-written files go, entries on their way out come back.

        Each process holds a shared lock on the root as long as it lives, so who gets the exclusive one is alone, and
        no file in `tmp/` is being written.
        """
        directory = self.path / "tmp"
        directory.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in directory.iterdir():
                if (match := _AWAY.fullmatch(entry.name)) is not None:
                    put_back(self.fd, match[1].replace(".", "/"))
                else:
                    entry.unlink()
        fcntl.flock(self.fd, fcntl.LOCK_SH)

    def _release(self) -> None:
        for fd in (self._lock_fd, self.fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self.fd = -1
        self.is_owner = False


def away_name(name: str) -> str:
    """Return where an entry lies while it is decided whether it goes. Tells its name, so that a crash loses nothing."""
    return f"tmp/away.{name.replace('/', '.')}"


def put_back(root_fd: int, name: str) -> None:
    """Undo the renaming of an entry to its `away_name`; one that was stored anew meanwhile stays."""
    away = away_name(name)
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.link(away, name, src_dir_fd=root_fd, dst_dir_fd=root_fd, follow_symlinks=False)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(away, dir_fd=root_fd)


def replace_file(root_fd: int, name: str, data: bytes, *, sync: bool) -> None:
    """Write a small file of the root's own, whole or not at all."""
    temp = f"{name}.{os.getpid()}.new"
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=root_fd)
    try:
        os.write(fd, data)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temp, name, src_dir_fd=root_fd, dst_dir_fd=root_fd)
    if sync:
        os.fsync(root_fd)
