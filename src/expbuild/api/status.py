"""The one table from our errors to what travels: a google.rpc.Status."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from expbuild.errors import Code, ExpbuildError, MissingBlobs, QueuedTooLong, QueueFull, ShuttingDown
from expbuild.reapi import PreconditionFailure, RetryInfo, Status

OK = Status(code=Code.OK)

_MAX_MESSAGE = 2000
"""Longer texts do not fit into the trailers of a call; the client would see another error in place of this one."""

_MAX_VIOLATIONS = 30_000
"""More missing blobs than this in one answer exceed the message limit of clients. They upload these, and ask again."""


def to_status(error: ExpbuildError) -> Status:
    """Return the wire form of an error.

    Missing blobs carry exactly one detail, a PreconditionFailure that names each: clients upload these and call
    again. RetryInfo goes with what passes by itself, never with anything else: clients retry whatever has it.
    """
    details = []
    match error:
        case MissingBlobs():
            details.append(_packed(_missing(error)))
        case QueueFull() | QueuedTooLong() | ShuttingDown():
            retry = RetryInfo()
            retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
            details.append(_packed(retry))
    return Status(code=error.code, message=_shortened(str(error)), details=details)


def _missing(error: MissingBlobs) -> PreconditionFailure:
    return PreconditionFailure(
        violations=[
            PreconditionFailure.Violation(type="MISSING", subject=f"blobs/{digest}")
            for digest in error.digests[:_MAX_VIOLATIONS]
        ]
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}…"


def _packed(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
