"""Digests: the names of blobs, and the functions that make them.

One parser (`Digest.parse`) stands between request text and everything else: what leaves it is lower-case hex of
exactly the function's length and a size that blob can have, so it is safe as a part of a file name.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3

from expbuild.errors import InvalidArgument, InvalidDigest
from expbuild.sha256tree import Sha256Tree

MAX_SIZE_BYTES = 2**63 - 1


class Hasher(Protocol):
    """What we use of hashlib and blake3 objects."""

    def update(self, data: bytes, /) -> object: ...
    def hexdigest(self) -> str: ...


class DigestFunction(enum.IntEnum):
    """A digest function, by its number on the wire (DigestFunction.Value)."""

    SHA256 = 1
    SHA1 = 2
    MD5 = 3
    SHA384 = 5
    SHA512 = 6
    SHA256TREE = 8
    BLAKE3 = 9

    @property
    def hash_length(self) -> int:
        """Length of the hash in hex digits."""
        return _TRAITS[self].hash_length

    @property
    def empty_hash(self) -> str:
        """The hash of zero bytes."""
        return _TRAITS[self].empty_hash

    @property
    def segment(self) -> str:
        """The segment that names this function in resource names; empty where the length alone tells (REAPI)."""
        return self.name.lower() if self in (DigestFunction.BLAKE3, DigestFunction.SHA256TREE) else ""

    def new(self) -> Hasher:
        """Start a hash."""
        return _TRAITS[self].new()

    def digest_of(self, data: bytes) -> Digest:
        """Return the digest of `data`."""
        hasher = _TRAITS[self].new()
        hasher.update(data)
        return Digest(hasher.hexdigest(), len(data), self)


@dataclass(frozen=True, slots=True)
class _Traits:
    hash_length: int
    empty_hash: str
    new: Callable[[], Hasher]


def _traits(new: Callable[[], Hasher]) -> _Traits:
    empty_hash = new().hexdigest()
    return _Traits(len(empty_hash), empty_hash, new)


_TRAITS = {
    DigestFunction.SHA256: _traits(hashlib.sha256),
    DigestFunction.SHA1: _traits(hashlib.sha1),
    DigestFunction.MD5: _traits(hashlib.md5),
    DigestFunction.SHA384: _traits(hashlib.sha384),
    DigestFunction.SHA512: _traits(hashlib.sha512),
    DigestFunction.SHA256TREE: _traits(Sha256Tree),
    DigestFunction.BLAKE3: _traits(blake3),
}

_HEX = re.compile(r"[0-9a-f]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Digest:
    """The name of a blob: hash, size in bytes, and the function that made the hash.

    Text from outside goes through `parse`; the plain constructor is for digests we computed ourselves.
    """

    hash: str
    size_bytes: int
    function: DigestFunction

    @classmethod
    def parse(cls, hash_text: str, size_bytes: int, function: DigestFunction) -> Digest:
        """Check a digest from outside. Raises InvalidDigest with what is wrong about it."""
        if len(hash_text) != function.hash_length or _HEX.fullmatch(hash_text) is None:
            raise InvalidDigest(
                f"{hash_text[:200]!r} is not a {function.name} hash: expected {function.hash_length} lower-case "
                "hex digits"
            )
        if not 0 <= size_bytes <= MAX_SIZE_BYTES:
            raise InvalidDigest(f"digest {hash_text} has the impossible size {size_bytes}")
        if size_bytes == 0 and hash_text != function.empty_hash:
            raise InvalidDigest(f"digest {hash_text}/0 is not the {function.name} digest of the empty blob")
        return cls(hash_text, size_bytes, function)

    @property
    def is_empty(self) -> bool:
        """Whether this names the empty blob, which exists everywhere without being stored."""
        return self.size_bytes == 0

    def __str__(self) -> str:
        segment = self.function.segment
        return f"{segment}/{self.hash}/{self.size_bytes}" if segment else f"{self.hash}/{self.size_bytes}"


_INFERABLE = (
    DigestFunction.MD5,
    DigestFunction.SHA1,
    DigestFunction.SHA256,
    DigestFunction.SHA384,
    DigestFunction.SHA512,
)


class DigestFunctions:
    """The digest functions this server accepts; the first is the default (and what old clients are told)."""

    def __init__(self, functions: Iterable[DigestFunction]) -> None:
        self.enabled = tuple(functions)
        self._by_length = {f.hash_length: f for f in _INFERABLE if f in self.enabled}

    @property
    def default(self) -> DigestFunction:
        """The function named first in the configuration."""
        return self.enabled[0]

    def resolve(self, number: int, hash_length: int) -> DigestFunction:
        """Return the function a request means.

        number: the request's `digest_function`, 0 when it names none; then the hash length decides, among the enabled
        functions whose length is their mark, and the default stands in when that finds nothing of this length.
        Raises InvalidArgument for a function that is unknown or not enabled.
        """
        if number:
            return self._named(number)
        if self.default.hash_length == hash_length:
            return self.default
        return self._by_length.get(hash_length, self.default)

    def from_segment(self, segment: str) -> DigestFunction | None:
        """Return the enabled function a resource-name segment names, or None when it names no function at all.

        Raises InvalidArgument when the function exists but is not enabled.
        """
        known = _SEGMENTS.get(segment)
        return None if known is None else self._named(known)

    def _named(self, number: int) -> DigestFunction:
        if number not in self.enabled:
            names = ", ".join(function.name for function in self.enabled)
            raise InvalidArgument(f"digest function {number} is not served here; this server accepts {names}")
        return DigestFunction(number)


_SEGMENTS = {function.name.lower(): int(function) for function in DigestFunction} | {
    "vso": 4,
    "murmur3": 7,
    "gitsha1": 10,
}
