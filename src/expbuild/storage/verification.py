"""Verified before used: which blobs are known to be whole, and what happens to one that is not.

A damaged blob is put into `quarantine/` under its root, where somebody can look at it, and is missing from then on; so
clients upload it again. What is known is forgotten at each start, and when there is too much of it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable

import structlog

from expbuild.digest import Digest
from expbuild.storage.base import CHUNK_BYTES
from expbuild.storage.files import MTIME_NS
from expbuild.storage.root import StoreRoot, away_name

log = structlog.get_logger()

_MOST_KNOWN = 250_000
"""So many blobs are remembered as whole, at some 70 bytes each."""

_MOST_KEPT = 64
_MOST_KEPT_BYTES = 256 << 20
"""The latest damaged blobs are kept, so many and so much of them."""


class Verification:
    """The knowledge of one process about the blobs of one root. Used from several threads.

    on_read: every blob is verified before it is first used; else only those of a root at risk.
    """

    def __init__(self, root: StoreRoot, name_of: Callable[[Digest], str], *, on_read: bool) -> None:
        self._root = root
        self._name_of = name_of
        self._known: set[int] = set()
        self.on_read = on_read
        self.quarantined = 0

    def is_due(self, digest: Digest, suffix: str = "") -> bool:
        """Whether a blob has to be hashed before it is used without being read as a whole."""
        return (self.on_read or self._root.at_risk) and not self._is_known(digest, suffix)

    def is_trusted(self, digest: Digest) -> bool:
        """Whether what lies there may stay in place of the same blob uploaded again."""
        return not self._root.at_risk or self._is_known(digest)

    def _is_known(self, digest: Digest, suffix: str = "") -> bool:
        return hash((digest, suffix)) in self._known

    def learn(self, digest: Digest, suffix: str = "") -> None:
        """Remember that a blob is whole: it was just stored, or hashed."""
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known.add(hash((digest, suffix)))

    def check(self, digest: Digest, fd: int, suffix: str = "") -> bool:
        """Hash the file open as `fd`, and put it aside unless it is the blob. Blocks."""
        hasher, offset = digest.function.new(), 0
        while chunk := os.pread(fd, CHUNK_BYTES, offset):
            hasher.update(chunk)
            offset += len(chunk)
        if offset != digest.size_bytes or hasher.hexdigest() != digest.hash:
            self.quarantine(digest, fd, suffix)
            return False
        if os.fstat(fd).st_mtime_ns != MTIME_NS:  # restored from a backup, or touched: it is whole all the same
            with contextlib.suppress(FileNotFoundError):
                name = self._name_of(digest) + suffix
                stamp = os.stat(name, dir_fd=self._root.fd).st_atime_ns
                os.utime(name, ns=(stamp, MTIME_NS), dir_fd=self._root.fd)
        self.learn(digest, suffix)
        return True

    def quarantine(self, digest: Digest, fd: int, suffix: str = "") -> None:
        """Put a damaged blob aside, unless the file open as `fd` was replaced meanwhile."""
        name = self._name_of(digest) + suffix
        self._known.discard(hash((digest, suffix)))
        away, root_fd = away_name(name), self._root.fd
        try:
            os.rename(name, away, src_dir_fd=root_fd, dst_dir_fd=root_fd)
        except FileNotFoundError:
            return
        if os.stat(away, dir_fd=root_fd).st_ino != os.fstat(fd).st_ino:
            with contextlib.suppress(FileExistsError):
                os.link(away, name, src_dir_fd=root_fd, dst_dir_fd=root_fd, follow_symlinks=False)
            os.unlink(away, dir_fd=root_fd)
            return
        self.quarantined += 1
        with contextlib.suppress(FileExistsError):
            os.mkdir("quarantine", 0o700, dir_fd=root_fd)
        kept = f"quarantine/{name.replace('/', '.')}.{secrets.token_hex(4)}"
        os.rename(away, kept, src_dir_fd=root_fd, dst_dir_fd=root_fd)
        log.error("blob.damaged", digest=str(digest), quarantined=kept)
        self._trim()

    def _trim(self) -> None:
        directory = self._root.path / "quarantine"
        files = []
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                seen = path.stat()
                files.append((seen.st_ctime_ns, seen.st_size, path))
        total = 0
        for number, (_, size_bytes, path) in enumerate(sorted(files, reverse=True)):
            total += size_bytes
            if number >= _MOST_KEPT or total > _MOST_KEPT_BYTES:
                path.unlink(missing_ok=True)
