"""The worker pool: gives queued executions to workers, and keeps both in order.

An execution's task asks for a worker, runs on it, and gives it back; the pool decides who gets which. Deciding is the
pure scheduler's; here a decision is marked in the same step in which it is made, so that nothing is given away twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from expbuild.errors import ExpbuildError, QueueFull, StartupError, WorkerFailed
from expbuild.execution.execution import Execution, Outcome, Stage
from expbuild.execution.runner import ActionRunner
from expbuild.execution.scheduler import QueuedAction, WorkerView, assign, check_satisfiable
from expbuild.platform_properties import PropertyList
from expbuild.workers.base import Worker

log = structlog.get_logger()

MAX_ATTEMPTS = 3
"""So many workers may fail under one action before the client is told."""

START_PATIENCE_S = 10.0
"""How long the server waits for its workers before it listens."""

REVIVAL_INTERVAL_S = 5.0
"""How often an offline worker is tried again."""


@dataclass
class _Slot:
    """A worker and what it is doing. offline_reason: why it cannot be used; "" when it can."""

    worker: Worker
    view: WorkerView
    running: Execution | None = None
    offline_reason: str = "not started"
    start: asyncio.Task[ExpbuildError | None] | None = None

    @property
    def is_starting(self) -> bool:
        return self.start is not None and not self.start.done()

    @property
    def is_idle(self) -> bool:
        return self.running is None and not self.offline_reason


@dataclass
class _Waiting:
    """An execution in the queue, and the future that will hold its slot."""

    execution: Execution
    action: QueuedAction
    slot: asyncio.Future[_Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class WorkerPool:
    """Runs executions on workers.

    tasks: owns the starting of workers, which can take long.
    max_queue_size: how many executions may wait beyond those that idle workers could take. interval_s: the longest
    time between two looks at the queue; events wake the pool at once, so this only bounds the damage of a missed one.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        runner: ActionRunner,
        tasks: asyncio.TaskGroup,
        *,
        max_queue_size: int,
        interval_s: float,
    ) -> None:
        self._tasks = tasks
        self._slots = {worker.name: _Slot(worker, WorkerView(worker.name, worker.properties)) for worker in workers}
        self._runner = runner
        self._max_queue_size = max_queue_size
        self._interval_s = interval_s
        self._queue: dict[str, _Waiting] = {}
        self._admitted: set[str] = set()
        self._draining = False
        self._at_rest = asyncio.Event()

    async def start(self) -> None:
        """Start every worker, all at once.

        One that takes long (its image is being pulled, its daemon hangs) is offline until it is ready; the others
        serve. Raises StartupError when a worker cannot keep what its configuration promises.
        """
        starts = [self._begin_start(slot) for slot in self._slots.values()]
        done, _ = await asyncio.wait(starts, timeout=START_PATIENCE_S)
        for start in starts:
            if start in done and isinstance(error := start.result(), StartupError):
                raise error
        for slot in self._slots.values():
            if slot.is_starting:
                log.warning("worker.offline", worker=slot.worker.name, reason="it is still starting")

    async def keep(self) -> None:
        """Look after queue and workers until cancelled."""
        loop = asyncio.get_running_loop()
        next_revival = loop.time() + REVIVAL_INTERVAL_S
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                self._assign()
                if loop.time() >= next_revival:
                    self._revive()
                    next_revival = loop.time() + REVIVAL_INTERVAL_S
        finally:
            for slot in self._slots.values():
                if slot.start is not None:
                    slot.start.cancel()

    def check_satisfiable(self, requested: PropertyList) -> None:
        """Raise NoMatchingWorker when no configured worker, idle, busy or offline, could ever run this."""
        check_satisfiable(requested, [slot.view for slot in self._slots.values()])

    def admit(self, execution_id: str) -> None:
        """Take a place among those that wait. It is given back when the execution starts, or by `leave`.

        Raises QueueFull.
        """
        idle = sum(slot.is_idle for slot in self._slots.values())
        if len(self._admitted) >= self._max_queue_size + idle:
            raise QueueFull(self._max_queue_size)
        self._admitted.add(execution_id)

    def leave(self, execution_id: str) -> None:
        """Give back the place of an execution that will not start after all; harmless when it has."""
        self._admitted.discard(execution_id)

    async def execute(self, execution: Execution) -> Outcome:
        """Run an execution that has a spec and a tree, and a place from `admit`.

        Waits for a worker as long as it takes. A worker that fails is replaced by another, MAX_ATTEMPTS times.
        Raises WorkerFailed after that, any ExpbuildError of the run. Cancelling it takes the execution out of the
        queue, or kills what runs.
        """
        while True:
            slot = await self._acquire(execution)
            try:
                return await self._run(execution, slot)
            except WorkerFailed as error:
                slot.offline_reason = str(error)
                log.warning("worker.offline", worker=slot.worker.name, reason=str(error))
                if execution.attempts >= MAX_ATTEMPTS:
                    raise
            finally:
                self._release(slot)

    # ---- what can be seen from outside -----------------------------------------------------------------------

    @property
    def slots(self) -> Sequence[_Slot]:
        """Every worker, in order of preference."""
        return list(self._slots.values())

    def queued(self) -> list[Execution]:
        """Return what waits for a worker, in order of arrival."""
        return [waiting.execution for waiting in self._queue.values()]

    # ---- draining --------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Start nothing more; what waits is held, what runs goes on."""
        self._draining = True
        self._note_rest()

    async def wait_until_at_rest(self) -> None:
        """Wait until, after `drain`, nothing runs."""
        await self._at_rest.wait()

    def _note_rest(self) -> None:
        if self._draining and not any(slot.running for slot in self._slots.values()):
            self._at_rest.set()

    # ---- queue and slots -------------------------------------------------------------------------------------

    def _release(self, slot: _Slot) -> None:
        slot.running = None
        self._note_rest()
        self._assign()

    async def _run(self, execution: Execution, slot: _Slot) -> Outcome:
        execution.attempts += 1
        execution.enter(Stage.EXECUTING, slot.worker.name)
        return await self._runner.run(execution, slot.worker)

    async def _acquire(self, execution: Execution) -> _Slot:
        """Wait in the queue for a slot; it is marked as running the execution before anybody else can see it."""
        assert execution.spec is not None  # only checked actions are queued
        execution.enter(Stage.QUEUED)
        waiting = _Waiting(
            execution,
            QueuedAction(execution.id, execution.spec.platform, execution.priority, execution.sequence),
        )
        self._queue[execution.id] = waiting
        self._assign()
        try:
            return await waiting.slot
        except asyncio.CancelledError:
            self._queue.pop(execution.id, None)
            if waiting.slot.done() and not waiting.slot.cancelled():
                self._release(waiting.slot.result())
            raise

    def _assign(self) -> None:
        """Give idle workers to queued executions. No await: what is decided is marked before anything else happens."""
        if self._draining:
            return
        idle = [slot.view for slot in self._slots.values() if slot.is_idle]
        if not idle or not self._queue:
            return
        # A cancelled execution is in the queue until its task gets to run.
        queued = [waiting.action for waiting in self._queue.values() if not waiting.slot.done()]
        for assignment in assign(queued, idle):
            waiting = self._queue.pop(assignment.execution)
            slot = self._slots[assignment.worker]
            slot.running = waiting.execution
            self._admitted.discard(waiting.execution.id)
            waiting.slot.set_result(slot)

    async def _start(self, slot: _Slot) -> None:
        try:
            await slot.worker.start()
        except WorkerFailed as error:
            if slot.offline_reason != str(error):
                log.warning("worker.offline", worker=slot.worker.name, reason=str(error))
            slot.offline_reason = str(error)
        else:
            slot.offline_reason = ""
            log.info("worker.registered", worker=slot.worker.name, platform=str(slot.worker.properties))

    def _revive(self) -> None:
        """Try the offline workers again, each by itself: one may pull an image for half an hour."""
        for slot in self._slots.values():
            if slot.offline_reason and slot.running is None and not slot.is_starting:
                self._begin_start(slot)

    def _begin_start(self, slot: _Slot) -> asyncio.Task[ExpbuildError | None]:
        slot.start = self._tasks.create_task(self._try_start(slot), name=f"start {slot.worker.name}")
        return slot.start

    async def _try_start(self, slot: _Slot) -> ExpbuildError | None:
        """Start a worker; return why it refuses for good, if it does. It stays offline then, and is tried again."""
        try:
            await self._start(slot)
        except ExpbuildError as error:
            if slot.offline_reason != str(error):
                log.warning("worker.offline", worker=slot.worker.name, reason=str(error))
            slot.offline_reason = str(error)
            return error
        except Exception as error:
            slot.offline_reason = repr(error)
            log.exception("worker.crashed", worker=slot.worker.name)
        self._assign()
        return None
