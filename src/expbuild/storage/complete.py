"""The action cache as clients may rely on it: a hit names only blobs that are in the CAS.

Builds without the bytes take a hit as a promise and never look again, so an entry with one missing blob is a miss.
"""

from __future__ import annotations

import asyncio

import structlog
from google.protobuf.message import DecodeError

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound, InvalidDigest
from expbuild.reapi import ActionResult, DigestMessage, Directory, Tree
from expbuild.storage.base import ActionCache, ActionKey, BlobStore, read_blob

log = structlog.get_logger()

MAX_TREE_BYTES = 64 << 20
"""A larger Tree is not looked into; its action result counts as a miss."""


class CompleteActionCache:
    """Decorates an action cache: `get` answers only results whose every blob is stored, and renews those blobs."""

    def __init__(self, base: ActionCache, blobs: BlobStore) -> None:
        self._base = base
        self._blobs = blobs

    async def get(self, key: ActionKey) -> ActionResult | None:
        result = await self._base.get(key)
        if result is None:
            return None
        try:
            referenced = await self._referenced_blobs(result, key.action_digest.function)
            missing = await self._blobs.find_missing(referenced, certain=True)
        except _Unusable as error:
            log.warning("action_result.unusable", action_digest=str(key.action_digest), reason=str(error))
            return None
        if missing:
            log.info("action_result.incomplete", action_digest=str(key.action_digest), missing=len(missing))
            return None
        return result

    async def put(self, key: ActionKey, result: ActionResult, *, invocation_id: str = "") -> None:
        await self._base.put(key, result, invocation_id=invocation_id)

    async def _referenced_blobs(self, result: ActionResult, function: DigestFunction) -> set[Digest]:
        """Return every blob a client may fetch on the strength of this result. Raises _Unusable."""
        digests = {_parse(file.digest, function) for file in result.output_files}
        for stream in ("stdout_digest", "stderr_digest"):
            if result.HasField(stream):
                digests.add(_parse(getattr(result, stream), function))
        for directory in result.output_directories:
            if directory.HasField("root_directory_digest"):
                await self._add_directories(_parse(directory.root_directory_digest, function), digests)
            if directory.HasField("tree_digest"):
                await self._add_tree(_parse(directory.tree_digest, function), digests)
        return digests

    async def _add_tree(self, tree_digest: Digest, digests: set[Digest]) -> None:
        tree = Tree()
        await self._load(tree_digest, tree)
        digests.add(tree_digest)
        for directory in (tree.root, *tree.children):
            digests.update(_parse(file.digest, tree_digest.function) for file in directory.files)

    async def _add_directories(self, root: Digest, digests: set[Digest]) -> None:
        """Add a directory that is stored blob by blob, with all below it."""
        pending, seen = [root], {root}
        while pending:
            if len(seen) % 32 == 0:  # reading small blobs does not suspend
                await asyncio.sleep(0)
            digest = pending.pop()
            directory = Directory()
            await self._load(digest, directory)
            digests.add(digest)
            digests.update(_parse(file.digest, digest.function) for file in directory.files)
            for child in directory.directories:
                child_digest = _parse(child.digest, digest.function)
                if child_digest not in seen:
                    seen.add(child_digest)
                    pending.append(child_digest)

    async def _load(self, digest: Digest, message: Tree | Directory) -> None:
        if digest.size_bytes > MAX_TREE_BYTES:
            raise _Unusable(f"directory blob {digest} is larger than {MAX_TREE_BYTES} bytes")
        try:
            message.ParseFromString(await read_blob(self._blobs, digest))
        except BlobNotFound as error:
            raise _Unusable(str(error)) from error
        except DecodeError as error:
            raise _Unusable(f"blob {digest} is not a {type(message).__name__}") from error


class _Unusable(Exception):
    """Why a stored result cannot be a hit."""


def _parse(message: DigestMessage, function: DigestFunction) -> Digest:
    try:
        return Digest.parse(message.hash, message.size_bytes, function)
    except InvalidDigest as error:
        raise _Unusable(str(error)) from error
