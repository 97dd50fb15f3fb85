"""What both file stores share: temporary files, atomic publication, and what an OSError means."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import PurePath

from expbuild.digest import Digest
from expbuild.errors import StorageFull, StorageUnavailable
from expbuild.storage.root import Durability, StoreRoot

MTIME_NS = 946_684_800 * 10**9
"""The modification time of everything we publish (2000-01-01): inputs look the same in every run."""

STAMP_RENEWAL_S = 300
"""A promise stamp (atime) younger than this is not renewed: one write per file and few minutes is enough."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR})


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError into StorageFull or StorageUnavailable. `what` names the attempt: "write blob …"."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(
                f"cannot {what}: no space left on the storage device; free space or try again later"
            ) from error
        raise StorageUnavailable(f"cannot {what}: {error.strerror}") from error


class TempFile:
    """A file being written under a root directory: invisible until published, gone when closed without that.

    The directories of the name it is published under are made when they are first needed.

    Where the file system has no O_TMPFILE it is a file under `tmp/`, which is emptied when a store is opened.
    """

    def __init__(self, root: StoreRoot) -> None:
        self._durability = root.durability
        self._root_fd = root_fd = root.fd
        self._is_finished = False
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

    def publish(self, name: str, size_bytes: int, mode: int, *, keep: bool = True) -> bool:
        """Make the file appear under `name` with the given mode, unless a file that looks whole is there already.

        keep: whether such a file is to be trusted; else ours takes its place. Returns whether ours is there now.
        """
        self._finish(mode)
        try:
            self._link(name)
        except FileExistsError:
            if keep and self._is_whole(name, size_bytes):
                return False
            self.replace(name, mode)
        else:
            self._sync_name(name)
        return True

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
        self._sync_name(name)

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
        """Write what must be on the disk before the name is.

        After a failed fsync nothing is known about the file, so none is tried twice: the upload fails.
        """
        if self._is_finished:
            return
        self._is_finished = True
        os.fchmod(self.fd, mode)
        os.utime(self.fd, ns=(time.time_ns(), MTIME_NS))
        if self._durability is not Durability.NONE:
            os.fsync(self.fd)

    def _is_whole(self, name: str, size_bytes: int) -> bool:
        """Whether the file that has our name already can stay: it is then renewed, and made as durable as ours."""
        try:
            if not looks_whole(os.stat(name, dir_fd=self._root_fd, follow_symlinks=False), size_bytes):
                return False
            renew_stamp(name, self._root_fd)
            if self._durability is Durability.STRICT:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root_fd)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except FileNotFoundError:  # evicted between the calls: ours takes its place
            return False
        self._sync_name(name, own=False)
        return True

    def _sync_name(self, name: str, *, own: bool = True) -> None:
        """Where that is promised, write the name; a file of our `own` whose name cannot be written is withdrawn."""
        if self._durability is not Durability.STRICT:
            return
        try:
            self._sync_directory(str(PurePath(name).parent))
        except OSError:
            if own:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._root_fd)
            raise

    def _sync_directory(self, name: str) -> None:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root_fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

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
                if self._durability is Durability.STRICT:
                    self._sync_directory(str(parent.parent))
            put()


def looks_whole(seen: os.stat_result, size_bytes: int) -> bool:
    """Whether a file has the length it must have, and nobody has written to it since it was published."""
    return seen.st_size == size_bytes and seen.st_mtime_ns == MTIME_NS


def renew_stamp(path: str, dir_fd: int, seen: os.stat_result | None = None, renewal_s: float = STAMP_RENEWAL_S) -> None:
    """Renew the promise stamp of a file, unless `seen` shows that this happened less than `renewal_s` ago.

    Raises FileNotFoundError when the file is gone meanwhile: then nothing may be promised.
    """
    now_ns = time.time_ns()
    if seen is None or seen.st_atime_ns < now_ns - renewal_s * 10**9:
        os.utime(path, ns=(now_ns, MTIME_NS), dir_fd=dir_fd)


def blob_name(digest: Digest) -> str:
    """Return a blob's file name relative to the root. Safe: a Digest holds nothing but hex digits and a number."""
    return f"{digest.function.name.lower()}/{digest.hash[:2]}/{digest.hash}-{digest.size_bytes}"


def _temp_name() -> str:
    return f"tmp/{secrets.token_hex(16)}"
