"""Verifying a whole store, slowly: what nobody reads rots unseen otherwise."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import structlog

from expbuild.digest import Digest, DigestFunction
from expbuild.storage.files import open_unnoticed
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.janitor import Janitor

log = structlog.get_logger()

_ROUND_S = 7 * 86_400.0
_STEP_S = 1.0
"""So long it works before its owner looks at other things."""

_LEAST_BYTES = 16 << 10
"""What a smaller file counts for: opening one costs as much."""

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
            self._check(name, stop)

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

    def _check(self, name: str, stop: threading.Event) -> None:
        """Verify one file at our rate, without its use being noted."""

        def goes_on(size_bytes: int) -> bool:
            return not stop.wait(max(size_bytes, _LEAST_BYTES) / self._rate)

        function, _, rest = name.partition("/")
        suffix = ".x" if rest.endswith(".x") else ""
        hash_text, _, size = rest.removesuffix(suffix).rpartition("/")[2].partition("-")
        digest = Digest(hash_text, int(size), DigestFunction[function.upper()])
        with contextlib.suppress(FileNotFoundError):
            fd = open_unnoticed(name, self._blobs.root.fd)
            try:
                with contextlib.suppress(OSError):  # so that the disk is read, not memory
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                self._blobs.verification.check(digest, fd, suffix, goes_on=goes_on)
                with contextlib.suppress(OSError):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        self.verified += 1
