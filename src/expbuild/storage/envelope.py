"""The envelope of a stored action result: what tells it from the remains of a crash, and whose it is.

A bare ActionResult cannot be trusted: zero bytes parse as a successful result without outputs, and that is what a crash
leaves of a file. So each entry is `magic, version, length, SHA-256, payload`, and whatever does not add up is no entry.
The payload is a line of JSON about the entry, and the result. (Version 1 had no such line.)
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from expbuild.reapi import ActionResult

_MAGIC = b"EXAR"
_VERSION = 2
_HEADER = struct.Struct(">4sBI32s")


@dataclass(frozen=True, slots=True)
class Entry:
    """What an envelope holds. instance_name, invocation_id: of the call that stored it; "" where that is not known."""

    result: ActionResult
    instance_name: str = ""
    invocation_id: str = ""


def wrap(entry: Entry) -> bytes:
    """Return the bytes of an entry's file."""
    about = json.dumps({"instance_name": entry.instance_name, "invocation_id": entry.invocation_id})
    payload = about.encode() + b"\n" + entry.result.SerializeToString(deterministic=True)
    return _HEADER.pack(_MAGIC, _VERSION, len(payload), hashlib.sha256(payload).digest()) + payload


def unwrap_result(data: bytes) -> ActionResult | None:
    """Return the result in an envelope, or None when the envelope is damaged."""
    found = _payload(data)
    return None if found is None else found[1]


def unwrap(data: bytes) -> Entry | None:
    """Return all an envelope holds, or None when it is damaged."""
    found = _payload(data)
    if found is None:
        return None
    about, result = found
    try:
        fields = json.loads(about or b"{}")
        return Entry(result, fields.get("instance_name", ""), fields.get("invocation_id", ""))
    except (ValueError, AttributeError):
        return None


def _payload(data: bytes) -> tuple[bytes, ActionResult] | None:
    """Return the line about the entry and its result."""
    if len(data) < _HEADER.size:
        return None
    magic, version, length, checksum = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if magic != _MAGIC or version not in (1, _VERSION) or length != len(payload):
        return None
    if hashlib.sha256(payload).digest() != checksum:
        return None
    about, _, message = payload.partition(b"\n") if version == _VERSION else (b"", b"", payload)
    try:
        return about, ActionResult.FromString(message)
    except DecodeError:
        return None
