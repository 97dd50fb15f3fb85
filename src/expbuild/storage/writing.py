"""Uploads into files: space reserved, then written and hashed, then published whole or not at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass

from expbuild.digest import Digest
from expbuild.storage.base import CHUNK_BYTES
from expbuild.storage.budget import Budget
from expbuild.storage.checks import check_content, check_hash, check_not_longer
from expbuild.storage.files import TempFile, blob_name, storage_errors
from expbuild.storage.root import Durability, StoreRoot
from expbuild.storage.verification import Verification


@dataclass(frozen=True, slots=True)
class Target:
    """Where one blob goes."""

    digest: Digest
    root: StoreRoot
    budget: Budget
    verification: Verification
    executor: Executor

    def store(self, data: bytes) -> None:
        """Reserve space for a small blob and publish it. Blocks. Raises StorageFull, StorageUnavailable."""
        with storage_errors(f"write blob {self.digest}"), self.budget.reserved(len(data)):
            self.publish_small(data)

    def publish_small(self, data: bytes) -> None:
        """Write and publish a blob whose space is reserved."""
        with closing(TempFile(self.root)) as temp:
            temp.write(data)
            self.publish(temp)

    def publish(self, temp: TempFile) -> None:
        """Publish a file that holds the blob."""
        keep = self.verification.is_trusted(self.digest)
        if temp.publish(blob_name(self.digest), self.digest.size_bytes, 0o444, keep=keep):
            self.verification.learn(self.digest)

    async def in_thread(self, function: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self.executor, function, *args)


class SmallWriter:
    """An upload that fits in memory: one write, hashed and published on the event loop.

    In a thread where it waits for the disk: for durability, or for room.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._chunks: list[bytes] = []
        self._received = 0

    async def write(self, chunk: bytes) -> None:
        self._received += len(chunk)
        check_not_longer(self._target.digest, self._received)
        self._chunks.append(chunk)

    async def commit(self) -> None:
        target, data = self._target, b"".join(self._chunks)
        check_content(target.digest, data)
        if target.digest.is_empty:
            return
        if target.root.durability is not Durability.NONE or not target.budget.try_reserve(len(data)):
            await target.in_thread(target.store, data)
            return
        stored = False
        try:
            with target.budget.watched(), storage_errors(f"write blob {target.digest}"):
                target.publish_small(data)
            stored = True
        finally:
            target.budget.release(len(data), stored=stored)

    async def close(self) -> None:
        self._chunks.clear()


class LargeWriter:
    """An upload hashed and written in a thread, about a CHUNK_BYTES at a time; memory stays bounded by that.

    A cancelled upload leaves its thread at work. So the steps take turns, and none follows `close`: it would write
    to a descriptor that is somebody else's by then.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._digest = target.digest
        self._hasher = target.digest.function.new()
        self._turn = threading.Lock()
        self._is_closed = False
        self._temp: TempFile | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._received = 0
        self._reserved = False
        self._stored = False

    async def write(self, chunk: bytes) -> None:
        if not self._reserved and not (self._target.budget.try_reserve(self._digest.size_bytes)):
            await self._in_thread(self._reserve)
        self._reserved = True
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

    def _reserve(self) -> None:
        self._target.budget.reserve(self._digest.size_bytes)
        self._reserved = True

    def _flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        with self._target.budget.watched(), storage_errors(f"write blob {self._digest}"):
            if self._temp is None:
                self._temp = TempFile(self._target.root)
            self._hasher.update(data)
            self._temp.write(data)

    def _finish(self) -> None:
        self._flush()
        check_hash(self._digest, self._received, self._hasher.hexdigest())
        assert self._temp is not None  # _flush made it
        with self._target.budget.watched(), storage_errors(f"write blob {self._digest}"):
            self._target.publish(self._temp)
        self._stored = True

    def _discard(self) -> None:
        self._is_closed = True
        self._pending.clear()
        if self._temp is not None:
            self._temp.close()
        if self._reserved:
            self._target.budget.release(self._digest.size_bytes, stored=self._stored)

    async def _in_thread(self, step: Callable[[], None]) -> None:
        await self._target.in_thread(self._take_turn, step)

    def _take_turn(self, step: Callable[[], None]) -> None:
        with self._turn:
            if not self._is_closed:
                step()
