"""From the storage section of the configuration to stores."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import assert_never

from expbuild.config_storage import StorageConfig
from expbuild.digest import DigestFunction
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import ActionCache, BlobStore
from expbuild.storage.complete import CompleteActionCache
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.memory import MemoryActionCache, MemoryBlobStore


def create_blob_store(config: StorageConfig, functions: Iterable[DigestFunction], executor: Executor) -> BlobStore:
    """Return the CAS. executor runs its blocking work. Raises StartupError."""
    match config.cas.backend:
        case "filesystem":
            assert config.cas.root_dir is not None  # the configuration demands it
            return FilesystemBlobStore(config.cas.root_dir, functions, executor)
        case "memory":
            return MemoryBlobStore()
        case _:
            assert_never(config.cas.backend)


def create_action_cache(config: StorageConfig, blobs: BlobStore) -> ActionCache:
    """Return the action cache; its hits are complete in `blobs`. Raises StartupError."""
    base: ActionCache
    match config.action_cache.backend:
        case "filesystem":
            assert config.action_cache.root_dir is not None  # the configuration demands it
            base = FilesystemActionCache(config.action_cache.root_dir)
        case "memory":
            base = MemoryActionCache()
        case _:
            assert_never(config.action_cache.backend)
    return CompleteActionCache(base, blobs)
