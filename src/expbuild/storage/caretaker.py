"""What a server does to its stores while it serves: keeps them within their limits, counts, and verifies them.

One thread, at work for a small part of the time. Of several servers that share a root only the owner does this; when it
ends, another takes over.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog

from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.janitor import Janitor
from expbuild.storage.scrubber import Scrubber

log = structlog.get_logger()

_LOOK_S = 2.0
_SCAN_S = 600.0
_DUTY = 4.0
"""A step of a scan is followed by a pause so many times as long."""


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """One store, for people. entries and the used_* are counted, and exact after a scan; None before the first one.

    promised_s: what min_age_seconds promises; shortest_promise_s: the shortest time after which something went all the
    same. quarantined, evicted_*, broken_promises: since the start.
    """

    root: str
    is_owner: bool
    is_at_risk: bool
    entries: int | None
    used_bytes: int | None
    free_bytes: int
    promised_s: float
    evicted_entries: int
    evicted_bytes: int
    broken_promises: int
    shortest_promise_s: float | None
    quarantined: int


class Caretaker:
    """Takes care of the file stores of a server between `with` and its end. Either may be None: not in files."""

    def __init__(self, blobs: FilesystemBlobStore | None, action_cache: FilesystemActionCache | None) -> None:
        self._stores = [store for store in (blobs, action_cache) if store is not None]
        self._janitors = [Janitor(store.root, store.policy, store.budget) for store in self._stores]
        self._scrubber = None if blobs is None else Scrubber(blobs, self._janitors[0])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="caretaker", daemon=True)
        for store, janitor in zip(self._stores, self._janitors, strict=True):
            store.budget.make_room = janitor.make_room
        if len(self._janitors) == 2:
            # A hit renews its entry and its blobs alike. So what is older than blobs that went has lost its own.
            self._janitors[0].evicted = self._janitors[1].evict_before

    def __enter__(self) -> Self:
        if self._stores:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._stores:
            self._thread.join()
        for store in self._stores:
            store.root.close()

    def status(self) -> list[StoreStatus]:
        """Return how the stores are, the CAS first."""
        found = []
        for store, janitor in zip(self._stores, self._janitors, strict=True):
            scan = janitor.last_scan
            found.append(
                StoreStatus(
                    root=str(store.root.path),
                    is_owner=store.root.is_owner,
                    is_at_risk=store.root.at_risk,
                    entries=None if scan is None else store.budget.used_files,
                    used_bytes=None if scan is None else store.budget.used_bytes,
                    free_bytes=store.budget.free_bytes,
                    promised_s=store.policy.min_age_s,
                    evicted_entries=janitor.evicted_entries,
                    evicted_bytes=janitor.evicted_bytes,
                    broken_promises=janitor.broken_promises,
                    shortest_promise_s=janitor.shortest_promise_s,
                    quarantined=store.verification.quarantined if isinstance(store, FilesystemBlobStore) else 0,
                )
            )
        return found

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        next_scan = 0.0
        while not self._stop.is_set():
            try:
                if time.monotonic() >= next_scan:
                    for janitor in self._janitors:
                        janitor.scan(self._pause)
                    next_scan = time.monotonic() + _SCAN_S
                for janitor in self._janitors:
                    janitor.keep_limits()
                if self._scrubber is not None:
                    self._scrubber.work(self._stop)
            except _Stopped:
                return
            except Exception:  # it must not die of one bad moment; what it could not do now it does later
                log.exception("storage.care_failed")
            self._stop.wait(_LOOK_S)

    def _pause(self, worked_s: float) -> None:
        if self._stop.wait(worked_s * _DUTY):
            raise _Stopped


class _Stopped(Exception):
    """The server ends."""
