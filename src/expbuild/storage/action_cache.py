"""The action cache in files: one checksummed envelope per result."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from contextlib import closing
from pathlib import Path

import structlog

from expbuild.reapi import ActionResult
from expbuild.storage.base import ActionKey
from expbuild.storage.budget import Budget
from expbuild.storage.envelope import Entry, unwrap_result, wrap
from expbuild.storage.files import TempFile, renew_stamp, storage_errors
from expbuild.storage.policy import UNLIMITED, StorePolicy
from expbuild.storage.root import Durability, StoreRoot

log = structlog.get_logger()

_KEY = "storage.action_cache.root_dir"


class FilesystemActionCache:
    """Action results as files `<instance>/<function>/<hh>/<hash>-<size>` under one root directory.

    `<instance>` is a hash of the instance name: names are the clients' and may be anything.
    Raises StartupError when the root cannot be used.
    """

    def __init__(self, root: Path, policy: StorePolicy = UNLIMITED) -> None:
        self.root = StoreRoot(root, _KEY, "action-cache", durability=policy.durability)
        self.policy = policy
        self.budget = Budget(self.root, policy.max_size_bytes, policy.min_free_bytes)
        self._root_fd = self.root.fd

    async def get(self, key: ActionKey) -> ActionResult | None:
        name = entry_name(key)
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
        result = unwrap_result(data)
        if result is None:
            log.error("action_result.damaged", action_digest=str(key.action_digest), found_bytes=len(data))
            return None
        with contextlib.suppress(OSError):  # the stamp is for eviction; we have the result
            renew_stamp(name, self._root_fd, seen, self.policy.renewal_s)
        return result

    async def put(self, key: ActionKey, result: ActionResult, *, invocation_id: str = "") -> None:
        data = wrap(Entry(result, key.instance_name, invocation_id))
        if self.root.durability is not Durability.NONE or not self.budget.try_reserve(len(data)):
            await asyncio.to_thread(self._store, key, data)
            return
        stored = False
        try:
            with self.budget.watched():
                self._write(key, data)
            stored = True
        finally:
            self.budget.release(len(data), stored=stored)

    def _store(self, key: ActionKey, data: bytes) -> None:
        with self.budget.reserved(len(data)):
            self._write(key, data)

    def _write(self, key: ActionKey, data: bytes) -> None:
        with storage_errors(f"write the result of action {key.action_digest}"), closing(TempFile(self.root)) as temp:
            temp.write(data)
            temp.replace(entry_name(key), 0o400)


def entry_name(key: ActionKey) -> str:
    """Return an entry's file name relative to the root."""
    instance = hashlib.sha256(key.instance_name.encode()).hexdigest()[:32]
    digest = key.action_digest
    return f"{instance}/{digest.function.name.lower()}/{digest.hash[:2]}/{digest.hash}-{digest.size_bytes}"
