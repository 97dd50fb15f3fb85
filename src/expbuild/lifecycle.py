"""How serving ends: the signals that ask for it, and the time in which what runs may finish.

A build survives a restart when its client is refused only for the moment in which nobody listens. So calls are taken
until the end: what runs finishes, what is new or waits is held, and only at the end is it sent away, to come again.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

import structlog

from expbuild.execution.pool import WorkerPool
from expbuild.sd_notify import ServiceManager

log = structlog.get_logger()

STOP_GRACE_S = 5.0
"""So long short calls may take to end by themselves when the server stops; at once means hardly at all."""

_HURRIED_GRACE_S = 0.5


class StopRequest:
    """SIGTERM or SIGINT. The first asks to stop in good order, the second to stop at once."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._hurried = asyncio.Event()

    def listen_to_signals(self) -> None:
        """Take the signals from now on, in the running event loop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive, number)

    async def wait(self) -> None:
        """Wait until asked to stop."""
        await self._asked.wait()

    async def wait_until_hurried(self) -> None:
        """Wait until asked to stop at once."""
        await self._hurried.wait()

    @property
    def grace_s(self) -> float:
        """How long calls in progress may still take."""
        return _HURRIED_GRACE_S if self._hurried.is_set() else STOP_GRACE_S

    def _receive(self, number: signal.Signals) -> None:
        if self._asked.is_set():
            log.warning("server.hurried", signal=signal.Signals(number).name)
            self._hurried.set()
        else:
            log.info("server.asked_to_stop", signal=signal.Signals(number).name)
            self._asked.set()


async def drain(pool: WorkerPool, timeout_s: float, stop: StopRequest, service_manager: ServiceManager) -> None:
    """Start no action any more, and wait for those that run: at most `timeout_s`, and no longer than `stop` allows."""
    pool.drain()
    running, held = sum(slot.running is not None for slot in pool.slots), len(pool.queued())
    if not running:
        return
    log.info("server.draining", running=running, held=held, timeout_s=timeout_s)
    service_manager.notify(f"STATUS=Draining for at most {timeout_s:g} s: {running} running, {held} held")
    if await _first_of(pool.wait_until_at_rest(), stop.wait_until_hurried(), timeout_s=timeout_s):
        log.info("server.drained")
    else:
        log.warning("server.drain_cut_short", reason="what still runs is ended, and its clients are told to come again")


async def _first_of(wanted: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None], *, timeout_s: float) -> bool:
    """Wait for either; return whether it was the wanted one that came, in time."""
    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(other)]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0] in done
    finally:
        for task in tasks:
            task.cancel()
