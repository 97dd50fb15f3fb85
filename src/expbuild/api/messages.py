"""Digests between wire and domain, the same way in every service."""

from __future__ import annotations

from google.protobuf.message import Message

from expbuild.digest import Digest, DigestFunction, DigestFunctions
from expbuild.errors import InvalidArgument
from expbuild.reapi import DigestMessage


def to_message(digest: Digest) -> DigestMessage:
    """Return the wire form of a digest."""
    return DigestMessage(hash=digest.hash, size_bytes=digest.size_bytes)


def parse_digest(message: DigestMessage, function: DigestFunction) -> Digest:
    """Check a digest message. Raises InvalidDigest."""
    return Digest.parse(message.hash, message.size_bytes, function)


def request_digest(functions: DigestFunctions, request: Message, field: str) -> Digest:
    """Return the digest in a field of a request, under the function the request names or its length tells.

    An unset field is an error, never the empty blob. Raises InvalidArgument.
    """
    if not request.HasField(field):
        raise InvalidArgument(f"{request.DESCRIPTOR.name}.{field} is not set")
    message: DigestMessage = getattr(request, field)
    number: int = getattr(request, "digest_function", 0)
    return parse_digest(message, functions.resolve(number, len(message.hash)))
