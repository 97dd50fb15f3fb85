"""The CAS in files: the directory is the database.

A blob is the file `<function>/<hh>/<hash>-<size>` (mode 0444). The first time it is wanted as an executable input a
second file with the suffix `.x` (mode 0555) appears beside it, so that nobody ever changes the mode of an inode that is
linked elsewhere. A file's atime is its promise stamp: when we last told somebody that the blob is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

import structlog

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound, StorageUnavailable
from expbuild.storage.base import CHUNK_BYTES, INLINE_BYTES, Sharing
from expbuild.storage.checks import check_content, check_hash, check_not_longer
from expbuild.storage.files import MTIME_NS, TempFile, open_root, renew_stamp, storage_errors

log = structlog.get_logger()
T = TypeVar("T")

_LOOKUPS_ON_LOOP = 256
"""So many look-ups (a few microseconds each) happen on the event loop; more go to a thread."""


class FilesystemBlobStore:
    """Blobs as files under one root directory.

    executor: runs what would block the event loop for long: large reads and writes, hashing, large look-ups.
    Raises StartupError when the root cannot be used.
    """

    def __init__(self, root: Path, functions: Iterable[DigestFunction], executor: Executor) -> None:
        self._root_fd = open_root(root, "storage.cas.root_dir", (function.name.lower() for function in functions))
        self._executor = executor

    async def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        if len(digests) <= _LOOKUPS_ON_LOOP:
            return self._absent(digests)
        return await self._in_thread(self._absent, digests)

    async def read(self, digest: Digest, *, offset: int = 0, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        if digest.is_empty:
            return
        fd = self._open(digest)
        try:
            end = digest.size_bytes if limit is None else min(digest.size_bytes, offset + limit)
            while offset < end:
                want = min(CHUNK_BYTES, end - offset)
                if want <= INLINE_BYTES:
                    chunk = _pread(digest, fd, want, offset)
                else:
                    chunk = await self._in_thread(_pread, digest, fd, want, offset)
                offset += len(chunk)
                yield chunk
        finally:
            os.close(fd)

    def open_writer(self, digest: Digest) -> _SmallWriter | _LargeWriter:
        if digest.size_bytes <= INLINE_BYTES:
            return _SmallWriter(digest, self._root_fd)
        return _LargeWriter(digest, self._root_fd, self._executor)

    def place(self, digest: Digest, dir_fd: int, name: str, *, executable: bool, sharing: Sharing) -> None:
        if digest.is_empty:
            _create(dir_fd, name, executable, None, 0)
            return
        if sharing is Sharing.LINK:
            source = self._executable_variant(digest) if executable else self._whole_file(digest)
            try:
                os.link(source, name, src_dir_fd=self._root_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
                return
            except FileNotFoundError:
                raise BlobNotFound(digest) from None
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
                    raise
        fd = self._open(digest)
        try:
            _create(dir_fd, name, executable, fd, digest.size_bytes)
        finally:
            os.close(fd)

    def ingest(self, fd: int, function: DigestFunction) -> Digest:
        with storage_errors("store an output"):
            os.lseek(fd, 0, os.SEEK_SET)
            head = os.read(fd, CHUNK_BYTES)
            if len(head) < CHUNK_BYTES and not os.read(fd, 1):
                return self._store_small(function.digest_of(head), head)
            return self._store_large(fd, function)

    def _store_small(self, digest: Digest, data: bytes) -> Digest:
        """Publish a blob that is in memory, unless it is there already."""
        if self._absent([digest]):
            temp = TempFile(self._root_fd)
            try:
                temp.write(data)
                temp.publish(blob_name(digest), len(data), 0o444)
            finally:
                temp.close()
        return digest

    def _store_large(self, fd: int, function: DigestFunction) -> Digest:
        os.lseek(fd, 0, os.SEEK_SET)
        hasher, size_bytes = function.new(), 0
        temp = TempFile(self._root_fd)
        try:
            while chunk := os.read(fd, CHUNK_BYTES):
                hasher.update(chunk)
                size_bytes += len(chunk)
                temp.write(chunk)
            digest = Digest(hasher.hexdigest(), size_bytes, function)
            temp.publish(blob_name(digest), size_bytes, 0o444)
            return digest
        finally:
            temp.close()

    def _absent(self, digests: Collection[Digest]) -> set[Digest]:
        missing = set()
        with storage_errors("look up blobs"):
            for digest in digests:
                if digest.is_empty:
                    continue
                try:
                    is_stored = self._is_stored(digest)
                except FileNotFoundError:
                    is_stored = False
                if not is_stored:
                    missing.add(digest)
        return missing

    def _is_stored(self, digest: Digest) -> bool:
        """Whether the blob's file is as long as it must be; counts as a use. Raises FileNotFoundError."""
        name = blob_name(digest)
        seen = os.stat(name, dir_fd=self._root_fd)
        if seen.st_size != digest.size_bytes:
            log.error("blob.damaged", digest=str(digest), found_bytes=seen.st_size)
            return False
        renew_stamp(name, self._root_fd, seen)
        return True

    def _open(self, digest: Digest) -> int:
        """Open a blob for reading; a file of another length than its name says is damaged, hence not there."""
        name = blob_name(digest)
        with storage_errors(f"read blob {digest}"):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root_fd)
            except FileNotFoundError:
                raise BlobNotFound(digest) from None
            seen = os.fstat(fd)
            if seen.st_size != digest.size_bytes:
                os.close(fd)
                log.error("blob.damaged", digest=str(digest), found_bytes=seen.st_size)
                raise BlobNotFound(digest)
            with contextlib.suppress(OSError):  # evicted just now: it is open, so it can still be read
                renew_stamp(name, self._root_fd, seen)
            return fd

    def _whole_file(self, digest: Digest) -> str:
        """Return the name of the blob's file; one of another length than its name says is not there."""
        with storage_errors(f"look up blob {digest}"):
            try:
                if self._is_stored(digest):
                    return blob_name(digest)
            except FileNotFoundError:
                pass
        raise BlobNotFound(digest)

    def _executable_variant(self, digest: Digest) -> str:
        """Return the name of the blob's executable file, made on first use."""
        name = self._whole_file(digest) + ".x"
        with storage_errors(f"make an executable file of blob {digest}"):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(name, dir_fd=self._root_fd).st_size == digest.size_bytes:
                    return name
            fd = self._open(digest)
            try:
                temp = TempFile(self._root_fd)
                try:
                    _copy(fd, temp.fd, digest.size_bytes)
                    temp.publish(name, digest.size_bytes, 0o555)
                finally:
                    temp.close()
            finally:
                os.close(fd)
        return name

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


class _SmallWriter:
    """An upload that fits in memory: one write, hashed and published on the event loop."""

    def __init__(self, digest: Digest, root_fd: int) -> None:
        self._digest = digest
        self._root_fd = root_fd
        self._chunks: list[bytes] = []
        self._received = 0

    async def write(self, chunk: bytes) -> None:
        self._received += len(chunk)
        check_not_longer(self._digest, self._received)
        self._chunks.append(chunk)

    async def commit(self) -> None:
        data = b"".join(self._chunks)
        check_content(self._digest, data)
        if self._digest.is_empty:
            return
        with storage_errors(f"write blob {self._digest}"):
            temp = TempFile(self._root_fd)
            try:
                temp.write(data)
                temp.publish(blob_name(self._digest), len(data), 0o444)
            finally:
                temp.close()

    async def close(self) -> None:
        self._chunks.clear()


class _LargeWriter:
    """An upload hashed and written in a thread, about a CHUNK_BYTES at a time; memory stays bounded by that.

    A cancelled upload leaves its thread at work. So the steps take turns, and none follows `close`: it would write
    to a descriptor that is somebody else's by then.
    """

    def __init__(self, digest: Digest, root_fd: int, executor: Executor) -> None:
        self._digest = digest
        self._root_fd = root_fd
        self._executor = executor
        self._hasher = digest.function.new()
        self._turn = threading.Lock()
        self._is_closed = False
        self._temp: TempFile | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._received = 0

    async def write(self, chunk: bytes) -> None:
        self._received += len(chunk)
        check_not_longer(self._digest, self._received)
        self._pending.append(chunk)
        self._pending_bytes += len(chunk)
        if self._pending_bytes >= CHUNK_BYTES:
            await self._in_thread(self._flush)

    async def commit(self) -> None:
        await self._in_thread(self._finish)

    async def close(self) -> None:
        # In a thread, because giving back the blocks of a large file takes its time; shielded, so that it happens.
        if not self._is_closed:
            await asyncio.shield(self._in_thread(self._discard))

    def _flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        with storage_errors(f"write blob {self._digest}"):
            if self._temp is None:
                self._temp = TempFile(self._root_fd)
            self._hasher.update(data)
            self._temp.write(data)

    def _finish(self) -> None:
        self._flush()
        check_hash(self._digest, self._received, self._hasher.hexdigest())
        assert self._temp is not None  # _flush made it
        with storage_errors(f"write blob {self._digest}"):
            self._temp.publish(blob_name(self._digest), self._digest.size_bytes, 0o444)

    def _discard(self) -> None:
        self._is_closed = True
        self._pending.clear()
        if self._temp is not None:
            self._temp.close()

    async def _in_thread(self, step: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._take_turn, step)

    def _take_turn(self, step: Callable[[], None]) -> None:
        with self._turn:
            if not self._is_closed:
                step()


def blob_name(digest: Digest) -> str:
    """Return a blob's file name relative to the root. Safe: a Digest holds nothing but hex digits and a number."""
    return f"{digest.function.name.lower()}/{digest.hash[:2]}/{digest.hash}-{digest.size_bytes}"


def _pread(digest: Digest, fd: int, want: int, offset: int) -> bytes:
    with storage_errors(f"read blob {digest}"):
        chunk = os.pread(fd, want, offset)
    if not chunk:
        raise StorageUnavailable(f"blob {digest} became shorter while it was read")
    return chunk


def _create(dir_fd: int, name: str, executable: bool, source_fd: int | None, size_bytes: int) -> None:
    """Create a private file from an open blob, or an empty one. Fails on anything that already has that name."""
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        if source_fd is not None:
            _copy(source_fd, fd, size_bytes)
        os.fchmod(fd, 0o555 if executable else 0o444)
        os.utime(fd, ns=(MTIME_NS, MTIME_NS))
    finally:
        os.close(fd)


def _copy(source_fd: int, target_fd: int, size_bytes: int) -> None:
    offset = 0
    while offset < size_bytes:
        sent = os.sendfile(target_fd, source_fd, offset, size_bytes - offset)
        if sent == 0:
            raise OSError(errno.EIO, "blob became shorter while it was copied")
        offset += sent
