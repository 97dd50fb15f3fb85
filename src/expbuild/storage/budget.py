"""How much a store may hold: asked before a byte is accepted, so that the disk never fills by our doing."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from expbuild.errors import StorageFull
from expbuild.storage.files import FULL
from expbuild.storage.root import StoreRoot

BLOCK_BYTES = 4096
"""What files are counted in; a file takes one block more for its name and inode."""

_LOOK_AGAIN_S = 0.2
"""Free space is asked for at most this often; between two looks we count ourselves."""

_BELIEVE_FULL_S = 2.0
"""So long after a write failed for lack of space we take the disk for full, unless something was evicted."""

_LOW_WATER = 0.95
"""Eviction goes down to this part of the limit, so that it is not needed again at once."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """What has to go before something fits; all 0 when it fits.

    over_bytes: beyond the store's size limit. free_bytes, free_inodes: lacking on the file system.
    """

    over_bytes: int = 0
    free_bytes: int = 0
    free_inodes: int = 0

    def __bool__(self) -> bool:
        return self.over_bytes > 0 or self.free_bytes > 0 or self.free_inodes > 0


class Budget:
    """Counts what a store holds and what uploads have reserved. Used from several threads.

    max_size_bytes: of everything in the store; None for no limit. min_free_bytes: to be left free on the file system;
    None for 1 GiB, or a twentieth of a small file system.
    """

    def __init__(self, root: StoreRoot, max_size_bytes: int | None, min_free_bytes: int | None) -> None:
        self._root = root
        self._max_size_bytes = max_size_bytes
        self._min_free_bytes = min_free_bytes
        self._lock = threading.Lock()
        self._looked_at = self._full_until = 0.0
        self._free_bytes = self._free_inodes = 0
        self._least_bytes = self._least_inodes = 0
        self._reserved_bytes = self._reserved_files = 0
        self.used_bytes = self.used_files = 0
        self.make_room: Callable[[int], None] | None = None
        """Frees space for so many bytes, as far as it can; blocks. Set by who evicts."""

    def try_reserve(self, size_bytes: int) -> bool:
        """Reserve space for one file, if there is room now. Takes microseconds."""
        need = allocated(size_bytes)
        with self._lock:
            if self._shortage(need, 1):
                return False
            self._reserved_bytes += need
            self._reserved_files += 1
            return True

    def reserve(self, size_bytes: int) -> None:
        """Reserve space for one file; evict where there is none. Blocks. Raises StorageFull."""
        if self.try_reserve(size_bytes):
            return
        if self.make_room is not None:
            self.make_room(size_bytes)
            if self.try_reserve(size_bytes):
                return
        raise StorageFull(self._explain(size_bytes))

    def release(self, size_bytes: int, *, stored: bool) -> None:
        """Give back a reservation; `stored`: the file is there now."""
        need = allocated(size_bytes)
        with self._lock:
            self._reserved_bytes -= need
            self._reserved_files -= 1
            if stored:
                self._count(need, 1)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Learn from an attempt in the block that fails for lack of space, though we thought there was some."""
        try:
            yield
        except StorageFull:
            self._learn_full()
            raise
        except OSError as error:
            if error.errno in FULL:
                self._learn_full()
            raise

    @contextlib.contextmanager
    def reserved(self, size_bytes: int) -> Iterator[None]:
        """Hold a reservation for a file that the block stores. Blocks. Raises StorageFull."""
        self.reserve(size_bytes)
        stored = False
        try:
            with self.watched():
                yield
            stored = True
        finally:
            self.release(size_bytes, stored=stored)

    def removed(self, size_bytes: int, files: int) -> None:
        """Note that files left the store; size_bytes as counted by a scan."""
        with self._lock:
            self.used_bytes = max(0, self.used_bytes - size_bytes)
            self.used_files = max(0, self.used_files - files)
            self._looked_at = self._full_until = 0.0

    def counted(self, used_bytes: int, used_files: int) -> None:
        """Take what a scan has counted in place of what we counted ourselves."""
        with self._lock:
            self.used_bytes, self.used_files = used_bytes, used_files

    def shortage(self, size_bytes: int = 0, *, low_water: bool = False) -> Shortage:
        """Return what is lacking to store a file of `size_bytes` (0: to stay within the limits).

        low_water: to have some room beyond that.
        """
        with self._lock:
            self._looked_at = 0.0
            return self._shortage(allocated(size_bytes) if size_bytes else 0, 1 if size_bytes else 0, low_water)

    @property
    def free_bytes(self) -> int:
        """What the file system has left for us."""
        found = os.statvfs(self._root.fd)
        return found.f_bavail * found.f_frsize

    def _shortage(self, need: int, files: int, low_water: bool = False) -> Shortage:
        self._look()
        part = _LOW_WATER if low_water else 1
        limit = self._max_size_bytes
        over = 0 if limit is None else self.used_bytes + self._reserved_bytes + need - int(limit * part)
        spare_bytes = int(self._least_bytes / part) - self._least_bytes + need
        free = self._least_bytes + self._reserved_bytes + spare_bytes - self._free_bytes
        inodes = self._least_inodes + self._reserved_files + files - self._free_inodes
        if time.monotonic() < self._full_until:
            free, inodes = max(free, BLOCK_BYTES), max(inodes, 1)
        return Shortage(max(0, over), max(0, free), max(0, inodes))

    def _learn_full(self) -> None:
        with self._lock:
            self._full_until = time.monotonic() + _BELIEVE_FULL_S

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _LOOK_AGAIN_S:
            return
        self._looked_at = now
        found = os.statvfs(self._root.fd)
        self._free_bytes = found.f_bavail * found.f_frsize
        total_bytes = found.f_blocks * found.f_frsize
        least = self._min_free_bytes
        self._least_bytes = min(1 << 30, total_bytes // 20) if least is None else least
        if found.f_files > 0:
            self._free_inodes, self._least_inodes = found.f_favail, min(1000, found.f_files // 100)
        else:  # a file system that makes inodes as it needs them
            self._free_inodes, self._least_inodes = 1 << 60, 0

    def _count(self, size_bytes: int, files: int) -> None:
        self.used_bytes += size_bytes
        self.used_files += files
        self._free_bytes -= size_bytes
        self._free_inodes -= files

    def _explain(self, size_bytes: int) -> str:
        lacking = self.shortage(size_bytes)
        section = self._root.key.removesuffix(".root_dir")
        what = f"cannot store {size_bytes} bytes"
        if lacking.over_bytes:
            return (
                f"{what}: the store is full ({section}.max_size_bytes = {self._max_size_bytes}), and everything in it "
                "was promised to clients minutes ago; make it larger or try again later"
            )
        if lacking.free_inodes:
            return f"{what}: no inodes left on the storage device; remove files or try again later"
        if self._least_bytes:
            what += f" beside the {self._least_bytes} that {section}.min_free_bytes keeps free"
        return f"{what}: no space left on the storage device; free space or try again later"


def allocated(size_bytes: int) -> int:
    """Return what a file takes on the disk, at most."""
    return (size_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES
