"""SHA256TREE: SHA-256 over a Merkle tree of 1 KiB leaves (REAPI DigestFunction.SHA256TREE).

A blob of up to 1024 bytes hashes as SHA-256 does. A longer one is cut into a left part of 2^k bytes and a right part
that is not longer; the hashes of both go through one block of the cipher inside SHA-256, started from constants of its
own. The standard library offers only whole SHA-256, so that one block is computed here in plain Python: right, but slow
(about 10 MB/s), which is why nobody gets this function without naming it in the configuration.
"""

from __future__ import annotations

import hashlib
import struct

LEAF_BYTES = 1024

_PRIMES = [n for n in range(2, 312) if all(n % d for d in range(2, int(n**0.5) + 1))]
_WORD = 0xFFFFFFFF


def _root_fraction(n: int, degree: int) -> int:
    """Return the first 32 bits behind the point of the square (2) or cube (3) root of `n`."""
    shifted, low, high = n << (32 * degree), 0, 1 << 48
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= shifted else (low, middle)
    return low & _WORD


_ROUND_CONSTANTS = tuple(_root_fraction(prime, 3) for prime in _PRIMES[:64])
_START = tuple(_root_fraction(prime, 2) for prime in _PRIMES[8:16])
"""Plain SHA-256 starts from the first eight primes; the next eight keep inner nodes apart from small blobs."""


def combine(left: bytes, right: bytes) -> bytes:
    """Return the hash of a node from the hashes (32 bytes each) of its two parts."""
    words = list(struct.unpack(">16I", left + right))
    for i in range(16, 64):
        x, y = words[i - 15], words[i - 2]
        s0 = (x >> 7 | x << 25) ^ (x >> 18 | x << 14) ^ (x >> 3)
        s1 = (y >> 17 | y << 15) ^ (y >> 19 | y << 13) ^ (y >> 10)
        words.append((words[i - 16] + (s0 & _WORD) + words[i - 7] + (s1 & _WORD)) & _WORD)
    a, b, c, d, e, f, g, h = _START
    for constant, word in zip(_ROUND_CONSTANTS, words, strict=True):
        s1 = ((e >> 6 | e << 26) ^ (e >> 11 | e << 21) ^ (e >> 25 | e << 7)) & _WORD
        t1 = h + s1 + (e & f ^ ~e & g) + constant + word
        s0 = ((a >> 2 | a << 30) ^ (a >> 13 | a << 19) ^ (a >> 22 | a << 10)) & _WORD
        t2 = s0 + (a & b ^ a & c ^ b & c)
        a, b, c, d, e, f, g, h = (t1 + t2) & _WORD, a, b, c, (d + t1) & _WORD, e, f, g
    # Plain SHA-256 would add the start values now; the function is defined on the bare block cipher.
    return struct.pack(">8I", a, b, c, d, e, f, g, h)


class Sha256Tree:
    """A hash in progress, used like those of hashlib."""

    def __init__(self) -> None:
        self._tail = b""
        self._nodes: list[tuple[int, bytes]] = []
        """Finished left parts: (height, hash), heights falling."""

    def update(self, data: bytes, /) -> None:
        """Append bytes."""
        data = self._tail + data
        # The last leaf stays open, even a full one: only what follows tells that there is a tree above it.
        leaves = max(0, (len(data) - 1) // LEAF_BYTES)
        for start in range(0, leaves * LEAF_BYTES, LEAF_BYTES):
            self._push(hashlib.sha256(data[start : start + LEAF_BYTES]).digest())
        self._tail = data[leaves * LEAF_BYTES :]

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far."""
        digest = hashlib.sha256(self._tail).digest()
        for _, left in reversed(self._nodes):
            digest = combine(left, digest)
        return digest.hex()

    def _push(self, digest: bytes) -> None:
        height = 0
        while self._nodes and self._nodes[-1][0] == height:
            digest = combine(self._nodes.pop()[1], digest)
            height += 1
        self._nodes.append((height, digest))
