"""The contracts of storage: `BlobStore` (the CAS), `BlobWriter` (one upload) and `ActionCache`."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from typing import Protocol

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobDamaged, BlobNotFound
from expbuild.reapi import ActionResult

CHUNK_BYTES = 1 << 20
"""Largest chunk a store yields, and the unit in which files are copied."""

INLINE_BYTES = 256 << 10
"""Up to this size a blob is read, hashed and written on the event loop: a thread hop would cost more."""


class Sharing(enum.Enum):
    """How a blob's file may appear in an input root."""

    LINK = "link"
    """A hard link: only for an action whose uid is neither 0 nor the owner of the file (else it could write to it)."""
    COPY = "copy"
    """A private copy: always safe."""


class BlobWriter(Protocol):
    """One upload. Nothing is visible before `commit`; `close` without it leaves no trace."""

    async def write(self, chunk: bytes) -> None:
        """Append. Raises DigestMismatch at the first byte beyond the digest's size, StorageFull, StorageUnavailable."""

    async def commit(self) -> None:
        """Check size and hash, then publish, whole or not at all.

        Raises DigestMismatch, StorageFull, StorageUnavailable.
        """

    async def close(self) -> None:
        """Release everything the upload holds; idempotent, and always called."""


class BlobStore(Protocol):
    """Blobs by digest. Every blob was hashed on its way in; the empty blob exists without being stored."""

    async def find_missing(self, digests: Collection[Digest], *, certain: bool = False) -> set[Digest]:
        """Return the digests whose blobs are not stored.

        Exact, not approximate: clients skip uploads on the strength of it. Present blobs count as used now. A store
        that a crash may have damaged answers from name and size; `certain` makes it hash such blobs first.
        Raises StorageUnavailable. (REAPI: FindMissingBlobs)
        """

    def read(self, digest: Digest, *, offset: int = 0, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield the blob's bytes from `offset` on, at most `limit` of them, in chunks of up to CHUNK_BYTES.

        0 <= offset <= size is the caller's duty. A blob evicted while it is read is still read to its end.
        A damaged blob is missing, or, if that shows only at its end, the last chunk is withheld.
        Raises BlobNotFound before the first chunk, BlobDamaged before the last one, StorageUnavailable.
        """

    def open_writer(self, digest: Digest) -> BlobWriter:
        """Start an upload of the blob named `digest`. Several uploads of one blob may run at once; all succeed."""

    def place(self, digest: Digest, dir_fd: int, name: str, *, executable: bool, sharing: Sharing) -> None:
        """Make the blob appear as file `name` (mode 0444 or 0555) in the directory open as `dir_fd`.

        Blocking: called in worker threads. The empty blob is always a new file, never a link.
        Raises BlobNotFound; OSError of the target directory passes through.
        """

    def ingest(self, fd: int, function: DigestFunction) -> Digest:
        """Store what the regular file open as `fd` holds, from its start, and return its digest.

        Blocking: called in worker threads. The bytes are copied and hashed in one pass, so that nobody who still has
        the file open can change what was stored. Raises StorageFull, StorageUnavailable.
        """


@dataclass(frozen=True, slots=True)
class ActionKey:
    """What an action result is stored under: entries never cross instances or digest functions."""

    instance_name: str
    action_digest: Digest


class ActionCache(Protocol):
    """Action results by action digest."""

    async def get(self, key: ActionKey) -> ActionResult | None:
        """Return the stored result, or None. A damaged entry counts as none. Raises StorageUnavailable."""

    async def put(self, key: ActionKey, result: ActionResult, *, invocation_id: str = "") -> None:
        """Store the result in place of any earlier one. Raises StorageFull, StorageUnavailable.

        invocation_id: of the build that brought it, for those who look into the store.
        """


async def read_blob(store: BlobStore, digest: Digest) -> bytes:
    """Return a whole blob; for blobs whose size the caller has bounded. Raises BlobNotFound, StorageUnavailable."""
    try:
        return b"".join([chunk async for chunk in store.read(digest)])
    except BlobDamaged as error:  # nobody has seen a part of it, so it is simply missing
        raise BlobNotFound(digest) from error


async def write_blob(store: BlobStore, digest: Digest, data: bytes) -> None:
    """Store a whole blob. Raises DigestMismatch, StorageFull, StorageUnavailable."""
    writer = store.open_writer(digest)
    try:
        await writer.write(data)
        await writer.commit()
    finally:
        await writer.close()
