"""The resource names of ByteStream: one grammar, read from left to right."""

from __future__ import annotations

import re
from dataclasses import dataclass

from expbuild.api.compression import Compressor
from expbuild.digest import MAX_SIZE_BYTES, Digest, DigestFunctions
from expbuild.errors import InvalidArgument

MAX_LENGTH = 8192

_SIZE = re.compile(r"[0-9]{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class BlobName:
    """What a resource name says. upload_id: the client's uuid in an upload's name, "" in a download's."""

    instance_name: str
    digest: Digest
    compressor: Compressor
    upload_id: str = ""


class ResourceNames:
    """Parses resource names with the digest functions and compressors that are served."""

    def __init__(self, functions: DigestFunctions, compressors: tuple[Compressor, ...]) -> None:
        self._functions = functions
        self._compressors = compressors

    def parse_read(self, name: str) -> BlobName:
        """Parse `[instance/]blobs/[function/]hash/size` or its compressed form. Raises InvalidArgument."""
        segments = _split(name)
        marker = _first(segments, ("blobs", "compressed-blobs", "uploads"))
        if marker is None or segments[marker] == "uploads":
            raise _malformed(name, "[instance/]blobs/{hash}/{size}")
        digest, compressor, rest = self._blob(name, segments[marker:])
        if rest:
            raise _malformed(name, "[instance/]blobs/{hash}/{size}, nothing behind it")
        return BlobName("/".join(segments[:marker]), digest, compressor)

    def parse_write(self, name: str) -> BlobName:
        """Parse `[instance/]uploads/uuid/blobs/[function/]hash/size[/anything]`, or its compressed form.

        Raises InvalidArgument.
        """
        segments = _split(name)
        marker = _first(segments, ("blobs", "compressed-blobs", "uploads"))
        form = "[instance/]uploads/{uuid}/blobs/{hash}/{size}"
        if marker is None or segments[marker] != "uploads" or len(segments) < marker + 3 or not segments[marker + 1]:
            raise _malformed(name, form)
        if segments[marker + 2] not in ("blobs", "compressed-blobs"):
            raise _malformed(name, form)
        digest, compressor, _ = self._blob(name, segments[marker + 2 :])
        return BlobName("/".join(segments[:marker]), digest, compressor, segments[marker + 1])

    def _blob(self, name: str, segments: list[str]) -> tuple[Digest, Compressor, list[str]]:
        """Parse from the word `blobs` or `compressed-blobs` on; return what is behind the size too."""
        rest = segments[1:]
        compressor = Compressor.IDENTITY
        if segments[0] == "compressed-blobs":
            if not rest:
                raise _malformed(name, "compressed-blobs/{compressor}/{hash}/{size}")
            compressor = self._compressor(rest.pop(0))
        function = self._functions.from_segment(rest[0]) if rest else None
        if function is not None:
            rest.pop(0)
        if len(rest) < 2:
            raise _malformed(name, "…/{hash}/{size}")
        hash_text, size_text = rest[0], rest[1]
        if _SIZE.fullmatch(size_text) is None or int(size_text) > MAX_SIZE_BYTES:
            raise InvalidArgument(f"resource name {name[:200]!r}: {size_text[:40]!r} is not a blob size")
        if function is None:
            function = self._functions.resolve(0, len(hash_text))
        return Digest.parse(hash_text, int(size_text), function), compressor, rest[2:]

    def _compressor(self, segment: str) -> Compressor:
        for compressor in self._compressors:
            if compressor is not Compressor.IDENTITY and compressor.name.lower() == segment:
                return compressor
        served = ", ".join(c.name.lower() for c in self._compressors if c is not Compressor.IDENTITY) or "none"
        raise InvalidArgument(f"compressor {segment[:40]!r} is not served here; served are: {served}")


def _split(name: str) -> list[str]:
    if name.startswith("//"):  # else it would be an instance name that is one empty segment
        raise _malformed(name, "no more than one slash before it")
    if len(name) > MAX_LENGTH:
        raise InvalidArgument(f"the resource name is {len(name)} characters long; at most {MAX_LENGTH} are allowed")
    return name.removeprefix("/").split("/")  # some clients put a slash before an empty instance name


def _first(segments: list[str], words: tuple[str, ...]) -> int | None:
    return next((index for index, segment in enumerate(segments) if segment in words), None)


def _malformed(name: str, form: str) -> InvalidArgument:
    return InvalidArgument(f"resource name {name[:200]!r} is malformed: expected {form}")
