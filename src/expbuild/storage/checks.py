"""Whether the bytes of an upload are the blob its digest names."""

from __future__ import annotations

from expbuild.digest import Digest
from expbuild.errors import DigestMismatch


def check_not_longer(digest: Digest, received: int) -> None:
    """Raise DigestMismatch once more bytes arrived than the digest names."""
    if received > digest.size_bytes:
        raise DigestMismatch(f"blob {digest}: received at least {received} bytes, the digest says {digest.size_bytes}")


def check_content(digest: Digest, data: bytes) -> None:
    """Raise DigestMismatch unless `data` is the blob named `digest`."""
    hasher = digest.function.new()
    hasher.update(data)
    check_hash(digest, len(data), hasher.hexdigest())


def check_hash(digest: Digest, size_bytes: int, hash_text: str) -> None:
    """Raise DigestMismatch unless size and hash are the digest's."""
    if size_bytes != digest.size_bytes:
        raise DigestMismatch(f"blob {digest}: received {size_bytes} bytes, the digest says {digest.size_bytes}")
    if hash_text != digest.hash:
        raise DigestMismatch(f"blob {digest}: the data received hashes to {hash_text}")
