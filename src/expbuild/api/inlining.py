"""Putting small outputs into an ActionResult where a client asks for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from expbuild.api.messages import parse_digest
from expbuild.digest import DigestFunction
from expbuild.errors import ExpbuildError
from expbuild.reapi import ActionResult, DigestMessage
from expbuild.storage.base import BlobStore, read_blob

RESULT_BYTES = 3_000_000
"""No larger action result is taken from a client: with what is inlined it must fit into a message of 4 MiB."""

_ONE_BYTES = 64 << 10
_TOTAL_BYTES = 1 << 20
"""Nothing larger is inlined: results stay below the message limit of clients."""


@dataclass(frozen=True, slots=True)
class InlineWishes:
    """What a client would like inlined: a hint, not an order."""

    stdout: bool = False
    stderr: bool = False
    output_files: Collection[str] = ()

    def __bool__(self) -> bool:
        return self.stdout or self.stderr or bool(self.output_files)


async def inlined(
    result: ActionResult, wishes: InlineWishes, blobs: BlobStore, function: DigestFunction
) -> ActionResult:
    """Return the result with what was wished for, as far as it is small; digests stay. The given one is not changed."""
    if not wishes:
        return result
    copy = ActionResult()
    copy.CopyFrom(result)
    room = min(_TOTAL_BYTES, RESULT_BYTES + _TOTAL_BYTES - result.ByteSize())

    async def load(message: DigestMessage) -> bytes:
        nonlocal room
        if not 0 < message.size_bytes <= min(_ONE_BYTES, room):
            return b""
        try:
            data = await read_blob(blobs, parse_digest(message, function))
        except ExpbuildError:
            return b""  # only a hint; who wants the blob will learn why it cannot be read
        room -= len(data)
        return data

    if wishes.stdout and not copy.stdout_raw:
        copy.stdout_raw = await load(copy.stdout_digest)
    if wishes.stderr and not copy.stderr_raw:
        copy.stderr_raw = await load(copy.stderr_digest)
    wanted = set(wishes.output_files)
    for file in copy.output_files:
        if file.path in wanted and not file.contents:
            file.contents = await load(file.digest)
    return copy
