"""The CAS and the action cache in memory: for trying things out and for tests. Nothing survives the process."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Collection

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound
from expbuild.reapi import ActionResult
from expbuild.storage.base import CHUNK_BYTES, ActionKey, Sharing
from expbuild.storage.checks import check_hash, check_not_longer
from expbuild.storage.files import MTIME_NS


class MemoryBlobStore:
    """Blobs in a dictionary. Unbounded."""

    def __init__(self) -> None:
        self._blobs: dict[Digest, bytes] = {}

    async def find_missing(self, digests: Collection[Digest], *, certain: bool = False) -> set[Digest]:
        return {digest for digest in digests if not digest.is_empty and digest not in self._blobs}

    async def read(self, digest: Digest, *, offset: int = 0, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        data = self._get(digest)
        end = len(data) if limit is None else min(len(data), offset + limit)
        for start in range(offset, end, CHUNK_BYTES):
            yield data[start : min(start + CHUNK_BYTES, end)]

    def open_writer(self, digest: Digest) -> _MemoryWriter:
        return _MemoryWriter(digest, self._blobs)

    def place(self, digest: Digest, dir_fd: int, name: str, *, executable: bool, sharing: Sharing) -> None:
        data = memoryview(self._get(digest))
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.fchmod(fd, 0o555 if executable else 0o444)
            os.utime(fd, ns=(MTIME_NS, MTIME_NS))
        finally:
            os.close(fd)

    def ingest(self, fd: int, function: DigestFunction) -> Digest:
        with os.fdopen(os.dup(fd), "rb") as file:
            file.seek(0)
            data = file.read()
        digest = function.digest_of(data)
        if not digest.is_empty:
            self._blobs[digest] = data
        return digest

    def _get(self, digest: Digest) -> bytes:
        if digest.is_empty:
            return b""
        try:
            return self._blobs[digest]
        except KeyError:
            raise BlobNotFound(digest) from None


class _MemoryWriter:
    """An upload gathered in memory and checked when it is complete."""

    def __init__(self, digest: Digest, blobs: dict[Digest, bytes]) -> None:
        self._digest = digest
        self._blobs = blobs
        self._chunks: list[bytes] = []
        self._hasher = digest.function.new()
        self._received = 0

    async def write(self, chunk: bytes) -> None:
        self._received += len(chunk)
        check_not_longer(self._digest, self._received)
        self._hasher.update(chunk)
        self._chunks.append(chunk)

    async def commit(self) -> None:
        check_hash(self._digest, self._received, self._hasher.hexdigest())
        if not self._digest.is_empty:
            self._blobs[self._digest] = b"".join(self._chunks)

    async def close(self) -> None:
        self._chunks.clear()


class MemoryActionCache:
    """Action results in a dictionary, as bytes so that no caller shares a message with another."""

    def __init__(self) -> None:
        self._results: dict[ActionKey, bytes] = {}

    async def get(self, key: ActionKey) -> ActionResult | None:
        data = self._results.get(key)
        return None if data is None else ActionResult.FromString(data)

    async def put(self, key: ActionKey, result: ActionResult, *, invocation_id: str = "") -> None:
        self._results[key] = result.SerializeToString(deterministic=True)
