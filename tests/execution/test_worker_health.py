"""Workers that fail: checked while idle, avoided, tried again, and left alone in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from expbuild.errors import Code, WorkerFailed
from expbuild.execution import pool as pool_module
from expbuild.execution import slots as slots_module
from expbuild.execution.reasons import WaitKind
from expbuild.workers.base import RunResult
from tests.execution.bench import ScriptedWorker, open_bench
from tests.support.actions import shell


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # a state of the pool, which has no event of its own
            await asyncio.sleep(0.005)


async def test_an_idle_worker_that_fails_its_check_is_offline_until_it_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to lose an action to find out."""
    monkeypatch.setattr(pool_module, "CHECK_INTERVAL_S", 0.01)
    worker = ScriptedWorker("w-0", tmp_path / "w-0")
    worker.start_gate.set()
    async with open_bench(tmp_path, [worker]) as bench:
        (slot,) = bench.pool.slots
        worker.start_gate.clear()
        worker.check_errors = [WorkerFailed("the disk is read-only")]
        await until(lambda: slot.state == "offline")
        assert slot.offline_reason == "the disk is read-only"
        operation = await bench.execute(shell("true"))
        await until(lambda: operation.execution.wait_reason is not None)
        reason = operation.execution.wait_reason
        assert reason is not None
        await until(lambda: (r := operation.execution.wait_reason) and r.kind is WaitKind.WORKER_OFFLINE)
        outcome = bench.watch(operation)
        worker.start_gate.set()
        await worker.began()
        worker.end()
        assert (await outcome).error is None


async def test_a_check_that_does_not_end_takes_the_worker_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wait is bounded."""
    monkeypatch.setattr(pool_module, "CHECK_INTERVAL_S", 0.01)
    monkeypatch.setattr(slots_module, "CHECK_TIMEOUT_S", 0.05)
    worker = ScriptedWorker("w-0", tmp_path / "w-0")

    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(worker, "check", hang)
    async with open_bench(tmp_path, [worker]) as bench:
        (slot,) = bench.pool.slots
        await until(lambda: "health check did not end" in slot.offline_reason)


async def test_a_worker_that_fails_again_and_again_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its actions end well on another one, and the reason says since which failure."""
    monkeypatch.setattr(pool_module, "REVIVAL_INTERVAL_S", 0.01)
    bad, good = (ScriptedWorker(name, tmp_path / name) for name in ("bad-0", "good-0"))
    async with open_bench(tmp_path, [bad, good]) as bench:
        slots = {slot.worker.name: slot for slot in bench.pool.slots}
        for i in range(slots_module.QUARANTINE_AFTER):
            await until(lambda: slots["bad-0"].state == "idle")
            outcome = await bench.submit(shell(f"exit {i}"))
            await bad.began()
            bad.end(WorkerFailed("the spawner died"))
            await good.began()
            good.end(RunResult(0))
            assert (await outcome).error is None
        reason = slots["bad-0"].offline_reason
        assert reason == "quarantined after 3 failures in a row, the last: the spawner died"
        assert bench.pool.statistics.retried == 3
        assert bench.pool.statistics.completed == 3


async def test_what_fails_on_every_worker_ends_as_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bounded number of attempts, and not as a result of the action."""
    monkeypatch.setattr(pool_module, "REVIVAL_INTERVAL_S", 0.01)
    worker = ScriptedWorker("w-0", tmp_path / "w-0")
    async with open_bench(tmp_path, [worker]) as bench:
        outcome = await bench.submit(shell("true"))
        for _ in range(pool_module.MAX_ATTEMPTS):
            await worker.began()
            worker.end(WorkerFailed("the daemon is gone"))
        ended = await outcome
        assert ended.error is not None
        assert (ended.error.code, ended.result) == (Code.UNAVAILABLE, None)
