"""Stores of every kind, on real disks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings

from expbuild.digest import DigestFunction
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import ActionCache, BlobStore
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.memory import MemoryActionCache, MemoryBlobStore

# No limit of time for one example: machines that run tests are busy.
settings.register_profile("expbuild", deadline=None)
settings.load_profile("expbuild")

FUNCTIONS = (DigestFunction.SHA256, DigestFunction.BLAKE3)


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def _without_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make O_TMPFILE fail as on file systems and kernels that do not know it.

    Without its own bit the flag is O_DIRECTORY, which the real kernel refuses to open for writing, with EISDIR. (None
    of the file systems at hand lacks O_TMPFILE: overlayfs, the usual one, has had it since Linux 6.3.)
    """
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)


@pytest.fixture(params=["filesystem", "filesystem-without-O_TMPFILE", "memory"])
def blobs(
    request: pytest.FixtureRequest, tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> BlobStore:
    """A blob store; one whose contract holds for each."""
    if request.param == "memory":
        return MemoryBlobStore()
    if request.param == "filesystem-without-O_TMPFILE":
        _without_tmpfile(monkeypatch)
    return FilesystemBlobStore(tmp_path / "cas", FUNCTIONS, executor)


@pytest.fixture(params=["filesystem", "filesystem-without-O_TMPFILE", "memory"])
def action_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ActionCache:
    """An action cache; one whose contract holds for each."""
    if request.param == "memory":
        return MemoryActionCache()
    if request.param == "filesystem-without-O_TMPFILE":
        _without_tmpfile(monkeypatch)
    return FilesystemActionCache(tmp_path / "action-cache")


@pytest.fixture(params=[True, False], ids=["O_TMPFILE", "no-O_TMPFILE"])
def tmpfile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has O_TMPFILE; the test runs with both."""
    if not request.param:
        _without_tmpfile(monkeypatch)
    return bool(request.param)


@pytest.fixture
def open_files() -> Callable[[], set[str]]:
    """Returns what this process has open, by the names of the descriptors' targets."""

    def look() -> set[str]:
        found = set()
        for number in os.listdir("/proc/self/fd"):
            try:
                found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
            except FileNotFoundError:  # the descriptor of listdir itself
                continue
        return found

    return look


def files_below(root: Path) -> set[str]:
    """Return every file below a directory, relative to it; without those that each store has from the start."""
    own = ("FORMAT", "STATE", "lock")
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() and path.name not in own}
