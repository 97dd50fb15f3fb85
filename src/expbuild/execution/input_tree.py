"""The input tree of an action: loaded, checked and counted before anything touches the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound, InvalidArgument, MissingBlobs
from expbuild.execution.action import (
    INLINE_BYTES,
    MAX_DEPTH,
    MAX_MESSAGE_BYTES,
    Components,
    parse_message,
    required_digest,
    shown,
)
from expbuild.reapi import Directory
from expbuild.storage.base import BlobStore, read_blob

MAX_NODES = 2_000_000
"""Most files, directories and symlinks one input tree may expand to."""

_LARGE_TREE = 1000
"""A tree of more distinct directories is counted in a thread."""

_SLICE_S = 0.005
"""So long a tree is read before others get their turn: a store answers for small blobs without ever waiting."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the tree."""

    name: str
    digest: Digest
    executable: bool


@dataclass(frozen=True, slots=True)
class InputDirectory:
    """One checked Directory: names are single, unique path segments. `directories` and `symlinks` map names."""

    files: tuple[InputFile, ...]
    directories: dict[str, Digest]
    symlinks: dict[str, str]


@dataclass(frozen=True, slots=True)
class InputTree:
    """A whole input tree: its root, and each distinct directory once."""

    root: Digest
    directories: dict[Digest, InputDirectory]

    def directory_at(self, path: Components) -> InputDirectory | None:
        """Return the directory at `path`, or None when there is none. Symlinks are not followed."""
        current = self.directories[self.root]
        for name in path:
            child = current.directories.get(name)
            if child is None:
                return None
            current = self.directories[child]
        return current


async def load_input_tree(blobs: BlobStore, root: Digest, *, absolute_symlinks: bool) -> InputTree:
    """Load and check a tree.

    absolute_symlinks: whether symlinks may have absolute targets.
    Raises MissingBlobs naming every blob that is missing anywhere in the tree, InvalidArgument for a malformed one.
    """
    directories: dict[Digest, InputDirectory] = {}
    missing: dict[Digest, None] = {}
    files: set[Digest] = set()
    pending, seen = [root], {root}
    slice_end = time.monotonic() + _SLICE_S
    while pending:
        if time.monotonic() > slice_end:
            await asyncio.sleep(0)
            slice_end = time.monotonic() + _SLICE_S
        digest = pending.pop()
        try:
            directory = await _load_directory(blobs, digest, absolute_symlinks)
        except BlobNotFound:
            missing[digest] = None
            continue
        directories[digest] = directory
        files.update(file.digest for file in directory.files)
        for child in directory.directories.values():
            if child not in seen:
                seen.add(child)
                pending.append(child)
        if len(seen) + len(files) > MAX_NODES:
            raise InvalidArgument(f"the input tree has more than {MAX_NODES} nodes")
    # The directories were just read; asking for them too renews the promise that they stay.
    missing.update(dict.fromkeys(await blobs.find_missing(files | directories.keys())))
    if missing:
        raise MissingBlobs(list(missing))
    tree = InputTree(root, directories)
    if len(directories) > _LARGE_TREE:
        await asyncio.to_thread(_check_expansion, tree)
    else:
        _check_expansion(tree)
    return tree


async def _load_directory(blobs: BlobStore, digest: Digest, absolute_symlinks: bool) -> InputDirectory:
    if digest.size_bytes > MAX_MESSAGE_BYTES:
        raise InvalidArgument(f"Directory {digest} is larger than {MAX_MESSAGE_BYTES} bytes")
    data = await read_blob(blobs, digest)

    def check() -> InputDirectory:
        message = parse_message(Directory(), data, digest)
        return check_directory(message, digest.function, absolute_symlinks=absolute_symlinks)

    return await asyncio.to_thread(check) if len(data) > INLINE_BYTES else check()


def check_directory(message: Directory, function: DigestFunction, *, absolute_symlinks: bool) -> InputDirectory:
    """Check one Directory message. Raises InvalidArgument."""
    _check_names(node.name for nodes in (message.files, message.directories, message.symlinks) for node in nodes)
    for link in message.symlinks:
        if not link.target or "\0" in link.target:
            raise InvalidArgument(
                f"symlink {link.name!r} in the input tree has the impossible target {shown(link.target)}"
            )
        if link.target.startswith("/") and not absolute_symlinks:
            raise InvalidArgument(
                f"symlink {link.name!r} in the input tree has the absolute target {shown(link.target)}, which "
                "symlink_absolute_path_strategy DISALLOWED forbids"
            )
    return InputDirectory(
        files=tuple(
            InputFile(
                node.name, required_digest(node, "digest", function, f"FileNode {node.name!r}"), node.is_executable
            )
            for node in message.files
        ),
        directories={
            node.name: required_digest(node, "digest", function, f"DirectoryNode {node.name!r}")
            for node in message.directories
        },
        symlinks={link.name: link.target for link in message.symlinks},
    )


def _check_names(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise InvalidArgument(f"the input tree has a node named {name[:100]!r}, which is not a file name")
        if len(name) > 63 and len(name.encode()) > 255:
            raise InvalidArgument(f"the input tree has a node whose name is longer than 255 bytes: {name[:80]!r}…")
        if name in seen:
            raise InvalidArgument(f"the input tree has two nodes named {name!r} in one directory")
        seen.add(name)


def _check_expansion(tree: InputTree) -> None:
    """Refuse a tree that unfolds beyond all measure: 30 small blobs can describe 2^29 directories."""
    nodes: dict[Digest, int] = {}
    depth: dict[Digest, int] = {}
    pending = [tree.root]
    while pending:
        digest = pending[-1]
        directory = tree.directories[digest]
        unknown = [child for child in directory.directories.values() if child not in nodes]
        if unknown:
            pending.extend(unknown)
            if len(pending) > MAX_NODES:
                raise InvalidArgument(f"the input tree has more than {MAX_NODES} nodes")
            continue
        pending.pop()
        children = directory.directories.values()
        nodes[digest] = 1 + len(directory.files) + len(directory.symlinks) + sum(nodes[child] for child in children)
        depth[digest] = 1 + max((depth[child] for child in children), default=0)
        if nodes[digest] > MAX_NODES:
            raise InvalidArgument(f"the input tree expands to more than {MAX_NODES} nodes")
        if depth[digest] > MAX_DEPTH:
            raise InvalidArgument(f"the input tree is nested deeper than {MAX_DEPTH} directories")
