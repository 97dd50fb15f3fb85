"""Reading one blob so that nobody gets a damaged one whole."""

from __future__ import annotations

import errno
import os

from expbuild.digest import Digest
from expbuild.errors import BlobDamaged, BlobNotFound
from expbuild.storage.files import storage_errors
from expbuild.storage.verification import Verification


class Reading:
    """One reader of the file open as `fd`.

    A blob that is read as a whole is hashed as it goes, and its last chunk is handed out only when the hash is right.
    One that is read in part is hashed first, once. is_whole: whether it is read as a whole.
    """

    def __init__(self, digest: Digest, fd: int, verification: Verification, *, is_whole: bool) -> None:
        self._digest = digest
        self._fd = fd
        self._verification = verification
        self._hasher = digest.function.new() if is_whole and self._is_verified else None

    @property
    def needs_check(self) -> bool:
        """Whether the blob has to be hashed before a part of it is read."""
        return self._hasher is None and self._verification.is_due(self._digest)

    @property
    def _is_verified(self) -> bool:
        return self._verification.on_read or self._verification.is_due(self._digest)

    def check_first(self) -> None:
        """Hash the whole blob. Blocks. Raises BlobNotFound when it is damaged."""
        with storage_errors(f"read blob {self._digest}"):
            try:
                is_whole = self._verification.check(self._digest, self._fd)
            except OSError as error:
                self._give_up(error)
                raise BlobNotFound(self._digest) from error
        if not is_whole:
            raise BlobNotFound(self._digest)

    def next_chunk(self, want: int, offset: int) -> bytes:
        """Return the bytes at `offset`, one call after the other. Blocks for a moment.

        Raises BlobNotFound for a damaged blob of which nothing was handed out, else BlobDamaged.
        """
        chunk = b""
        with storage_errors(f"read blob {self._digest}"):
            try:
                chunk = os.pread(self._fd, want, offset)
            except OSError as error:
                self._give_up(error)
        if len(chunk) != want:
            self._fail(offset)
        if self._hasher is not None:
            self._hasher.update(chunk)
            if offset + want == self._digest.size_bytes:
                if self._hasher.hexdigest() != self._digest.hash:
                    self._fail(offset)
                self._verification.learn(self._digest)
        return chunk

    def _give_up(self, error: OSError) -> None:
        """Take what the disk cannot read for damaged; other errors pass."""
        if error.errno != errno.EIO:
            raise error

    def _fail(self, offset: int) -> None:
        with storage_errors(f"put aside damaged blob {self._digest}"):
            self._verification.quarantine(self._digest, self._fd)
        if offset == 0:
            raise BlobNotFound(self._digest)
        raise BlobDamaged(self._digest)
