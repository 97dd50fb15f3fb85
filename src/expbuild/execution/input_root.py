"""Putting an input tree on disk.

Everything happens relative to open directories and follows no link, so that no name in a tree can lead out of it.
All functions here block; they run in worker threads.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from expbuild.errors import InvalidArgument
from expbuild.execution.action import Components
from expbuild.execution.input_tree import InputDirectory, InputTree
from expbuild.execution.usage import Traffic
from expbuild.storage.base import BlobStore, Sharing
from expbuild.workers.base import Owner
from expbuild.workers.work_dir import OPEN_DIRECTORY


def create_workspace(path: Path, owner: Owner | None) -> None:
    """Create an empty workspace: `root/` and `tmp/`, which belong to `owner`, in a directory that does not."""
    path.mkdir(mode=0o711)
    for name in ("root", "tmp"):
        (path / name).mkdir(mode=0o755)
        if owner is not None:
            os.chown(path / name, owner.uid, owner.gid)


def materialize(
    tree: InputTree,
    blobs: BlobStore,
    root: Path,
    *,
    output_parents: Iterable[Components],
    owner: Owner | None,
    sharing: Sharing,
) -> Traffic:
    """Make `root` hold the tree and the parent directories of every output; return what was placed.

    Directories belong to `owner` and are writable, files are not. Raises BlobNotFound for a blob evicted meanwhile,
    InvalidArgument for an output below an input file, OSError when the disk does not take it.
    """
    placed = Traffic()
    root_fd = os.open(root, OPEN_DIRECTORY)
    try:
        for fd, directory in _create_directories(tree, root_fd, owner):
            for file in directory.files:
                blobs.place(file.digest, fd, file.name, executable=file.executable, sharing=sharing)
                placed.add(file.digest.size_bytes)
            for name, target in directory.symlinks.items():
                os.symlink(target, name, dir_fd=fd)
        for path in output_parents:
            _create_parent(root_fd, path, owner)
    finally:
        os.close(root_fd)
    return placed


def _create_directories(tree: InputTree, root_fd: int, owner: Owner | None) -> Iterator[tuple[int, InputDirectory]]:
    """Create every directory below the root; yield each one opened. At most one descriptor per level is open."""
    root = tree.directories[tree.root]
    yield root_fd, root
    stack = [(root_fd, iter(root.directories.items()))]
    try:
        while stack:
            parent_fd, children = stack[-1]
            entry = next(children, None)
            if entry is None:
                stack.pop()
                if parent_fd != root_fd:
                    os.close(parent_fd)
                continue
            name, digest = entry
            fd = _make_directory(parent_fd, name, owner)
            directory = tree.directories[digest]
            stack.append((fd, iter(directory.directories.items())))
            yield fd, directory
    finally:
        for fd, _ in stack:
            if fd != root_fd:
                os.close(fd)


def _make_directory(parent_fd: int, name: str, owner: Owner | None) -> int:
    os.mkdir(name, 0o755, dir_fd=parent_fd)
    if owner is not None:
        os.chown(name, owner.uid, owner.gid, dir_fd=parent_fd, follow_symlinks=False)
    return os.open(name, OPEN_DIRECTORY, dir_fd=parent_fd)


def _create_parent(root_fd: int, path: Components, owner: Owner | None) -> None:
    """Create the directories of `path` that are not there; stop at a symlink, which is not followed."""
    fd = os.dup(root_fd)
    try:
        for depth, name in enumerate(path):
            try:
                child = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
            except FileNotFoundError:
                child = _make_directory(fd, name, owner)
            except OSError:
                mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
                if stat.S_ISLNK(mode):
                    return
                if stat.S_ISDIR(mode):
                    raise
                where = "/".join(path[: depth + 1])
                raise InvalidArgument(f"an output lies below {where!r}, which is a file in the input tree") from None
            os.close(fd)
            fd = child
    finally:
        os.close(fd)
