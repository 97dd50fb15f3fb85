"""Verifying a whole store, slowly: what nobody reads rots unseen otherwise."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import structlog

from expbuild.digest import Digest, DigestFunction
from expbuild.storage.base import CHUNK_BYTES
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.janitor import Janitor

log = structlog.get_logger()

_ROUND_S = 7 * 86_400.0
_STEP_S = 1.0
"""So long it works before its owner looks at other things."""

_FIRST_AFTER_S = 300.0


class Scrubber:
    """Hashes blob after blob at a limited rate, and puts damaged ones aside.

    A round over the store begins a few minutes after the start, and each week; at once when the store is at risk, and
    when it is through, it no longer is.
    """

    def __init__(self, blobs: FilesystemBlobStore, janitor: Janitor) -> None:
        self._blobs = blobs
        self._janitor = janitor
        self._rate = blobs.policy.scrub_bytes_per_s
        self._position: Iterator[str] | None = None
        self._next_round = 0.0 if blobs.root.at_risk else time.monotonic() + _FIRST_AFTER_S
        self._found_at_risk = False
        self.verified = 0

    def work(self, stop: threading.Event) -> None:
        """Go on with the round for about a second; returns at once between two rounds, or when this is switched off."""
        root = self._blobs.root
        if not self._rate or not root.is_owner:
            return
        if self._position is None:
            if time.monotonic() < self._next_round:
                return
            self._position = self._names()
            self._found_at_risk = root.at_risk
            self.verified = 0
        end = time.monotonic() + _STEP_S
        while time.monotonic() < end and not stop.is_set():
            name = next(self._position, None)
            if name is None:
                self._finish()
                return
            start = time.monotonic()
            size_bytes = self._check(name)
            stop.wait(max(0.0, size_bytes / self._rate - (time.monotonic() - start)))

    def _finish(self) -> None:
        self._position = None
        self._next_round = time.monotonic() + _ROUND_S
        log.info("storage.scrubbed", root=str(self._blobs.root.path), blobs=self.verified)
        if self._found_at_risk:
            self._blobs.root.verified()

    def _names(self) -> Iterator[str]:
        for shard in self._janitor.shards():
            for candidate in self._janitor.entries(shard):
                yield candidate.name
                if candidate.files > 1:
                    yield candidate.name + ".x"

    def _check(self, name: str) -> int:
        """Verify one file without its use being noted; returns its size."""
        function, _, rest = name.partition("/")
        suffix = ".x" if rest.endswith(".x") else ""
        hash_text, _, size = rest.removesuffix(suffix).rpartition("/")[2].partition("-")
        digest = Digest(hash_text, int(size), DigestFunction[function.upper()])
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileNotFoundError):
            try:
                fd = os.open(name, flags | os.O_NOATIME, dir_fd=self._blobs.root.fd)
            except PermissionError:  # somebody else's file: its time of use is not ours to keep
                fd = os.open(name, flags, dir_fd=self._blobs.root.fd)
            try:
                with contextlib.suppress(OSError):  # so that the disk is read, not memory
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                self._blobs.verification.check(digest, fd, suffix)
                with contextlib.suppress(OSError):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        self.verified += 1
        return max(digest.size_bytes, CHUNK_BYTES // 64)
