"""What both file stores share: temporary files, atomic publication, and what an OSError means."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath

from expbuild.errors import StartupError, StorageFull, StorageUnavailable

MTIME_NS = 946_684_800 * 10**9
"""The modification time of everything we publish (2000-01-01): inputs look the same in every run."""

STAMP_RENEWAL_S = 300
"""A promise stamp (atime) younger than this is not renewed: one write per file and few minutes is enough."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR})


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError into StorageFull or StorageUnavailable. `what` names the attempt: "write blob …"."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(
                f"cannot {what}: no space left on the storage device; free space or try again later"
            ) from error
        raise StorageUnavailable(f"cannot {what}: {error.strerror}") from error


def open_root(root: Path, key: str, subdirectories: Iterable[str] = ()) -> int:
    """Return the root directory of a store opened; created for the server alone (0700) where it does not exist.

    Directories `subdirectories` are made in it, and `tmp/` is made or emptied. key: the configuration key that names
    the root, for the error. Raises StartupError.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in subdirectories:
                (root / name).mkdir(parents=True, exist_ok=True)
            _empty_temp_directory(root / "tmp", root_fd)
        except BaseException:
            os.close(root_fd)
            raise
    except OSError as error:
        raise StartupError(
            f"{key}: cannot use {root}: {error.strerror}; choose a directory the server may write"
        ) from error
    return root_fd


class TempFile:
    """A file being written under a root directory: invisible until published, gone when closed without that.

    The directories of the name it is published under are made when they are first needed.

    Where the file system has no O_TMPFILE it is a file under `tmp/`, which is emptied when a store is opened.
    """

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._name: str | None = None
        try:
            self.fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=root_fd)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._name = _temp_name()
            self.fd = os.open(self._name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=root_fd)

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def publish(self, name: str, size_bytes: int, mode: int) -> None:
        """Make the file appear under `name` with the given mode, unless an equally long file is there already."""
        self._finish(mode)
        try:
            self._link(name)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # evicted between the two calls: ours takes its place
                if os.stat(name, dir_fd=self._root_fd, follow_symlinks=False).st_size == size_bytes:
                    renew_stamp(name, self._root_fd)
                    return
            self.replace(name, mode)

    def replace(self, name: str, mode: int) -> None:
        """Make the file appear under `name` with the given mode, in place of whatever is there."""
        self._finish(mode)
        if self._name is None:
            self._name = _temp_name()
            self._link(self._name)
        temp_name = self._name
        self._in_directory_of(
            name, lambda: os.rename(temp_name, name, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)
        )
        self._name = None

    def close(self) -> None:
        """Drop the file, as far as it is not published. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._root_fd)
            self._name = None

    def _finish(self, mode: int) -> None:
        os.fchmod(self.fd, mode)
        os.utime(self.fd, ns=(time.time_ns(), MTIME_NS))

    def _link(self, name: str) -> None:
        # A path relative to two directory descriptors makes Python call linkat with AT_SYMLINK_FOLLOW, which
        # linking an O_TMPFILE by /proc needs.
        source, root_fd = f"/proc/self/fd/{self.fd}", self._root_fd
        self._in_directory_of(
            name, lambda: os.link(source, name, src_dir_fd=root_fd, dst_dir_fd=root_fd, follow_symlinks=True)
        )

    def _in_directory_of(self, name: str, put: Callable[[], None]) -> None:
        try:
            put()
        except FileNotFoundError:
            for parent in reversed(PurePath(name).parents[:-1]):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(parent, 0o700, dir_fd=self._root_fd)
            put()


def renew_stamp(path: str, dir_fd: int, seen: os.stat_result | None = None) -> None:
    """Renew the promise stamp of a file, unless `seen` shows that this happened a moment ago.

    Raises FileNotFoundError when the file is gone meanwhile: then nothing may be promised.
    """
    now_ns = time.time_ns()
    if seen is None or seen.st_atime_ns < now_ns - STAMP_RENEWAL_S * 10**9:
        os.utime(path, ns=(now_ns, MTIME_NS), dir_fd=dir_fd)


def _empty_temp_directory(directory: Path, root_fd: int) -> None:
    """Create `tmp/` under a store's root, or empty it of what a crash left.

    Several servers may share a root. Each holds a shared lock on it as long as it lives, so who gets the exclusive one
    is alone, and no file in `tmp/` is being written.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(root_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for entry in directory.iterdir():
            entry.unlink()
    fcntl.flock(root_fd, fcntl.LOCK_SH)


def _temp_name() -> str:
    return f"tmp/{secrets.token_hex(16)}"
