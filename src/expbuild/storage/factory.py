"""From the storage section of the configuration to stores."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import assert_never

from expbuild.config_storage import CasConfig, StorageConfig, StoreConfig
from expbuild.digest import DigestFunction
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import ActionCache, BlobStore
from expbuild.storage.caretaker import Caretaker
from expbuild.storage.complete import CompleteActionCache
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.memory import MemoryActionCache, MemoryBlobStore
from expbuild.storage.policy import StorePolicy
from expbuild.storage.root import Durability


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores of a server. caretaker: to be entered while they are used; its end closes them.

    renewal_s: how often to ask for blobs that must stay.
    """

    blobs: BlobStore
    action_cache: ActionCache
    caretaker: Caretaker
    renewal_s: float


def create_stores(config: StorageConfig, functions: Iterable[DigestFunction], executor: Executor) -> Stores:
    """Return the CAS and an action cache whose hits are complete in it.

    executor: runs the blocking work of the CAS. Raises StartupError.
    """
    blobs: FilesystemBlobStore | MemoryBlobStore
    match config.cas.backend:
        case "filesystem":
            assert config.cas.root_dir is not None  # the configuration demands it
            blobs = FilesystemBlobStore(config.cas.root_dir, functions, executor, cas_policy(config.cas))
        case "memory":
            blobs = MemoryBlobStore()
        case _:
            assert_never(config.cas.backend)
    results: FilesystemActionCache | MemoryActionCache
    match config.action_cache.backend:
        case "filesystem":
            assert config.action_cache.root_dir is not None  # the configuration demands it
            results = FilesystemActionCache(config.action_cache.root_dir, action_cache_policy(config))
        case "memory":
            results = MemoryActionCache()
        case _:
            assert_never(config.action_cache.backend)
    caretaker = Caretaker(
        blobs if isinstance(blobs, FilesystemBlobStore) else None,
        results if isinstance(results, FilesystemActionCache) else None,
    )
    renewal_s = max(0.05, cas_policy(config.cas).shortest_promise_s / 4)
    return Stores(blobs, CompleteActionCache(results, blobs), caretaker, renewal_s)


def cas_policy(config: CasConfig) -> StorePolicy:
    """Return what `[storage.cas]` promises."""
    return _policy(config, config)


def action_cache_policy(config: StorageConfig) -> StorePolicy:
    """Return what `[storage.action_cache]` promises: its entries are as good as the blobs they name."""
    return _policy(config.action_cache, config.cas)


def _policy(store: StoreConfig, cas: CasConfig) -> StorePolicy:
    return StorePolicy(
        durability=Durability(store.durability),
        max_size_bytes=store.max_size_bytes,
        min_free_bytes=store.min_free_bytes,
        min_age_s=cas.min_age_seconds,
        verify_on_read=cas.verify_on_read,
        scrub_bytes_per_s=cas.scrub_bytes_per_second,
    )
