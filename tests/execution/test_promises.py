"""The inputs of what is queued or runs are asked for again and again, and no longer than that."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import StorageUnavailable
from expbuild.execution.execution import Execution
from expbuild.execution.input_tree import InputDirectory, InputFile, InputTree
from expbuild.execution.promises import PromiseKeeper
from expbuild.storage.memory import MemoryBlobStore

SHA256 = DigestFunction.SHA256
ACTION, ROOT, BELOW, FILE = (SHA256.digest_of(name) for name in (b"action", b"root", b"below", b"file"))
TREE = InputTree(
    ROOT,
    {
        ROOT: InputDirectory((), {"below": BELOW}, {}),
        BELOW: InputDirectory((InputFile("file", FILE, False),), {}, {}),
    },
)


class AskedStore(MemoryBlobStore):
    """Remembers each question; the first one fails."""

    def __init__(self) -> None:
        super().__init__()
        self.questions: asyncio.Queue[set[Digest]] = asyncio.Queue()
        self._has_failed = False

    async def find_missing(self, digests: Collection[Digest], *, certain: bool = False) -> set[Digest]:
        if not self._has_failed:
            self._has_failed = True
            raise StorageUnavailable("for a moment")
        self.questions.put_nowait(set(digests))
        return set()


async def test_every_input_is_asked_for_until_the_execution_ends() -> None:
    """Also after a question that failed; and the group it lives in can end afterwards."""
    store = AskedStore()
    execution = Execution(id="1", instance_name="", action_digest=ACTION)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        keeper = PromiseKeeper(store, tasks, 0.001)
        keeper.add(execution)
        assert await store.questions.get() == {ACTION}, "its inputs are not loaded yet"
        execution.tree = TREE
        while (asked := await store.questions.get()) == {ACTION}:
            pass
        assert asked == {ACTION, ROOT, BELOW, FILE}
        keeper.remove(execution)
