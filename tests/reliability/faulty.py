"""A process that does single steps on a store, each in a child of its own that waits to be traced.

Reads lines `ROOT STEP` and answers with the child's pid; reads another line to wait for it, and answers with its exit
code, negative for a signal.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from expbuild.digest import DigestFunction
from expbuild.errors import ExpbuildError
from expbuild.reapi import ActionResult
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import ActionKey, write_blob
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.janitor import Janitor
from expbuild.storage.policy import StorePolicy
from expbuild.storage.root import Durability

OLD, SMALL, LARGE = b"old blob", b"new blob", b"large" * 100_000
KEY = ActionKey("", DigestFunction.SHA256.digest_of(b"action"))
STRICT = StorePolicy(Durability.STRICT, min_free_bytes=0, min_age_s=0.0)

ACKNOWLEDGED, FAILED = 0, 3


def open_stores(root: Path, executor: ThreadPoolExecutor) -> tuple[FilesystemBlobStore, FilesystemActionCache]:
    blobs = FilesystemBlobStore(root / "cas", [DigestFunction.SHA256], executor, STRICT)
    return blobs, FilesystemActionCache(root / "ac", STRICT)


async def do(step: str, blobs: FilesystemBlobStore, cache: FilesystemActionCache) -> None:
    """Do one step."""
    match step:
        case "small":
            await write_blob(blobs, DigestFunction.SHA256.digest_of(SMALL), SMALL)
        case "large" | "short":
            await write_blob(blobs, DigestFunction.SHA256.digest_of(LARGE), LARGE)
        case "result":
            await cache.put(KEY, ActionResult(exit_code=2))
        case "evict":
            Janitor(blobs.root, blobs.policy, blobs.budget).evict_before(2**62)
        case _:
            raise ValueError(step)


async def _child(root: Path, step: str) -> int:
    os.kill(os.getpid(), signal.SIGSTOP)
    if step == "short":  # a write is cut short here, and the next one fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    with ThreadPoolExecutor(1) as executor:
        try:
            await do(step, *open_stores(root, executor))
        except (ExpbuildError, OSError):  # the janitor leaves an OSError to who calls it
            return FAILED
    return ACKNOWLEDGED


def main() -> None:
    for line in sys.stdin:
        root, step = line.split()
        pid = os.fork()
        if pid == 0:
            code = 4
            try:
                code = asyncio.run(_child(Path(root), step))
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
