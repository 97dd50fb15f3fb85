"""The compressors of the wire, as streams whose memory is bounded whatever the input says."""

from __future__ import annotations

import enum
import sys
import zlib
from collections.abc import Iterator
from typing import Protocol

from expbuild.errors import InvalidArgument

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 256 << 10
"""Largest piece a decoder returns at once."""

SLICE_BYTES = 16 << 10
"""So much input a decoder looks at before others get their turn. The libraries copy what is left of their input at the
end of every frame and piece, so that thousands of tiny frames in one large message would take minutes."""

_ZSTD_LEVEL = 1
_ZSTD_WINDOW_LOG = 23
"""Frames may ask for a window of up to 8 MiB, what the format recommends every decoder to support."""


class Compressor(enum.IntEnum):
    """A compressor, by its number on the wire (Compressor.Value)."""

    IDENTITY = 0
    ZSTD = 1
    DEFLATE = 2


class Decoder(Protocol):
    """Decompresses one stream."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` decompresses to, in pieces of at most PIECE_BYTES. Raises InvalidArgument.

        An empty piece means nothing; it comes wherever the caller should let the event loop do something else.
        """

    def finish(self) -> None:
        """Check that the stream was complete. Raises InvalidArgument."""


class Encoder(Protocol):
    """Compresses one stream."""

    def encode(self, data: bytes) -> bytes:
        """Return what can be sent so far; may be empty."""

    def finish(self) -> bytes:
        """Return the end of the stream."""


class IdentityDecoder:
    """No compression."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        pass


class ZstdDecoder:
    """Zstandard: any number of frames, one after the other."""

    def __init__(self) -> None:
        self._frame = self._new_frame()
        self._is_between_frames = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), SLICE_BYTES):
            yield from self._feed_slice(data[start : start + SLICE_BYTES])
            yield b""

    def _feed_slice(self, data: bytes) -> Iterator[bytes]:
        while data or not (self._frame.needs_input or self._frame.eof):
            if self._frame.eof:
                self._frame = self._new_frame()
            try:
                piece = self._frame.decompress(data, PIECE_BYTES)
            except zstd.ZstdError as error:
                raise InvalidArgument(f"the data is not a valid zstd stream: {error}") from error
            self._is_between_frames = self._frame.eof
            data = self._frame.unused_data if self._frame.eof else b""
            if piece:
                yield piece

    def finish(self) -> None:
        if not self._is_between_frames:
            raise InvalidArgument("the zstd stream ends in the middle of a frame")

    @staticmethod
    def _new_frame() -> zstd.ZstdDecompressor:
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})


class DeflateDecoder:
    """Raw DEFLATE (RFC 1951), without a zlib or gzip header."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS)

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), SLICE_BYTES):
            yield from self._feed_slice(data[start : start + SLICE_BYTES])
            yield b""

    def _feed_slice(self, data: bytes) -> Iterator[bytes]:
        piece = b""
        while data or len(piece) == PIECE_BYTES:  # a full piece may leave output behind even without input
            if data and self._stream.eof:
                raise InvalidArgument("there is data behind the end of the deflate stream")
            try:
                piece = self._stream.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise InvalidArgument(f"the data is not a valid deflate stream: {error}") from error
            data = self._stream.unused_data or self._stream.unconsumed_tail
            if piece:
                yield piece

    def finish(self) -> None:
        if not self._stream.eof:
            raise InvalidArgument("the deflate stream ends before its last block")


class ZstdEncoder:
    """One zstd frame."""

    def __init__(self) -> None:
        self._stream = zstd.ZstdCompressor(level=_ZSTD_LEVEL)

    def encode(self, data: bytes) -> bytes:
        return self._stream.compress(data)

    def finish(self) -> bytes:
        return self._stream.flush()


class DeflateEncoder:
    """Raw DEFLATE."""

    def __init__(self) -> None:
        self._stream = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)

    def encode(self, data: bytes) -> bytes:
        return self._stream.compress(data)

    def finish(self) -> bytes:
        return self._stream.flush()


def decoder(compressor: Compressor) -> Decoder:
    """Return a decoder for one stream."""
    match compressor:
        case Compressor.IDENTITY:
            return IdentityDecoder()
        case Compressor.ZSTD:
            return ZstdDecoder()
        case Compressor.DEFLATE:
            return DeflateDecoder()


def encoder(compressor: Compressor) -> Encoder | None:
    """Return an encoder for one stream, or None where nothing has to be done."""
    match compressor:
        case Compressor.IDENTITY:
            return None
        case Compressor.ZSTD:
            return ZstdEncoder()
        case Compressor.DEFLATE:
            return DeflateEncoder()


def decompress(compressor: Compressor, data: bytes, size_bytes: int) -> bytes:
    """Return what `data` decompresses to. Raises InvalidArgument for a broken stream and beyond `size_bytes`."""
    if compressor is Compressor.IDENTITY:
        return data
    stream = decoder(compressor)
    pieces, total = [], 0
    for piece in stream.feed(data):
        total += len(piece)
        if total > size_bytes:
            raise InvalidArgument(f"the data decompresses to more than the {size_bytes} bytes of its digest")
        pieces.append(piece)
    stream.finish()
    return b"".join(pieces)


def compress(compressor: Compressor, data: bytes) -> bytes:
    """Return `data` as one compressed stream."""
    stream = encoder(compressor)
    return data if stream is None else stream.encode(data) + stream.finish()
