"""Keeping the inputs of what is queued or runs: a store may evict what nobody has asked for lately."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from expbuild.digest import Digest
from expbuild.errors import ExpbuildError
from expbuild.execution.execution import Execution
from expbuild.storage.base import BlobStore

log = structlog.get_logger()


class PromiseKeeper:
    """Asks for the inputs of every execution added, again and again, until it is removed.

    tasks: owns the one task that does it, which lives while there are executions. interval_s: between two rounds; a
    store must keep what was asked for longer than that.
    """

    def __init__(self, blobs: BlobStore, tasks: asyncio.TaskGroup, interval_s: float) -> None:
        self._blobs = blobs
        self._tasks = tasks
        self._interval_s = interval_s
        self._executions: set[Execution] = set()
        self._task: asyncio.Task[None] | None = None

    def add(self, execution: Execution) -> None:
        """Keep the inputs of an execution, as soon as they are loaded."""
        self._executions.add(execution)
        if self._task is None:
            self._task = self._tasks.create_task(self._keep(), name="promises")

    def remove(self, execution: Execution) -> None:
        """Let them go."""
        self._executions.discard(execution)
        if not self._executions and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._blobs.find_missing(await asyncio.to_thread(_inputs, tuple(self._executions)))
            except ExpbuildError as error:
                log.warning("inputs.not_renewed", reason=str(error))


def _inputs(executions: Iterable[Execution]) -> set[Digest]:
    """Return every blob that actions may still need; what their trees share is walked once."""
    wanted: set[Digest] = set()
    for execution in executions:
        wanted.add(execution.action_digest)
        tree = execution.tree
        for digest, directory in tree.directories.items() if tree is not None else ():
            if digest not in wanted:
                wanted.add(digest)
                wanted.update(file.digest for file in directory.files)
    return wanted
