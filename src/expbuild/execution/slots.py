"""The pool's side of a worker: what it runs, whether it can be used, and how often it has failed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from expbuild.errors import ExpbuildError, WorkerFailed
from expbuild.execution.execution import Execution
from expbuild.execution.reasons import SlotView
from expbuild.execution.scheduler import WorkerView
from expbuild.workers.base import Worker

log = structlog.get_logger()

REVIVAL_INTERVAL_S = 5.0
"""How often an offline worker is tried again."""

QUARANTINE_AFTER = 3
"""A worker that fails under so many actions in a row is not trusted for a while, however well it starts."""

QUARANTINE_S = 300.0

CHECK_INTERVAL_S = 60.0
"""How often an idle worker is asked whether it still could run something."""

CHECK_TIMEOUT_S = 20.0


@dataclass(eq=False)
class Slot:
    """A worker and what it is doing. offline_reason: why it cannot be used; "" when it can.

    failures: under how many actions in a row it has failed. try_at_s: an offline worker is not tried before.
    """

    worker: Worker
    view: WorkerView
    running: Execution | None = None
    offline_reason: str = "not started"
    offline_since_s: float = 0.0
    failures: int = 0
    try_at_s: float = 0.0
    checked_at_s: float = 0.0
    start: asyncio.Task[ExpbuildError | None] | None = None
    check: asyncio.Task[None] | None = None

    @property
    def is_starting(self) -> bool:
        return self.start is not None and not self.start.done()

    @property
    def is_checking(self) -> bool:
        return self.check is not None and not self.check.done()

    @property
    def is_idle(self) -> bool:
        """Whether it could take an action now. Not while it proves that it could: one command at a time."""
        return self.running is None and not self.offline_reason and not self.is_checking

    @property
    def state(self) -> str:
        """One word for `re-server status`."""
        if self.offline_reason:
            return "offline"
        return "idle" if self.running is None else "busy"

    def for_explanation(self) -> SlotView:
        """Return what an action that waits is told of this worker."""
        build = self.running.build if self.running is not None else ""
        progress = self.worker.progress if self.offline_reason else ""
        return SlotView(self.worker.name, build, progress or self.offline_reason, is_pulling=bool(progress))

    def go_offline(self, reason: str, now_s: float) -> None:
        """Use this worker no more until it has started again."""
        if reason == self.offline_reason:
            return
        if not self.offline_reason or not self.offline_since_s:
            self.offline_since_s = now_s
        self.offline_reason = reason
        log.warning("worker.offline", worker=self.worker.name, reason=reason)

    def go_online(self) -> None:
        """Use this worker again."""
        self.offline_reason, self.offline_since_s = "", 0.0
        log.info("worker.registered", worker=self.worker.name, platform=str(self.worker.properties))

    def fail(self, reason: str, now_s: float) -> None:
        """Note that the worker failed under an action; after QUARANTINE_AFTER in a row, leave it alone for longer."""
        self.failures += 1
        self.try_at_s = now_s
        self.go_offline(reason, now_s)
        if self.failures >= QUARANTINE_AFTER:
            self.try_at_s = now_s + QUARANTINE_S
            self.offline_reason = f"quarantined after {self.failures} failures in a row, the last: {reason}"
            log.error(
                "worker.quarantined",
                worker=self.worker.name,
                failures=self.failures,
                reason=reason,
                again_in_s=QUARANTINE_S,
                advice="look at the reason and mend its cause (disk, memory, Docker daemon); "
                "a restart of the server tries the worker at once",
            )
            self.failures = 0

    async def verify(self, now_s: float) -> None:
        """Ask an idle worker whether it could run something; take it offline when it could not."""
        self.checked_at_s = now_s
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self.worker.check()
        except TimeoutError:
            self.go_offline(f"its health check did not end within {CHECK_TIMEOUT_S:g} s", now_s)
        except WorkerFailed as error:
            self.go_offline(str(error), now_s)
        except Exception as error:
            self.go_offline(f"its health check failed: {error!r}", now_s)
            log.exception("worker.crashed", worker=self.worker.name)
