"""Making room: what was promised longest ago goes first.

A scan keeps the oldest few thousand entries and counts the rest, so its memory does not grow with the store. An entry
goes in three steps: renamed away (from now on it is missing), its stamp looked at again, then removed, or put back when
somebody was promised it in between. A crash between the steps loses nothing: the next start puts back what lies away.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from expbuild.storage.budget import Budget, Shortage
from expbuild.storage.policy import StorePolicy
from expbuild.storage.root import StoreRoot, away_name, put_back

log = structlog.get_logger()

_MOST_CANDIDATES = 50_000
"""So many of the oldest entries one scan keeps."""

_RETRY_S = 1.0
"""After a scan that could not make room, the next requests for room fail at once for this long."""

_MOST_SCANS = 20
"""So many scans one request may take."""

_VARIANT = ".x"
_ENTRY = re.compile(r"[0-9a-f]{32,128}-[0-9]{1,20}", re.ASCII)
_SHARD = re.compile(r"[0-9a-f]{2}", re.ASCII)
_GROUP = re.compile(r"[0-9a-z]{3,32}", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """An entry that may go. size_bytes: on the disk, its executable variant included."""

    stamp_ns: int
    name: str
    size_bytes: int
    files: int
    links: int


@dataclass(slots=True)
class Scan:
    """What a walk over a store found. oldest: sorted, at most as many as the walk was told to keep."""

    entries: int = 0
    files: int = 0
    size_bytes: int = 0
    oldest: tuple[Candidate, ...] = ()


class Janitor:
    """Evicts from one store. Used from several threads; one of them works at a time.

    evicted: called with the stamp of the newest entry that went.
    """

    def __init__(self, root: StoreRoot, policy: StorePolicy, budget: Budget) -> None:
        self._root = root
        self._policy = policy
        self._budget = budget
        self._turn = threading.Lock()
        self._fails_until = 0.0
        self.evicted: Callable[[int], None] | None = None
        self.last_scan: Scan | None = None
        self.evicted_entries = self.evicted_bytes = 0
        self.broken_promises = 0
        self.shortest_promise_s: float | None = None

    def make_room(self, size_bytes: int) -> None:
        """Evict so that a file of `size_bytes` fits, as far as promises allow. Blocks."""
        with self._turn:
            if time.monotonic() < self._fails_until or not self._budget.shortage(size_bytes):
                return
            if self._root.try_own():
                self._evict(size_bytes)
            else:  # the owner may have made room
                self.scan()
                self._fails_until = time.monotonic() + _RETRY_S

    def keep_limits(self) -> None:
        """Evict what is over the limits already. Blocks."""
        if self._root.try_own() and self._budget.shortage():
            with self._turn:
                self._evict(0)

    def scan(self, pause: Callable[[float], None] | None = None, keep: int = 0) -> Scan:
        """Walk over the store and take what it holds as the truth. pause: called with the seconds each step took."""
        scan = Scan()
        heap: list[tuple[int, str, Candidate]] = []
        for shard in self.shards():
            start = time.monotonic()
            for candidate in self.entries(shard):
                scan.entries += 1
                scan.files += candidate.files
                scan.size_bytes += candidate.size_bytes
                item = (-candidate.stamp_ns, candidate.name, candidate)
                if len(heap) < keep:
                    heapq.heappush(heap, item)
                elif heap and item > heap[0]:
                    heapq.heapreplace(heap, item)
            if pause is not None:
                pause(time.monotonic() - start)
        scan.oldest = tuple(sorted(candidate for _, _, candidate in heap))
        self._budget.counted(scan.size_bytes, scan.files)
        self.last_scan = scan
        return scan

    def shards(self) -> Iterator[str]:
        """Yield the directories that hold entries, relative to the root."""
        for group in self._names("", _GROUP):
            if group in ("tmp", "quarantine"):
                continue
            for below in self._names(group, re.compile(f"{_SHARD.pattern}|{_GROUP.pattern}")):
                if _SHARD.fullmatch(below):
                    yield f"{group}/{below}"
                else:
                    for shard in self._names(f"{group}/{below}", _SHARD):
                        yield f"{group}/{below}/{shard}"

    def entries(self, shard: str) -> Iterator[Candidate]:
        """Yield the entries of one directory. A variant whose blob is gone is removed."""
        variants: dict[str, os.stat_result] = {}
        found: dict[str, os.stat_result] = {}
        with contextlib.suppress(FileNotFoundError), _scandir(shard, self._root.fd) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    name = entry.name
                    if _ENTRY.fullmatch(name):
                        found[name] = entry.stat(follow_symlinks=False)
                    elif name.endswith(_VARIANT) and _ENTRY.fullmatch(name[: -len(_VARIANT)]):
                        variants[name[: -len(_VARIANT)]] = entry.stat(follow_symlinks=False)
        for name, seen in found.items():
            size_bytes, files, links = seen.st_blocks * 512, 1, seen.st_nlink
            if (variant := variants.pop(name, None)) is not None:
                size_bytes, files, links = size_bytes + variant.st_blocks * 512, 2, max(links, variant.st_nlink)
            yield Candidate(seen.st_atime_ns, f"{shard}/{name}", size_bytes + 4096 * files, files, links)
        for name in variants:
            self._remove_orphan(f"{shard}/{name}")

    def evict_before(self, stamp_ns: int) -> None:
        """Evict every entry whose stamp is older, down to what may go at all. Blocks."""
        if not self._root.try_own():
            return
        limit_ns = min(stamp_ns, time.time_ns() - int(self._policy.shortest_promise_s * 10**9))
        for shard in self.shards():
            for candidate in self.entries(shard):
                if candidate.stamp_ns < limit_ns:
                    self.evict(candidate)

    def evict(self, candidate: Candidate) -> bool:
        """Remove one entry, unless its stamp was renewed since it was seen."""
        root_fd, name = self._root.fd, candidate.name
        away = away_name(name)
        try:
            os.rename(name, away, src_dir_fd=root_fd, dst_dir_fd=root_fd)
            if os.stat(away, dir_fd=root_fd).st_atime_ns > candidate.stamp_ns:
                put_back(root_fd, name)
                return False
            os.unlink(away, dir_fd=root_fd)
        except FileNotFoundError:  # somebody else removed it
            return False
        self._remove_orphan(name)
        self._budget.removed(candidate.size_bytes, candidate.files)
        self.evicted_entries += 1
        self.evicted_bytes += candidate.size_bytes
        return True

    def _evict(self, size_bytes: int) -> None:
        """Evict the oldest until there is room, beyond the need, so that this does not happen all the time."""
        before = self.evicted_entries
        for _ in range(_MOST_SCANS):
            if not self._evict_oldest(size_bytes):
                break
        if still := self._budget.shortage(size_bytes):
            self._fails_until = time.monotonic() + _RETRY_S
            log.warning("storage.full", root=str(self._root.path), over_bytes=still.over_bytes, needed_bytes=size_bytes)
        log.info(
            "storage.evicted",
            root=str(self._root.path),
            entries=self.evicted_entries - before,
            used_bytes=self._budget.used_bytes,
        )

    def _evict_oldest(self, size_bytes: int) -> bool:
        """Evict from what one scan found. Returns whether another scan could find more."""
        candidates = self.scan(keep=_MOST_CANDIDATES).oldest
        now_ns = time.time_ns()
        promised_ns = now_ns - int(self._policy.promise_s * 10**9)
        untouchable_ns = now_ns - int(self._policy.shortest_promise_s * 10**9)
        newest_ns = 0
        may_find_more = len(candidates) == _MOST_CANDIDATES
        for number, candidate in enumerate(candidates):
            is_promised = candidate.stamp_ns > promised_ns
            need = self._budget.shortage(size_bytes, low_water=not is_promised)
            if not need or candidate.stamp_ns > untouchable_ns:
                may_find_more = False
                break
            if _is_of_no_use(candidate, need):
                continue
            if self.evict(candidate):
                newest_ns = candidate.stamp_ns
                if is_promised:
                    self._note_broken(now_ns - candidate.stamp_ns, is_first=number == 0)
        if newest_ns and self.evicted is not None:
            self.evicted(newest_ns)
        return may_find_more and newest_ns > 0

    def _note_broken(self, age_ns: int, *, is_first: bool) -> None:
        age_s = age_ns / 10**9
        self.broken_promises += 1
        if self.shortest_promise_s is None or age_s < self.shortest_promise_s:
            is_first = is_first or self.shortest_promise_s is None
            self.shortest_promise_s = age_s
        if is_first:
            log.warning(
                "storage.promise_broken",
                root=str(self._root.path),
                age_s=round(age_s),
                promised_s=round(self._policy.min_age_s),
                reason="the store is full of what was promised more recently than min_age_seconds; make it larger",
            )

    def _remove_orphan(self, name: str) -> None:
        """Remove the executable variant of an entry that is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=self._root.fd)
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + _VARIANT, dir_fd=self._root.fd)

    def _names(self, directory: str, pattern: re.Pattern[str]) -> list[str]:
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            _scandir(directory or ".", self._root.fd) as entries,
        ):
            return sorted(e.name for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
        return []


@contextlib.contextmanager
def _scandir(directory: str, root_fd: int) -> Iterator[Iterator[os.DirEntry[str]]]:
    """List a directory below the root."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    try:
        with os.scandir(fd) as entries:
            yield entries
    finally:
        os.close(fd)


def _is_of_no_use(candidate: Candidate, need: Shortage) -> bool:
    """Whether removing an entry would free nothing now: actions hold links to its file."""
    return not need.over_bytes and candidate.links > 1
