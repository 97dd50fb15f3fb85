"""The CAS in files: the directory is the database.

A blob is the file `<function>/<hh>/<hash>-<size>` (mode 0444). The first time it is wanted as an executable input a
second file with the suffix `.x` (mode 0555) appears beside it, so that nobody ever changes the mode of an inode that is
linked elsewhere. A file's atime is its promise stamp: when we last told somebody that the blob is there. Its mtime is a
constant, so another one tells that somebody has touched the file, and it is hashed before it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import structlog

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound
from expbuild.storage.base import CHUNK_BYTES, INLINE_BYTES, Sharing
from expbuild.storage.budget import Budget
from expbuild.storage.files import MTIME_NS, TempFile, blob_name, looks_whole, renew_stamp, storage_errors
from expbuild.storage.policy import UNLIMITED, StorePolicy
from expbuild.storage.reading import Reading
from expbuild.storage.root import StoreRoot
from expbuild.storage.verification import Verification
from expbuild.storage.writing import LargeWriter, SmallWriter, Target

log = structlog.get_logger()
T = TypeVar("T")

_KEY = "storage.cas.root_dir"

_LOOKUPS_ON_LOOP = 256
"""So many look-ups (a few microseconds each) happen on the event loop; more go to a thread."""

_VARIANT = ".x"
"""Ends the name of a blob's executable file."""


class FilesystemBlobStore:
    """Blobs as files under one root directory.

    executor: runs what would block the event loop for long: large reads and writes, hashing, large look-ups.
    Raises StartupError when the root cannot be used.
    """

    def __init__(
        self,
        root: Path,
        functions: Iterable[DigestFunction],
        executor: Executor,
        policy: StorePolicy = UNLIMITED,
    ) -> None:
        names = tuple(function.name.lower() for function in functions)
        self.root = StoreRoot(root, _KEY, "cas", durability=policy.durability, subdirectories=names)
        self.policy = policy
        self.functions = names
        self.budget = Budget(self.root, policy.max_size_bytes, policy.min_free_bytes)
        self.verification = Verification(self.root, blob_name, on_read=policy.verify_on_read)
        self._root_fd = self.root.fd
        self._executor = executor

    async def find_missing(self, digests: Collection[Digest], *, certain: bool = False) -> set[Digest]:
        if certain and self.root.at_risk:
            return await self._in_thread(self._absent, digests, True)
        if len(digests) > _LOOKUPS_ON_LOOP:
            return await self._in_thread(self._absent, digests)
        doubtful: list[Digest] = []
        missing = self._absent(digests, doubtful=doubtful)
        if doubtful:
            missing |= await self._in_thread(self._absent, doubtful)
        return missing

    async def read(self, digest: Digest, *, offset: int = 0, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        if digest.is_empty:
            return
        fd, is_doubtful = self._open(digest)
        try:
            end = digest.size_bytes if limit is None else min(digest.size_bytes, offset + limit)
            reading = Reading(digest, fd, self.verification, is_whole=offset == 0 and end == digest.size_bytes)
            if is_doubtful or reading.needs_check:
                await self._in_thread(reading.check_first)
            while offset < end:
                want = min(CHUNK_BYTES, end - offset)
                if want <= INLINE_BYTES:
                    chunk = reading.next_chunk(want, offset)
                else:
                    chunk = await self._in_thread(reading.next_chunk, want, offset)
                offset += len(chunk)
                yield chunk
        finally:
            os.close(fd)

    def open_writer(self, digest: Digest) -> SmallWriter | LargeWriter:
        target = Target(digest, self.root, self.budget, self.verification, self._executor)
        return SmallWriter(target) if digest.size_bytes <= INLINE_BYTES else LargeWriter(target)

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
        fd = self._open_verified(digest)
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
        if self._absent([digest], certain=True):
            Target(digest, self.root, self.budget, self.verification, self._executor).store(data)
        return digest

    def _store_large(self, fd: int, function: DigestFunction) -> Digest:
        os.lseek(fd, 0, os.SEEK_SET)
        hasher, size_bytes = function.new(), 0
        with self.budget.reserved(os.fstat(fd).st_size), closing(TempFile(self.root)) as temp:
            while chunk := os.read(fd, CHUNK_BYTES):
                hasher.update(chunk)
                size_bytes += len(chunk)
                temp.write(chunk)
            digest = Digest(hasher.hexdigest(), size_bytes, function)
            keep = self.verification.is_trusted(digest)
            if temp.publish(blob_name(digest), size_bytes, 0o444, keep=keep):
                self.verification.learn(digest)
        return digest

    def _absent(
        self, digests: Collection[Digest], certain: bool = False, doubtful: list[Digest] | None = None
    ) -> set[Digest]:
        """Return those that are not stored. certain: a blob at risk is hashed first.

        doubtful: takes those whose file somebody has touched; without it, they are hashed here.
        """
        missing = set()
        certain = certain and self.root.at_risk
        with storage_errors("look up blobs"):
            for digest in digests:
                if digest.is_empty:
                    continue
                try:
                    seen = self._stat(digest)
                    if seen is None:
                        is_stored = False
                    elif not looks_whole(seen, digest.size_bytes) or (certain and self.verification.is_due(digest)):
                        if doubtful is not None:
                            doubtful.append(digest)
                            continue
                        is_stored = self._check(digest)
                    else:
                        renew_stamp(blob_name(digest), self._root_fd, seen, self.policy.renewal_s)
                        is_stored = True
                except FileNotFoundError:
                    is_stored = False
                if not is_stored:
                    missing.add(digest)
        return missing

    def _stat(self, digest: Digest) -> os.stat_result | None:
        """Look at a blob's file; None when it is of another length. Raises FileNotFoundError."""
        seen = os.stat(blob_name(digest), dir_fd=self._root_fd)
        if seen.st_size != digest.size_bytes:
            log.error("blob.damaged", digest=str(digest), found_bytes=seen.st_size)
            return None
        return seen

    def _check(self, digest: Digest) -> bool:
        """Hash a blob's file and renew it; put aside one that is damaged. Raises FileNotFoundError."""
        name = blob_name(digest)
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root_fd)
        try:
            if not self.verification.check(digest, fd):
                return False
        finally:
            os.close(fd)
        renew_stamp(name, self._root_fd)
        return True

    def _open(self, digest: Digest) -> tuple[int, bool]:
        """Open a blob for reading, and tell whether somebody has touched its file.

        A file of another length than its name says is damaged, hence not there.
        """
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
            if not looks_whole(seen, digest.size_bytes):
                return fd, True
            with contextlib.suppress(OSError):  # evicted just now: it is open, so it can still be read
                renew_stamp(name, self._root_fd, seen, self.policy.renewal_s)
            return fd, False

    def _open_verified(self, digest: Digest) -> int:
        """Open a blob that is known to be whole. Blocks."""
        fd, is_doubtful = self._open(digest)
        try:
            if (is_doubtful or self.verification.is_due(digest)) and not self.verification.check(digest, fd):
                raise BlobNotFound(digest)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _whole_file(self, digest: Digest) -> str:
        """Return the name of the file of a blob that is known to be whole. Blocks."""
        name = blob_name(digest)
        with storage_errors(f"look up blob {digest}"):
            try:
                seen = self._stat(digest)
                if seen is not None:
                    if not looks_whole(seen, digest.size_bytes) or self.verification.is_due(digest):
                        if self._check(digest):
                            return name
                    else:
                        renew_stamp(name, self._root_fd, seen, self.policy.renewal_s)
                        return name
            except FileNotFoundError:
                pass
        raise BlobNotFound(digest)

    def _executable_variant(self, digest: Digest) -> str:
        """Return the name of the blob's executable file, made on first use."""
        name = self._whole_file(digest) + _VARIANT
        with storage_errors(f"make an executable file of blob {digest}"):
            with contextlib.suppress(FileNotFoundError):
                seen = os.stat(name, dir_fd=self._root_fd)
                if looks_whole(seen, digest.size_bytes) and not self.verification.is_due(digest, _VARIANT):
                    return name
            fd = self._open_verified(digest)
            try:
                with self.budget.reserved(digest.size_bytes), closing(TempFile(self.root)) as temp:
                    _copy(fd, temp.fd, digest.size_bytes)
                    temp.publish(name, digest.size_bytes, 0o555, keep=False)
            finally:
                os.close(fd)
        self.verification.learn(digest, _VARIANT)
        return name

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


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
