"""A whole execution engine in one process: real manager, pool and runner, with workers that do what a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expbuild.execution.action import TimeoutPolicy
from expbuild.execution.execution import Outcome
from expbuild.execution.manager import ExecuteCall, ExecutionManager, ManagerPolicy
from expbuild.execution.operations import Operation
from expbuild.execution.pool import PoolPolicy, WorkerPool
from expbuild.execution.runner import ActionRunner
from expbuild.platform_properties import WorkerProperties
from expbuild.storage.base import write_blob
from expbuild.storage.memory import MemoryActionCache, MemoryBlobStore
from expbuild.workers.base import Owner, Run, RunResult
from tests.support.actions import BuiltAction, from_message

POLICY = ManagerPolicy(
    timeouts=TimeoutPolicy(default_s=60, max_s=3600),
    result_ttl_s=60,
    abandoned_grace_s=60,
    absolute_symlinks=True,
)


class ScriptedWorker:
    """A worker that runs nothing: each run ends when and as the test says.

    stubborn: a cancelled run goes on until it is let go, as one does whose processes take long to die.
    """

    def __init__(self, name: str, work_dir: Path, properties: Sequence[tuple[str, str]] = ()) -> None:
        self.name = name
        self.properties = WorkerProperties(properties)
        self.work_dir = work_dir
        self.owner: Owner | None = None
        self.starts = 0
        self.start_errors: list[Exception] = []
        self.start_gate = asyncio.Event()
        self.start_gate.set()
        self.runs: list[Run] = []
        self.stubborn: asyncio.Event | None = None
        self.progress = ""
        self.check_errors: list[Exception] = []
        self._result: asyncio.Future[RunResult] | None = None
        self._began = asyncio.Event()

    async def start(self) -> None:
        self.starts += 1
        await self.start_gate.wait()
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if self.start_errors:
            raise self.start_errors.pop(0)

    async def run(self, run: Run) -> RunResult:
        assert self._result is None, "two runs at once"
        run.stdout.write_bytes(b"out\n")
        run.stderr.write_bytes(b"")
        self.runs.append(run)
        self._result = asyncio.get_running_loop().create_future()
        self._began.set()
        try:
            return await self._result
        except asyncio.CancelledError:
            if self.stubborn is not None:
                await self.stubborn.wait()
            raise
        finally:
            self._result = None

    async def check(self) -> None:
        if self.check_errors:
            raise self.check_errors.pop(0)

    async def close(self) -> None:
        pass

    @property
    def is_busy(self) -> bool:
        return self._result is not None

    async def began(self) -> Run:
        """Wait for the next run to begin."""
        await self._began.wait()
        self._began.clear()
        return self.runs[-1]

    def end(self, result: RunResult | Exception | None = None) -> None:
        """End the run that is going on; with exit code 0 unless told otherwise."""
        assert self._result is not None, "no run is going on"
        if isinstance(result, Exception):
            self._result.set_exception(result)
        else:
            self._result.set_result(result or RunResult(0))


class InlineExecutor(Executor):
    """Runs everything at once, so that the order of events is the same every time."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@dataclass
class Bench:
    """The engine. Submitted actions are stored first."""

    manager: ExecutionManager
    pool: WorkerPool
    blobs: MemoryBlobStore
    action_cache: MemoryActionCache
    workers: list[ScriptedWorker]
    root: Path
    tasks: asyncio.TaskGroup

    async def store(self, action: BuiltAction) -> None:
        for digest, data in action.blobs.items():
            await write_blob(self.blobs, digest, data)

    async def execute(self, action: BuiltAction, **call: Any) -> Operation:
        """Store an action and ask for its execution."""
        await self.store(action)
        return await self.manager.execute(ExecuteCall("", from_message(action.digest), **call))

    def watch(self, operation: Operation) -> asyncio.Task[Outcome]:
        """Watch an operation to its end, as an RPC does."""
        return self.tasks.create_task(self.outcome(operation))

    async def outcome(self, operation: Operation) -> Outcome:
        async with contextlib.aclosing(self.manager.watch(operation)) as states:
            async for execution in states:
                if execution.outcome is not None:
                    return execution.outcome
        raise AssertionError("the watch ended without an outcome")

    async def submit(self, action: BuiltAction, **call: Any) -> asyncio.Task[Outcome]:
        """Ask for an execution and watch it, from now on."""
        task = self.watch(await self.execute(action, **call))
        await asyncio.sleep(0)
        return task


@contextlib.asynccontextmanager
async def open_bench(
    root: Path,
    workers: Sequence[ScriptedWorker],
    *,
    max_queue_size: int = 100,
    policy: ManagerPolicy = POLICY,
    blobs: MemoryBlobStore | None = None,
    action_cache: MemoryActionCache | None = None,
    executor: Executor | None = None,
    **queue: Any,
) -> AsyncIterator[Bench]:
    """Run an engine. In the end it is closed, and has to come to rest: no execution, no workspace is left."""
    blobs = blobs or MemoryBlobStore()
    action_cache = action_cache or MemoryActionCache()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        runner = ActionRunner(blobs, action_cache, executor or InlineExecutor(), tasks, absolute_symlinks=True)
        pool = WorkerPool(workers, runner, tasks, PoolPolicy(max_queue_size=max_queue_size, interval_s=0.01, **queue))
        await pool.start()
        manager = ExecutionManager(blobs, action_cache, pool, tasks, policy)
        keeper = tasks.create_task(pool.keep())
        try:
            yield Bench(manager, pool, blobs, action_cache, list(workers), root, tasks)
        finally:
            manager.close()
            keeper.cancel()
    for worker in workers:
        assert not worker.is_busy
        assert list(worker.work_dir.iterdir()) == [], "a workspace is left"


async def steps(count: int) -> None:
    """Let the event loop take so many turns."""
    for _ in range(count):
        await asyncio.sleep(0)
