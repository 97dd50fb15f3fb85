"""Compressors as clients have them, apart from the code under test."""

from __future__ import annotations

import sys
import zlib

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSORS = ("zstd", "deflate")
NUMBERS = {"zstd": 1, "deflate": 2}
"""The compressors beside identity, and their numbers on the wire."""


def compress(compressor: str, data: bytes) -> bytes:
    """Return `data` as one zstd frame, or as raw DEFLATE (RFC 1951)."""
    if compressor == "zstd":
        return zstd.compress(data)
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def decompress(compressor: str, data: bytes) -> bytes:
    """The reverse. Raises when the stream is incomplete or something follows it."""
    if compressor == "zstd":
        return zstd.decompress(data)  # takes several frames, refuses a truncated one
    stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    result = stream.decompress(data) + stream.flush()
    assert stream.eof, "the deflate stream is not complete"
    assert not stream.unused_data, "something follows the deflate stream"
    return result
