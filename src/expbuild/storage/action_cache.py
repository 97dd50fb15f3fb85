"""The action cache in files: one checksummed envelope per result.

A bare ActionResult cannot be trusted: zero bytes parse as a successful result without outputs, and that is what a crash
leaves of a file. So each entry is `magic, version, length, SHA-256, payload`, and whatever does not add up is no entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from expbuild.reapi import ActionResult
from expbuild.storage.base import ActionKey
from expbuild.storage.files import TempFile, open_root, renew_stamp, storage_errors

log = structlog.get_logger()

_MAGIC = b"EXAR"
_VERSION = 1
_HEADER = struct.Struct(">4sBI32s")


class FilesystemActionCache:
    """Action results as files `<instance>/<function>/<hh>/<hash>-<size>` under one root directory.

    `<instance>` is a hash of the instance name: names are the clients' and may be anything.
    Raises StartupError when the root cannot be used.
    """

    def __init__(self, root: Path) -> None:
        self._root_fd = open_root(root, "storage.action_cache.root_dir")

    async def get(self, key: ActionKey) -> ActionResult | None:
        name = _entry_name(key)
        with storage_errors(f"read the result of action {key.action_digest}"):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root_fd)
            except FileNotFoundError:
                return None
            try:  # without a file object, which costs three more system calls
                seen = os.fstat(fd)
                data = os.read(fd, seen.st_size)
            finally:
                os.close(fd)
        result = _unwrap(data)
        if result is None:
            log.error("action_result.damaged", action_digest=str(key.action_digest), found_bytes=len(data))
            return None
        with contextlib.suppress(OSError):  # the stamp is for eviction; we have the result
            renew_stamp(name, self._root_fd, seen)
        return result

    async def put(self, key: ActionKey, result: ActionResult) -> None:
        payload = result.SerializeToString(deterministic=True)
        name = _entry_name(key)
        with storage_errors(f"write the result of action {key.action_digest}"):
            temp = TempFile(self._root_fd)
            try:
                temp.write(_HEADER.pack(_MAGIC, _VERSION, len(payload), hashlib.sha256(payload).digest()))
                temp.write(payload)
                temp.replace(name, 0o400)
            finally:
                temp.close()


def _entry_name(key: ActionKey) -> str:
    instance = hashlib.sha256(key.instance_name.encode()).hexdigest()[:32]
    digest = key.action_digest
    return f"{instance}/{digest.function.name.lower()}/{digest.hash[:2]}/{digest.hash}-{digest.size_bytes}"


def _unwrap(data: bytes) -> ActionResult | None:
    """Return the result in an envelope, or None when the envelope is damaged."""
    if len(data) < _HEADER.size:
        return None
    magic, version, length, checksum = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if magic != _MAGIC or version != _VERSION or length != len(payload):
        return None
    if hashlib.sha256(payload).digest() != checksum:
        return None
    try:
        return ActionResult.FromString(payload)
    except DecodeError:
        return None
