"""Looking into stores and tending them by hand, also beside a server that uses them.

Everything here is what a server may do at any time: entries are read, renamed away and removed one by one. So neither
has to know of the other.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import InvalidArgument
from expbuild.storage.budget import Budget
from expbuild.storage.envelope import Entry, unwrap
from expbuild.storage.files import blob_name, open_unnoticed
from expbuild.storage.janitor import Candidate, Janitor
from expbuild.storage.policy import StorePolicy
from expbuild.storage.root import StoreRoot
from expbuild.storage.verification import Verification

VARIANT = ".x"


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """One store as it lies on the disk. used_bytes: with inodes and executable variants; ages in seconds."""

    root: str
    entries: int
    files: int
    used_bytes: int
    max_size_bytes: int | None
    free_bytes: int
    oldest_age_s: float | None
    newest_age_s: float | None
    promised_s: float
    promised_bytes: int
    quarantined: int
    at_risk: bool
    in_use: bool


@dataclass(frozen=True, slots=True)
class CachedResult:
    """One entry of the action cache. action: its digest, as `function/hash/size`; age_s: since its last use."""

    action: str
    instance_name: str
    invocation_id: str
    age_s: float
    exit_code: int
    outputs: int
    worker: str
    name: str


class StoreInspector:
    """A store that exists, opened as an observer. Raises StartupError when it cannot be."""

    def __init__(self, path: Path, key: str, kind: str, policy: StorePolicy) -> None:
        self.root = StoreRoot(path, key, kind, durability=policy.durability, observer=True)
        self.policy = policy
        self._budget = Budget(self.root, policy.max_size_bytes, policy.min_free_bytes)
        self._janitor = Janitor(self.root, policy, self._budget)

    def entries(self) -> Iterator[Candidate]:
        """Yield every entry, in no order that means anything."""
        for shard in self._janitor.shards():
            yield from self._janitor.entries(shard)

    def figures(self) -> StoreFigures:
        """Count everything."""
        now_ns = time.time_ns()
        promised_ns = now_ns - int(self.policy.min_age_s * 10**9)
        count = files = used = promised = 0
        oldest, newest = now_ns, 0
        for entry in self.entries():
            count, files, used = count + 1, files + entry.files, used + entry.size_bytes
            oldest, newest = min(oldest, entry.stamp_ns), max(newest, entry.stamp_ns)
            if entry.stamp_ns > promised_ns:
                promised += entry.size_bytes
        quarantine = self.root.path / "quarantine"
        return StoreFigures(
            root=str(self.root.path),
            entries=count,
            files=files,
            used_bytes=used,
            max_size_bytes=self.policy.max_size_bytes,
            free_bytes=self._budget.free_bytes,
            oldest_age_s=(now_ns - oldest) / 10**9 if count else None,
            newest_age_s=max(0, now_ns - newest) / 10**9 if count else None,
            promised_s=self.policy.min_age_s,
            promised_bytes=promised,
            quarantined=len(list(quarantine.iterdir())) if quarantine.exists() else 0,
            at_risk=self.root.at_risk,
            in_use=self.root.is_owned(),
        )

    def collectable(self, older_than_s: float | None) -> Iterator[Candidate]:
        """Yield what may go, the oldest first: down to the limits, or all that is older than `older_than_s`."""
        scan = self._janitor.scan(keep=1 << 60)
        before_ns = time.time_ns() - int(max(older_than_s or 0.0, self.policy.promise_s) * 10**9)
        need = self._budget.shortage()
        over, free, inodes = need.over_bytes, need.free_bytes, need.free_inodes
        for candidate in scan.oldest:
            if candidate.stamp_ns > before_ns:
                return
            if older_than_s is None and over <= 0 and free <= 0 and inodes <= 0:
                return
            over, free, inodes = over - candidate.size_bytes, free - candidate.size_bytes, inodes - candidate.files
            yield candidate

    def evict(self, candidate: Candidate) -> bool:
        """Remove an entry, unless it was promised to somebody since it was seen."""
        return self._janitor.evict(candidate)


def verify_blobs(store: StoreInspector) -> Iterator[tuple[str, bool]]:
    """Hash every blob; yield its name and whether it is whole. Damaged ones are put aside, as a server does."""
    verification = Verification(store.root, blob_name, on_read=True)
    for candidate in store.entries():
        digest = _digest_of(candidate.name)
        for suffix in ("", VARIANT)[: candidate.files]:
            with contextlib.suppress(FileNotFoundError):
                fd = open_unnoticed(candidate.name + suffix, store.root.fd)
                try:
                    yield candidate.name + suffix, verification.check(digest, fd, suffix)
                finally:
                    os.close(fd)


def verify_results(store: StoreInspector) -> Iterator[tuple[str, bool]]:
    """Read every action result; yield its name and whether it is whole. Damaged ones are removed: they are misses."""
    for candidate in store.entries():
        with contextlib.suppress(FileNotFoundError):
            is_whole = unwrap((store.root.path / candidate.name).read_bytes()) is not None
            if not is_whole:
                store.evict(candidate)
            yield candidate.name, is_whole


def remove_blob(store: StoreInspector, text: str) -> bool:
    """Remove the blob `hash/size` or `function/hash/size`; returns whether it was there. Raises InvalidArgument."""
    name = blob_name(parse_digest(text))
    found = False
    for suffix in (VARIANT, ""):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + suffix, dir_fd=store.root.fd)
            found = True
    return found


def results(store: StoreInspector) -> Iterator[tuple[CachedResult, Entry, Candidate]]:
    """Yield every readable action result."""
    now_ns = time.time_ns()
    for candidate in store.entries():
        with contextlib.suppress(FileNotFoundError):
            entry = unwrap((store.root.path / candidate.name).read_bytes())
            if entry is None:
                continue
            _, function, _, name = candidate.name.split("/")
            hash_text, _, size = name.partition("-")
            result = entry.result
            outputs = len(result.output_files) + len(result.output_directories) + len(result.output_symlinks)
            cached = CachedResult(
                action=f"{function}/{hash_text}/{size}",
                instance_name=entry.instance_name,
                invocation_id=entry.invocation_id,
                age_s=max(0, now_ns - candidate.stamp_ns) / 10**9,
                exit_code=result.exit_code,
                outputs=outputs,
                worker=result.execution_metadata.worker,
                name=candidate.name,
            )
            yield cached, entry, candidate


def parse_digest(text: str) -> Digest:
    """Return the digest a person wrote. Raises InvalidArgument."""
    function, _, rest = text.rpartition("/")[0].rpartition("/")
    size = text.rpartition("/")[2]
    if size.isascii() and size.isdigit() and (function or "sha256").upper() in DigestFunction.__members__:
        return Digest.parse(rest, int(size), DigestFunction[(function or "sha256").upper()])
    raise InvalidArgument(f"expected a digest as HASH/SIZE or FUNCTION/HASH/SIZE, got {text!r}")


def to_json(value: Any) -> dict[str, Any]:
    """Return a record of this module as JSON has it."""
    return asdict(value)


def _digest_of(name: str) -> Digest:
    function, _, rest = name.partition("/")
    hash_text, _, size = rest.rpartition("/")[2].partition("-")
    return Digest(hash_text, int(size), DigestFunction[function.upper()])
