"""One execution: what is known of it at any moment, and a way to watch it change."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from expbuild.digest import Digest
from expbuild.errors import ExpbuildError
from expbuild.execution.action import ActionSpec
from expbuild.execution.input_tree import InputTree
from expbuild.execution.reasons import WaitKind, WaitReason
from expbuild.reapi import ActionResult, ExecutedActionMetadata


class Stage(enum.IntEnum):
    """Where an execution is, by the wire's numbers (ExecutionStage.Value)."""

    CACHE_CHECK = 1
    QUEUED = 2
    EXECUTING = 3
    COMPLETED = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an execution ended.

    error: why there is no proper result; None when the command ran to its end, whatever its exit code.
    result: set without an error, and beside one that still left output behind (a timeout).
    message: one plain sentence for people, or "".
    """

    error: ExpbuildError | None = None
    result: ActionResult | None = None
    cached: bool = False
    message: str = ""


class Clock:
    """Wall-clock timestamps that never go backwards: one anchor, then the monotonic clock."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        """Return nanoseconds since the epoch."""
        return self._offset_ns + time.monotonic_ns()


@dataclass
class Timeline:
    """When things happened, in nanoseconds since the epoch; 0 is "not yet". In this order."""

    queued: int = 0
    worker_start: int = 0
    input_fetch_start: int = 0
    input_fetch_completed: int = 0
    execution_start: int = 0
    execution_completed: int = 0
    output_upload_start: int = 0
    output_upload_completed: int = 0
    worker_completed: int = 0

    def metadata(self, worker: str) -> ExecutedActionMetadata:
        """Return the wire form, with the timestamps known so far."""
        metadata = ExecutedActionMetadata(worker=worker)
        for name in self.__dataclass_fields__:
            if value := getattr(self, name):
                getattr(metadata, f"{name}_timestamp").FromNanoseconds(value)
        if self.execution_completed:
            metadata.virtual_execution_duration.FromNanoseconds(self.execution_completed - self.execution_start)
        return metadata


@dataclass(eq=False)
class Execution:
    """One action on its way to a result. Owned by the manager and the pool; any number of operations watch it.

    priority: lower runs sooner; 0 is normal. sequence: order of arrival. build: whose it is, for
    fairness and for people. attempts: how often a worker took it. explain_wait: says why it waits, while it does.
    """

    id: str
    instance_name: str
    action_digest: Digest
    spec: ActionSpec | None = None
    priority: int = 0
    sequence: int = 0
    skip_cache_lookup: bool = False
    invocation_id: str = ""
    build: str = ""
    accepts_directories: bool = False
    tree: InputTree | None = None
    stage: Stage = Stage.CACHE_CHECK
    outcome: Outcome | None = None
    worker: str = ""
    attempts: int = 0
    watchers: int = 0
    explain_wait: Callable[[], WaitReason | None] | None = None
    clock: Clock = field(default_factory=Clock)
    timeline: Timeline = field(default_factory=Timeline)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.timeline.queued = self.clock.now_ns()

    @property
    def wait_reason(self) -> WaitReason | None:
        """Why it does not run yet; None once it does or has ended."""
        if self.explain_wait is not None:
            return self.explain_wait()
        if self.stage in (Stage.CACHE_CHECK, Stage.QUEUED):
            return WaitReason(WaitKind.PREPARING, "its inputs are being looked up")
        return None

    @property
    def is_done(self) -> bool:
        """Whether the outcome is known."""
        return self.outcome is not None

    def enter(self, stage: Stage, worker: str = "") -> None:
        """Move to a stage (backwards too, when a worker was lost) and tell the watchers."""
        self.stage = stage
        self.worker = worker
        self.notify()

    def finish(self, outcome: Outcome) -> None:
        """Record the outcome, once; later ones are echoes of the first."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self.stage = Stage.COMPLETED
        self.spec = self.tree = None  # the record lives on for its clients; what only a run needs does not
        self.notify()

    @property
    def next_change(self) -> asyncio.Event:
        """The event of the next change. Take it before looking at the state, and no change is missed."""
        return self._changed

    @staticmethod
    async def wait_for(change: asyncio.Event, *, at_most_s: float) -> None:
        """Wait for a change, but not longer than `at_most_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await change.wait()

    def notify(self) -> None:
        """Wake everybody who waits for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
