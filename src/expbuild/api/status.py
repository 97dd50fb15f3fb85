"""The one table from our errors to what travels: a google.rpc.Status."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from expbuild.errors import Code, ExpbuildError, MissingBlobs, QueueFull, ShuttingDown
from expbuild.reapi import PreconditionFailure, RetryInfo, Status

OK = Status(code=Code.OK)


def to_status(error: ExpbuildError) -> Status:
    """Return the wire form of an error.

    Missing blobs carry exactly one detail, a PreconditionFailure that names each: clients upload these and call
    again. RetryInfo goes with what passes by itself, never with anything else: clients retry whatever has it.
    """
    details = []
    match error:
        case MissingBlobs():
            details.append(_packed(_missing(error)))
        case QueueFull() | ShuttingDown():
            retry = RetryInfo()
            retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
            details.append(_packed(retry))
    return Status(code=error.code, message=str(error), details=details)


def _missing(error: MissingBlobs) -> PreconditionFailure:
    return PreconditionFailure(
        violations=[
            PreconditionFailure.Violation(type="MISSING", subject=f"blobs/{digest}") for digest in error.digests
        ]
    )


def _packed(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
