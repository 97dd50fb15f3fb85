"""A Tree for every output directory: some clients (Buck2, BuildStream) read nothing else."""

from __future__ import annotations

import asyncio

from expbuild.api.messages import parse_digest, to_message
from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound
from expbuild.execution.action import parse_message
from expbuild.execution.outputs import length_delimited
from expbuild.reapi import ActionResult, Directory
from expbuild.storage.base import BlobStore, read_blob, write_blob

MAX_TREE_BYTES = 64 << 20
"""A result whose directory is larger counts as a miss, as one with a larger Tree does."""


async def with_trees(result: ActionResult, blobs: BlobStore, function: DigestFunction) -> ActionResult:
    """Return the result, every output directory with a Tree; the one given is not changed.

    A client may have uploaded a directory blob by blob and named only its root. Raises BlobNotFound, InvalidArgument.
    """
    if all(directory.HasField("tree_digest") for directory in result.output_directories):
        return result
    copy = ActionResult()
    copy.CopyFrom(result)
    for directory in copy.output_directories:
        if not directory.HasField("tree_digest"):
            tree = await _tree(parse_digest(directory.root_directory_digest, function), blobs)
            digest = function.digest_of(tree)
            if await blobs.find_missing([digest]):
                await write_blob(blobs, digest, tree)
            directory.tree_digest.CopyFrom(to_message(digest))
    return copy


async def _tree(root: Digest, blobs: BlobStore) -> bytes:
    """Return the Tree of a directory: the blobs of all Directories as they are, the root first, each once."""
    parts: list[bytes] = []
    pending, seen, size_bytes = [root], {root}, 0
    while pending:
        if len(parts) % 32 == 0:  # reading small blobs does not suspend
            await asyncio.sleep(0)
        digest = pending.pop()
        size_bytes += digest.size_bytes
        if size_bytes > MAX_TREE_BYTES:
            raise BlobNotFound(root)
        data = await read_blob(blobs, digest)
        parts.append(length_delimited(2 if parts else 1, data))
        for node in parse_message(Directory(), data, digest).directories:
            child = parse_digest(node.digest, digest.function)
            if child not in seen:
                seen.add(child)
                pending.append(child)
    return b"".join(parts)
