"""Blobs in memory, directories on disk, and a way to be somebody else than root for a moment."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from expbuild.storage.memory import MemoryBlobStore
from tests.support.files import scratch_directory

NOBODY = 65534

AsUser = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def blobs() -> MemoryBlobStore:
    return MemoryBlobStore()


@pytest.fixture
def root() -> Iterator[Path]:
    """An empty directory to make input roots of."""
    with scratch_directory() as directory:
        path = directory / "root"
        path.mkdir()
        yield path


@contextmanager
def unprivileged() -> Iterator[None]:
    """Reach files as an ordinary user does: as root only by permission, and with files made belonging to `nobody`.

    Only this thread changes, and only in the eyes of file systems, so it can change back. As an ordinary user this
    does nothing.
    """
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.setfsuid(NOBODY)
    try:
        yield
    finally:
        libc.setfsuid(0)
