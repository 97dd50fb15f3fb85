"""The execution manager: from an Execute call to an operation that can be watched, and every rule in between."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

import structlog

from expbuild.digest import Digest
from expbuild.errors import (
    ExecutionAbandoned,
    ExecutionCancelled,
    ExpbuildError,
    InternalError,
    InvalidArgument,
    MissingBlobs,
    ShuttingDown,
)
from expbuild.execution.action import ActionSpec, TimeoutPolicy, load_action
from expbuild.execution.execution import Execution, Outcome
from expbuild.execution.input_tree import load_input_tree
from expbuild.execution.operations import Operation, Operations
from expbuild.execution.pool import WorkerPool
from expbuild.execution.promises import PromiseKeeper
from expbuild.storage.base import ActionCache, ActionKey, BlobStore

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ExecuteCall:
    """What a client asks for.

    priority: lower runs sooner. peer: where the call comes from, for calls that name no invocation.
    accepts_directories: the client takes a directory where it declared a file.
    """

    instance_name: str
    action_digest: Digest
    skip_cache_lookup: bool = False
    priority: int = 0
    invocation_id: str = ""
    peer: str = ""
    accepts_directories: bool = False


@dataclass(frozen=True, slots=True)
class ManagerPolicy:
    """The times and rules of executions.

    result_ttl_s: how long a finished operation can still be attached to. abandoned_grace_s: how long an execution
    nobody watches goes on. heartbeat_s: the longest silence towards a watcher. renewal_s: how often the inputs of what
    is queued or runs are asked for, so that the store keeps them.
    """

    timeouts: TimeoutPolicy
    result_ttl_s: float
    abandoned_grace_s: float
    absolute_symlinks: bool
    heartbeat_s: float = 15.0
    renewal_s: float = 150.0


class ExecutionManager:
    """Owns every execution from the call that asked for it until its result has expired.

    tasks: owns the running executions; the RPCs only watch.
    """

    def __init__(
        self,
        blobs: BlobStore,
        action_cache: ActionCache,
        pool: WorkerPool,
        tasks: asyncio.TaskGroup,
        policy: ManagerPolicy,
    ) -> None:
        self._blobs = blobs
        self._action_cache = action_cache
        self._pool = pool
        self._tasks = tasks
        self._policy = policy
        self._operations = Operations(policy.result_ttl_s)
        self._promises = PromiseKeeper(blobs, tasks, policy.renewal_s)
        self._in_flight: dict[ActionKey, Execution] = {}
        self._running: dict[Execution, asyncio.Task[Outcome]] = {}
        self._stop_reasons: dict[Execution, ExpbuildError] = {}
        self._abandonments: dict[str, asyncio.TimerHandle] = {}
        self._sequence = itertools.count()
        self._closing = False

    async def execute(self, call: ExecuteCall) -> Operation:
        """Start an execution, join an equal one in flight, or answer from the action cache.

        Raises before there is an operation: InvalidArgument for a malformed action, NoMatchingWorker for one that can
        never run here, QueueFull, ShuttingDown. Everything later, missing blobs included, is the operation's outcome.
        """
        self._check_open()
        key = ActionKey(call.instance_name, call.action_digest)
        try:
            spec = await load_action(self._blobs, call.action_digest, self._policy.timeouts)
        except MissingBlobs as error:
            return self._finished(call, Outcome(error=error))
        if (running := self._mergeable(call, spec)) is not None:
            return self._merged(running)
        if not call.skip_cache_lookup and not spec.do_not_cache:
            result = await self._action_cache.get(key)
            if result is not None:
                return self._finished(call, Outcome(result=result, cached=True))
            if (running := self._mergeable(call, spec)) is not None:
                return self._merged(running)
        self._check_open()  # may have changed while we waited; what starts after close() would never be stopped
        self._pool.check_satisfiable(spec.platform)
        execution = self._create(call, spec)
        self._pool.admit(execution.id)
        if not spec.do_not_cache:
            self._in_flight[key] = execution
        # A context of its own: what the log says of the call that came first is not true of the execution.
        context = contextvars.Context()
        task = self._tasks.create_task(self._run(execution), name=f"execution {execution.id}", context=context)
        task.add_done_callback(functools.partial(self._conclude, execution), context=context)
        self._running[execution] = task
        self._promises.add(execution)
        return self._operations.create(execution)

    @property
    def pool(self) -> WorkerPool:
        """What runs the executions."""
        return self._pool

    def operation(self, name: str) -> Operation:
        """Return a known operation. Raises OperationNotFound."""
        return self._operations.get(name)

    def operations(self) -> Iterator[Operation]:
        """Return the operations known now, oldest first."""
        return iter(self._operations)

    async def watch(self, operation: Operation) -> AsyncGenerator[Operation, None]:
        """Yield the operation now, at each change, and at least every heartbeat; end after yielding its outcome.

        Only the latest state counts: a slow watcher skips what it missed. Ending the iteration early stops the
        watching, not the execution: that goes on for the grace period.
        """
        execution = operation.execution
        execution.watchers += 1
        if (timer := self._abandonments.pop(execution.id, None)) is not None:
            timer.cancel()
        try:
            is_done = False
            while not is_done:
                change, is_done = execution.next_change, operation.outcome is not None
                yield operation
                if not is_done:
                    await execution.wait_for(change, at_most_s=self._policy.heartbeat_s)
        finally:
            execution.watchers -= 1
            if execution.watchers == 0 and not execution.is_done:
                self._await_return(execution)

    def cancel(self, operation: Operation) -> None:
        """Cancel an operation; its execution is stopped unless others share it. Harmless when it is done."""
        if self._operations.cancel(operation):
            self._stop(operation.execution, ExecutionCancelled())

    def delete(self, operation: Operation) -> None:
        """Forget an operation's name: its client does not come back. The execution goes on."""
        self._operations.forget(operation)

    def close(self) -> None:
        """End everything: nothing new is accepted, what waits or runs ends as UNAVAILABLE. Does not wait for it."""
        self._closing = True
        for execution in list(self._running):
            self._stop(execution, ShuttingDown())

    def _check_open(self) -> None:
        if self._closing:
            raise ShuttingDown

    def _merged(self, execution: Execution) -> Operation:
        self._pool.statistics.merged += 1
        return self._operations.create(execution)

    def _mergeable(self, call: ExecuteCall, spec: ActionSpec) -> Execution | None:
        """Return an execution in flight that this call may share.

        One that skips the cache wants a run that starts after now: it repairs results whose blobs were lost.
        """
        if call.skip_cache_lookup or spec.do_not_cache:
            return None
        return self._in_flight.get(ActionKey(call.instance_name, call.action_digest))

    def _create(self, call: ExecuteCall, spec: ActionSpec | None) -> Execution:
        return Execution(
            id=str(uuid.uuid4()),
            instance_name=call.instance_name,
            action_digest=call.action_digest,
            spec=spec,
            priority=call.priority,
            sequence=next(self._sequence),
            skip_cache_lookup=call.skip_cache_lookup,
            invocation_id=call.invocation_id,
            build=call.invocation_id or call.peer,
            accepts_directories=call.accepts_directories,
        )

    def _finished(self, call: ExecuteCall, outcome: Outcome) -> Operation:
        """Return an operation that is done before it began."""
        execution = self._create(call, None)
        execution.finish(outcome)
        self._pool.statistics.count(outcome)
        _log_completion(execution)
        self._operations.expire_later(execution)
        return self._operations.create(execution)

    async def _run(self, execution: Execution) -> Outcome:
        """Bring an execution to its outcome. Raises nothing but CancelledError."""
        try:
            await self._load_inputs(execution)
            return await self._pool.execute(execution)
        except ExpbuildError as error:
            return Outcome(error=error)
        except Exception:
            fault = InternalError()
            log.exception("execution.crashed", execution=execution.id, incident=fault.incident)
            return Outcome(error=fault)

    async def _load_inputs(self, execution: Execution) -> None:
        spec = execution.spec
        assert spec is not None  # executions without one are finished when they are made
        execution.tree = await load_input_tree(
            self._blobs, spec.input_root, absolute_symlinks=self._policy.absolute_symlinks
        )
        if execution.tree.directory_at(spec.command.working_directory) is None:
            path = "/".join(spec.command.working_directory)
            raise InvalidArgument(f"Command.working_directory: {path!r} is not a directory of the input tree")

    def _await_return(self, execution: Execution) -> None:
        """Stop an execution that nobody watches, unless somebody comes back in time."""
        reason = ExecutionAbandoned(f"nobody watched this execution for {self._policy.abandoned_grace_s:g} s")
        self._abandonments[execution.id] = asyncio.get_running_loop().call_later(
            self._policy.abandoned_grace_s, self._stop, execution, reason
        )

    def _stop(self, execution: Execution, reason: ExpbuildError) -> None:
        """Begin to end an execution, once; from now on nobody joins it."""
        task = self._running.get(execution)
        if task is None or execution in self._stop_reasons:
            return
        self._stop_reasons[execution] = reason
        self._take_out_of_flight(execution)
        task.cancel()

    def _take_out_of_flight(self, execution: Execution) -> None:
        key = ActionKey(execution.instance_name, execution.action_digest)
        if self._in_flight.get(key) is execution:
            del self._in_flight[key]

    def _conclude(self, execution: Execution, task: asyncio.Task[Outcome]) -> None:
        """Record, log and make room, whatever way an execution's task ended: even one cancelled before it began."""
        del self._running[execution]
        self._promises.remove(execution)
        self._pool.leave(execution.id)
        if (timer := self._abandonments.pop(execution.id, None)) is not None:
            timer.cancel()
        self._take_out_of_flight(execution)
        reason = self._stop_reasons.pop(execution, ShuttingDown())
        execution.finish(Outcome(error=reason) if task.cancelled() else task.result())
        assert execution.outcome is not None  # that was it
        self._pool.statistics.count(execution.outcome)
        _log_completion(execution)
        self._operations.expire_later(execution)


def _log_completion(execution: Execution) -> None:
    outcome, times = execution.outcome, execution.timeline
    assert outcome is not None  # called once it is known
    fields: dict[str, object] = {}
    if outcome.error is not None:
        fields["reason"] = str(outcome.error)
    if outcome.result is not None:
        fields["exit_code"] = outcome.result.exit_code
    if times.execution_completed:
        fields["queued_ms"] = (times.worker_start - times.queued) // 10**6
        fields["run_ms"] = (times.execution_completed - times.execution_start) // 10**6
    log.info(
        "execution.completed",
        execution=execution.id,
        action_digest=str(execution.action_digest),
        instance_name=execution.instance_name,
        invocation_id=execution.invocation_id,
        code=outcome.error.code.name if outcome.error is not None else "OK",
        cached=outcome.cached,
        worker=execution.worker,
        duration_ms=(execution.clock.now_ns() - times.queued) // 10**6,
        **fields,
    )
