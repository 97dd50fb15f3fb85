"""The worker pool: gives queued executions to workers, and keeps both in order.

An execution's task asks for a worker, runs on it, and gives it back; the pool decides who gets which. Deciding is the
scheduler's; here a decision is marked in the same step in which it is made, so that nothing is given away twice.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from expbuild.errors import ExpbuildError, QueuedTooLong, QueueFull, StartupError, WorkerFailed
from expbuild.execution.durations import Durations, duration_key
from expbuild.execution.execution import Execution, Outcome, Stage
from expbuild.execution.reasons import WaitKind, WaitReason, explain_wait
from expbuild.execution.resources import NOTHING, Capacity, Resources, requested_resources
from expbuild.execution.runner import ActionRunner
from expbuild.execution.scheduler import QueuedAction, Scheduler, WorkerView
from expbuild.execution.slots import CHECK_INTERVAL_S, REVIVAL_INTERVAL_S, Slot
from expbuild.execution.statistics import Statistics
from expbuild.platform_properties import PropertyList
from expbuild.workers.base import Worker

log = structlog.get_logger()

MAX_ATTEMPTS = 3
"""So many workers may fail under one action before the client is told."""

START_PATIENCE_S = 10.0
"""How long the server waits for its workers before it listens."""

REASONS_INTERVAL_S = 1.0
"""How often the reasons of what waits are looked at again, for log and watchers."""

STATISTICS_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """The rules of the queue.

    max_queue_size: how many executions may wait beyond those that idle workers could take. interval_s: the longest
    time between two looks at the queue; events wake the pool at once, so this only bounds the damage of a missed one.
    queue_timeout_s: who waits longer is told so; None means never.
    """

    max_queue_size: int
    interval_s: float
    queue_timeout_s: float | None = None
    capacity: Capacity = field(default_factory=Capacity)


@dataclass(slots=True)
class _Waiting:
    """An execution in the queue, the future that will hold its slot, and the kind of reason that was told last."""

    execution: Execution
    action: QueuedAction
    told: WaitKind | None = None
    slot: asyncio.Future[Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class WorkerPool:
    """Runs executions on workers. tasks: owns the starting and checking of workers, which can take long."""

    def __init__(
        self, workers: Sequence[Worker], runner: ActionRunner, tasks: asyncio.TaskGroup, policy: PoolPolicy
    ) -> None:
        self._tasks = tasks
        self._slots = {worker.name: Slot(worker, WorkerView(worker.name, worker.properties)) for worker in workers}
        self._runner = runner
        self._policy = policy
        self._scheduler = Scheduler([slot.view for slot in self._slots.values()], policy.capacity)
        self._durations = Durations()
        self._queue: dict[str, _Waiting] = {}
        self._used: dict[str, Resources] = {}
        self._admitted: set[str] = set()
        self._draining = False
        self._at_rest = asyncio.Event()
        self.statistics = Statistics()

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
                slot.go_offline("it is still starting", self._now())

    async def keep(self) -> None:
        """Look after queue and workers until cancelled."""
        next_revival = next_reasons = 0.0
        next_statistics = self._now() + STATISTICS_INTERVAL_S
        try:
            while True:
                await asyncio.sleep(self._policy.interval_s)
                now = self._now()
                self._assign()
                if self._queue and now >= next_reasons:
                    next_reasons = now + REASONS_INTERVAL_S
                    self._update_reasons()
                if now >= next_revival:
                    next_revival = now + min(1.0, REVIVAL_INTERVAL_S)
                    self._look_after_workers(now)
                if now >= next_statistics:
                    next_statistics = now + STATISTICS_INTERVAL_S
                    if self._queue or any(slot.running for slot in self._slots.values()):
                        self.log_statistics()
        finally:
            for slot in self._slots.values():
                for task in (slot.start, slot.check):
                    if task is not None:
                        task.cancel()

    def check_satisfiable(self, requested: PropertyList) -> None:
        """Raise NoMatchingWorker for what no configured worker, idle, busy or offline, could ever run.

        Raises InvalidArgument for amounts of cores or memory that are none.
        """
        self._scheduler.check_satisfiable(requested)
        self._policy.capacity.check(requested_resources(requested))

    def admit(self, execution_id: str) -> None:
        """Take a place among those that wait. It is given back when the execution starts, or by `leave`.

        Raises QueueFull.
        """
        idle = sum(slot.is_idle for slot in self._slots.values())
        if len(self._admitted) >= self._policy.max_queue_size + idle:
            raise QueueFull(self._policy.max_queue_size)
        self._admitted.add(execution_id)

    def leave(self, execution_id: str) -> None:
        """Give back the place of an execution that will not start after all; harmless when it has."""
        self._admitted.discard(execution_id)

    async def execute(self, execution: Execution) -> Outcome:
        """Run an execution that has a spec and a tree, and a place from `admit`.

        Waits for a worker as long as it takes, or as long as it may. A worker that fails is replaced by another,
        MAX_ATTEMPTS times. Raises WorkerFailed after that, QueuedTooLong, any ExpbuildError of the run. Cancelling it
        takes the execution out of the queue, or kills what runs.
        """
        assert execution.spec is not None  # only checked actions are queued
        known_as = duration_key(execution.instance_name, execution.spec)
        avoid: frozenset[str] = frozenset()
        while True:
            slot = await self._acquire(execution, avoid, self._durations.expected_s(known_as))
            try:
                outcome = await self._run(execution, slot)
                slot.failures = 0
                if outcome.error is None:
                    times = execution.timeline
                    self._durations.record(known_as, (times.execution_completed - times.execution_start) / 1e9)
                return outcome
            except WorkerFailed as error:
                slot.fail(str(error), self._now())
                self.log_statistics()
                if execution.attempts >= MAX_ATTEMPTS:
                    raise
                avoid |= {slot.worker.name}
                self.statistics.retried += 1
                log.warning(
                    "execution.retried", execution=execution.id, worker=slot.worker.name, attempts=execution.attempts
                )
            finally:
                self._release(slot, execution)

    # ---- what can be seen from outside -----------------------------------------------------------------------

    @property
    def slots(self) -> Sequence[Slot]:
        """Every worker, in order of preference."""
        return list(self._slots.values())

    @property
    def is_draining(self) -> bool:
        """Whether nothing is started any more."""
        return self._draining

    def queued(self) -> list[Execution]:
        """Return what waits for a worker, in order of arrival."""
        return [waiting.execution for waiting in self._queue.values()]

    def wait_reason(self, execution: Execution) -> WaitReason | None:
        """Return why an execution waits for a worker; None when it does not."""
        waiting = self._queue.get(execution.id)
        if waiting is None or waiting.slot.done():
            return None
        return self._explain(waiting.action, self._scheduler.position(waiting.action.id))

    def _explain(self, action: QueuedAction, position: int) -> WaitReason:
        eligible, used = self._scheduler.eligible(action), self._in_use()
        return explain_wait(
            [slot.for_explanation() for name, slot in self._slots.items() if name in eligible],
            position=position,
            queued=len(self._scheduler),
            short_of=self._policy.capacity.short_of(used, action.resources),
            wanted=str(action.resources),
            used=str(used),
            draining=self._draining,
        )

    def log_statistics(self) -> None:
        """Write the numbers of now into the log."""
        states = [slot.state for slot in self._slots.values()]
        log.info(
            "pool.statistics",
            queued=len(self._queue),
            **{f"workers_{state}": states.count(state) for state in ("idle", "busy", "offline")},
            **{name: getattr(self.statistics, name) for name in self.statistics.__slots__},
        )

    # ---- draining --------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Start nothing more; what waits is held, what runs goes on."""
        self._draining = True
        self._update_reasons()
        self._note_rest()

    async def wait_until_at_rest(self) -> None:
        """Wait until, after `drain`, nothing runs."""
        await self._at_rest.wait()

    def _note_rest(self) -> None:
        if self._draining and not any(slot.running for slot in self._slots.values()):
            self._at_rest.set()

    # ---- queue and slots -------------------------------------------------------------------------------------

    async def _run(self, execution: Execution, slot: Slot) -> Outcome:
        execution.attempts += 1
        execution.enter(Stage.EXECUTING, slot.worker.name)
        return await self._runner.run(execution, slot.worker)

    async def _acquire(self, execution: Execution, avoid: frozenset[str], expected_s: float) -> Slot:
        """Wait in the queue for a slot; it is marked as running the execution before anybody else can see it."""
        assert execution.spec is not None  # only checked actions are queued
        execution.enter(Stage.QUEUED)
        action = QueuedAction(
            execution.id,
            execution.spec.platform,
            execution.priority,
            execution.sequence,
            build=execution.build,
            queued_at_s=self._now(),
            expected_s=expected_s,
            resources=requested_resources(execution.spec.platform),
            avoid=avoid,
        )
        waiting = self._queue[execution.id] = _Waiting(execution, action)
        self._scheduler.add(action)
        execution.explain_wait = functools.partial(self.wait_reason, execution)
        self._assign()
        self._update_reason(waiting)
        try:
            async with asyncio.timeout(self._policy.queue_timeout_s):
                return await waiting.slot
        except TimeoutError:
            reason = self._explain(action, 0)
            self._withdraw(waiting)
            raise QueuedTooLong(self._policy.queue_timeout_s or 0, reason.text) from None
        except asyncio.CancelledError:
            self._withdraw(waiting)
            raise
        finally:
            execution.explain_wait = None

    def _withdraw(self, waiting: _Waiting) -> None:
        """Take an execution out of the queue, also one that got a slot and has not seen it yet."""
        self._queue.pop(waiting.execution.id, None)
        self._scheduler.remove(waiting.execution.id)
        if waiting.slot.done() and not waiting.slot.cancelled():
            self._release(waiting.slot.result(), waiting.execution)

    def _release(self, slot: Slot, execution: Execution) -> None:
        slot.running = None
        self._used.pop(execution.id, None)
        self._note_rest()
        self._assign()

    def _assign(self) -> None:
        """Give idle workers to queued executions. No await: what is decided is marked before anything else happens."""
        if self._draining:
            return
        stale = True
        while stale and self._queue:
            stale = False
            idle = [name for name, slot in self._slots.items() if slot.is_idle]
            for assignment in self._scheduler.assign(idle, self._in_use(), self._now()) if idle else ():
                waiting = self._queue.pop(assignment.execution)
                if waiting.slot.done():  # cancelled, and its task did not get to run yet: the slot is still free
                    stale = True
                    continue
                slot = self._slots[assignment.worker]
                slot.running = waiting.execution
                self._used[waiting.execution.id] = waiting.action.resources
                self._admitted.discard(waiting.execution.id)
                waiting.slot.set_result(slot)

    def _in_use(self) -> Resources:
        return sum(self._used.values(), NOTHING)

    def _update_reasons(self) -> None:
        """Look again why everything waits. What asks for the same waits for the same, but for its position."""
        kinds: dict[object, WaitKind] = {}
        for waiting in self._queue.values():
            action = waiting.action
            demand = (action.platform, action.resources, action.avoid)
            if demand not in kinds:
                kinds[demand] = self._explain(action, 0).kind
            if kinds[demand] is not waiting.told:
                self._update_reason(waiting)

    def _update_reason(self, waiting: _Waiting) -> None:
        """Tell log and watchers why an execution waits."""
        execution = waiting.execution
        reason = self.wait_reason(execution)
        if reason is None:
            return
        waiting.told = reason.kind
        log.info(
            "execution.waiting",
            execution=execution.id,
            action_digest=str(execution.action_digest),
            invocation_id=execution.invocation_id,
            reason=reason.kind.value,
            text=reason.text,
        )
        execution.notify()

    # ---- workers ---------------------------------------------------------------------------------------------

    def _look_after_workers(self, now_s: float) -> None:
        """Try the offline workers again, each by itself, for one may pull an image for long. Check the idle ones."""
        for slot in self._slots.values():
            if slot.running is not None or slot.is_starting or self._draining:
                continue
            if slot.offline_reason:
                if now_s >= slot.try_at_s:
                    slot.try_at_s = now_s + REVIVAL_INTERVAL_S
                    self._begin_start(slot)
            elif now_s >= slot.checked_at_s + CHECK_INTERVAL_S and not slot.is_checking:
                slot.check = self._tasks.create_task(self._verify(slot), name=f"check {slot.worker.name}")
                slot.check.add_done_callback(lambda _: self._assign())

    async def _verify(self, slot: Slot) -> None:
        await slot.verify(self._now())
        if slot.offline_reason:
            self.log_statistics()

    def _begin_start(self, slot: Slot) -> asyncio.Task[ExpbuildError | None]:
        slot.start = self._tasks.create_task(self._try_start(slot), name=f"start {slot.worker.name}")
        return slot.start

    async def _try_start(self, slot: Slot) -> ExpbuildError | None:
        """Start a worker; return why it refuses for good, if it does. It stays offline then, and is tried again."""
        try:
            await slot.worker.start()
        except ExpbuildError as error:
            slot.go_offline(str(error), self._now())
            return error if not isinstance(error, WorkerFailed) else None
        except Exception as error:
            slot.go_offline(repr(error), self._now())
            log.exception("worker.crashed", worker=slot.worker.name)
        else:
            was_lost = slot.offline_since_s > 0
            slot.checked_at_s = self._now()
            slot.go_online()
            if was_lost:
                self.log_statistics()
            self._assign()
        return None

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
