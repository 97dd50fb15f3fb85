"""Manager, pool and runner together: no slot, place or result is ever lost, whenever something ends or is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path

import pytest

from expbuild.errors import (
    Code,
    MissingBlobs,
    NoMatchingWorker,
    OperationNotFound,
    QueueFull,
    ShuttingDown,
    StorageFull,
    WorkerFailed,
    WorkerFull,
)
from expbuild.execution import operations as operations_module
from expbuild.execution import pool as pool_module
from expbuild.execution.execution import Outcome, Stage
from expbuild.execution.manager import ExecuteCall
from expbuild.reapi import ActionResult
from expbuild.storage.base import ActionKey
from expbuild.storage.memory import MemoryActionCache, MemoryBlobStore
from expbuild.workers.base import RunResult
from tests.execution.bench import POLICY, Bench, ScriptedWorker, open_bench, steps
from tests.support.actions import eventually, from_message, shell


@pytest.fixture
def worker(root: Path) -> ScriptedWorker:
    return ScriptedWorker("one", root / "one")


async def run_one(bench: Bench, worker: ScriptedWorker) -> Outcome:
    """Run an action on a worker that has to be free."""
    task = await bench.submit(shell("x"))
    await worker.began()
    worker.end()
    return await task


def ok(outcome: Outcome) -> bool:
    return outcome.error is None and outcome.result is not None and outcome.result.exit_code == 0


# ---- cancellation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(12))
async def test_cancelling_a_queued_execution_at_any_step_loses_no_worker(
    root: Path, worker: ScriptedWorker, turns: int
) -> None:
    """The one before it ends, so the worker is just being given to it: whichever comes first, the worker is free."""
    async with open_bench(root, [worker], policy=dataclasses.replace(POLICY, abandoned_grace_s=0)) as bench:
        first = await bench.submit(shell("first"))
        await worker.began()
        queued = await bench.submit(shell("queued"))
        await steps(10)
        worker.end()
        await steps(turns)
        queued.cancel()  # with no grace its execution is cancelled in the next step
        assert ok(await first)
        await steps(20)
        assert not worker.is_busy
        worker._began.clear()
        assert ok(await run_one(bench, worker))


@pytest.mark.parametrize("turns", range(12))
async def test_cancelling_and_ending_in_the_other_order(root: Path, worker: ScriptedWorker, turns: int) -> None:
    """First the queued one is cancelled, then, some steps later, the running one ends."""
    async with open_bench(root, [worker], policy=dataclasses.replace(POLICY, abandoned_grace_s=0)) as bench:
        first = await bench.submit(shell("first"))
        await worker.began()
        queued = await bench.submit(shell("queued"))
        await steps(10)
        queued.cancel()
        await steps(turns)
        worker.end()
        assert ok(await first)
        await steps(20)
        assert not worker.is_busy
        worker._began.clear()
        assert ok(await run_one(bench, worker))


@pytest.mark.parametrize("turns", range(2, 27))
async def test_cancelling_an_execution_at_any_step_of_its_life(root: Path, worker: ScriptedWorker, turns: int) -> None:
    """Loading, queued, starting, running, collecting: the worker is free afterwards and the workspace gone."""
    async with open_bench(root, [worker], policy=dataclasses.replace(POLICY, abandoned_grace_s=0)) as bench:
        task = await bench.submit(shell("x", inputs={"d": {"f": b"x"}}))
        await steps(turns // 2)
        if worker.is_busy and turns % 2:
            worker.end()
        await steps(turns - turns // 2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await steps(30)
        assert not worker.is_busy
        worker._began.clear()
        assert ok(await run_one(bench, worker))


async def test_closing_ends_everything_as_unavailable(root: Path, worker: ScriptedWorker) -> None:
    """What runs, what waits, and what is asked for later."""
    async with open_bench(root, [worker]) as bench:
        tasks = [await bench.submit(shell(f"{i}")) for i in range(5)]
        await worker.began()
        bench.manager.close()
        for task in tasks:
            assert isinstance((await task).error, ShuttingDown)
        with pytest.raises(ShuttingDown):
            await bench.execute(shell("late"))


class GatedActionCache(MemoryActionCache):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.gate = asyncio.Event(), asyncio.Event()

    async def get(self, key: ActionKey) -> ActionResult | None:
        self.asked.set()
        await self.gate.wait()
        return await super().get(key)


async def test_closing_while_a_call_looks_into_the_cache(root: Path, worker: ScriptedWorker) -> None:
    """It must not start what nobody would end: the server would never come down."""
    cache = GatedActionCache()
    async with open_bench(root, [worker], action_cache=cache) as bench:
        task = asyncio.create_task(bench.execute(shell("x")))
        await cache.asked.wait()
        bench.manager.close()
        cache.gate.set()
        with pytest.raises(ShuttingDown):
            await task


async def test_two_calls_that_look_into_the_cache_together_run_once(root: Path, worker: ScriptedWorker) -> None:
    """The second sees the first's run when it comes back."""
    cache = GatedActionCache()
    async with open_bench(root, [worker], action_cache=cache) as bench:
        action = shell("x")
        calls = [asyncio.create_task(bench.submit(action)) for _ in range(2)]
        await cache.asked.wait()
        await steps(5)
        cache.gate.set()
        watchers = [await call for call in calls]
        await worker.began()
        worker.end()
        assert all(map(ok, await asyncio.gather(*watchers)))
        assert len(worker.runs) == 1


async def test_nobody_joins_an_execution_that_is_being_ended(root: Path) -> None:
    """Killing takes its time; whoever comes meanwhile gets a run of their own."""
    dying, other = ScriptedWorker("dying", root / "a"), ScriptedWorker("other", root / "b")
    async with open_bench(root, [dying, other], policy=dataclasses.replace(POLICY, abandoned_grace_s=0)) as bench:
        action = shell("x")
        first = await bench.submit(action)
        await dying.began()
        dying.stubborn = asyncio.Event()
        first.cancel()
        await steps(10)
        assert dying.is_busy
        second = await bench.submit(action)
        await other.began()
        other.end()
        assert ok(await second)
        dying.stubborn.set()


async def test_a_watcher_that_comes_back_stops_the_timer(root: Path, worker: ScriptedWorker) -> None:
    """Whether by name or with an equal action; and each watcher going away alone changes nothing."""
    async with open_bench(root, [worker], policy=dataclasses.replace(POLICY, abandoned_grace_s=3600)) as bench:
        action = shell("x")
        operation = await bench.execute(action)
        await worker.began()
        for _ in range(3):
            watchers = [bench.watch(operation), await bench.submit(action)]
            await steps(3)
            assert operation.execution.watchers == 2
            assert bench.manager._abandonments == {}
            for watcher in watchers:
                watcher.cancel()
            await steps(3)
            assert operation.execution.watchers == 0
            assert len(bench.manager._abandonments) == 1
        last = bench.watch(bench.manager.operation(operation.name))
        await steps(3)
        assert bench.manager._abandonments == {}
        worker.end()
        assert ok(await last)


async def test_watchers_are_told_of_every_change_and_regularly_of_none(root: Path, worker: ScriptedWorker) -> None:
    """A heartbeat repeats the state; the outcome comes exactly once, and last."""
    async with open_bench(root, [worker], policy=dataclasses.replace(POLICY, heartbeat_s=0.005)) as bench:
        operation = await bench.execute(shell("x"))
        stages = []
        async with contextlib.aclosing(bench.manager.watch(operation)) as states:
            async for execution in states:
                stages.append(execution.stage)
                if stages.count(Stage.EXECUTING) >= 3 and worker.is_busy:
                    worker.end()
                    break
            async for execution in states:
                stages.append(execution.stage)
        assert stages == sorted(stages)
        assert stages.count(Stage.EXECUTING) >= 3
        assert stages.count(Stage.COMPLETED) == 1


# ---- workers that fail -------------------------------------------------------------------------------------------


async def test_EXE_35_a_lost_worker_is_replaced_by_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back to the queue and on to the next; the first is offline until it starts again."""
    monkeypatch.setattr(pool_module, "REVIVAL_INTERVAL_S", 0.02)
    first, second = ScriptedWorker("first", root / "a"), ScriptedWorker("second", root / "b")
    async with open_bench(root, [first, second]) as bench:
        first.start_errors = [WorkerFailed("still gone"), RuntimeError("a bug")]
        operation = await bench.execute(shell("x"))
        task = bench.watch(operation)
        await first.began()
        first.end(WorkerFailed("gone"))
        await second.began()
        assert operation.execution.worker == "second"
        # Nothing of the first attempt is left in what a client sees of the second.
        times = operation.execution.timeline
        assert 0 < times.worker_start <= times.input_fetch_start <= times.input_fetch_completed <= times.execution_start
        second.end()
        outcome = await task
        assert ok(outcome)
        assert outcome.result is not None
        assert outcome.result.execution_metadata.worker == "second"
        revived = await bench.submit(shell("y"))
        await eventually(lambda: first.is_busy or second.is_busy, "one of them runs it")
        (second if second.is_busy else first).end()
        await revived
        await eventually(lambda: first.starts == 4, "started, failed, crashed and started again")
        first._began.clear()
        last = await bench.submit(shell("z"))
        await first.began()
        first.end()
        assert ok(await last)


async def test_EXE_35_attempts_are_bounded(root: Path) -> None:
    """Three workers lost under one action, then the client is told; the error is UNAVAILABLE, not a result."""
    workers = [ScriptedWorker(f"{i}", root / f"{i}") for i in range(4)]
    async with open_bench(root, workers) as bench:
        task = await bench.submit(shell("poison"))
        for worker in workers[:3]:
            await worker.began()
            worker.end(WorkerFailed("gone"))
        outcome = await task
        assert outcome.error is not None
        assert outcome.error.code is Code.UNAVAILABLE
        assert workers[3].runs == []


async def test_EXE_36_a_full_worker_is_resource_exhausted(root: Path, worker: ScriptedWorker) -> None:
    """Never an exit code; and the worker stays."""
    async with open_bench(root, [worker]) as bench:
        task = await bench.submit(shell("x"))
        await worker.began()
        worker.end(WorkerFull("no room"))
        outcome = await task
        assert outcome.error is not None
        assert (outcome.error.code, outcome.result) == (Code.RESOURCE_EXHAUSTED, None)
        assert ok(await run_one(bench, worker))


async def test_EXE_36_a_fault_of_ours_is_internal_and_says_where_to_look(root: Path, worker: ScriptedWorker) -> None:
    """The client gets an incident number and no more; the worker is free again."""
    async with open_bench(root, [worker]) as bench:
        task = await bench.submit(shell("x"))
        await worker.began()
        worker.end(ZeroDivisionError("secret detail"))
        outcome = await task
        assert outcome.error is not None
        assert outcome.error.code is Code.INTERNAL
        assert "secret" not in str(outcome.error)
        assert ok(await run_one(bench, worker))


async def test_a_worker_that_takes_long_to_start_does_not_keep_others_offline(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may pull an image for half an hour."""
    monkeypatch.setattr(pool_module, "REVIVAL_INTERVAL_S", 0.01)
    slow, quick = ScriptedWorker("slow", root / "a"), ScriptedWorker("quick", root / "b")
    slow.start_errors = [WorkerFailed("no daemon")]
    quick.start_errors = [WorkerFailed("no daemon")]
    async with open_bench(root, [slow, quick]) as bench:
        slow.start_gate.clear()
        task = await bench.submit(shell("x"))
        await quick.began()
        quick.end()
        assert ok(await task)
        assert slow.starts == 2
        slow.start_gate.set()


async def test_what_no_worker_can_run_is_refused_even_while_all_are_offline(root: Path) -> None:
    """Impossible now and for ever is refused; possible but offline waits."""
    worker = ScriptedWorker("one", root / "a", [("Pool", "x")])
    worker.start_errors = [WorkerFailed("no daemon")]
    async with open_bench(root, [worker]) as bench:
        with pytest.raises(NoMatchingWorker):
            await bench.execute(shell("x", platform={"Pool": "y"}))
        operation = await bench.execute(shell("x", platform={"Pool": "x"}))
        await steps(20)
        assert operation.execution.stage is Stage.QUEUED


# ---- places, names and memory ------------------------------------------------------------------------------------


async def test_places_in_the_queue_are_given_back(root: Path, worker: ScriptedWorker) -> None:
    """By whatever way an execution leaves: begun, failed in preparation, cancelled while waiting."""
    policy = dataclasses.replace(POLICY, abandoned_grace_s=0)
    async with open_bench(root, [worker], max_queue_size=2, policy=policy) as bench:
        for _ in range(3):
            running = await bench.submit(shell("x"))
            await worker.began()
            bad = await bench.submit(shell("x", working_directory="missing"))
            assert (await bad).error is not None
            waiting = [await bench.submit(shell(f"{i}")) for i in range(2)]
            with pytest.raises(QueueFull):
                await bench.execute(shell("late"))
            for task in waiting:
                task.cancel()
            await steps(20)
            worker.end()
            assert ok(await running)


async def test_a_finished_execution_keeps_only_what_its_clients_need(root: Path, worker: ScriptedWorker) -> None:
    """Commands can be megabytes, and records live for minutes."""
    async with open_bench(root, [worker]) as bench:
        operation = await bench.execute(shell("x"))
        task = bench.watch(operation)
        await worker.began()
        worker.end()
        await task
        assert (operation.execution.spec, operation.execution.tree) == (None, None)


async def test_the_oldest_finished_operations_go_when_there_are_too_many(
    root: Path, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound on memory; their clients start over, and find the cache."""
    monkeypatch.setattr(operations_module, "MAX_FINISHED", 3)
    async with open_bench(root, [worker]) as bench:
        action = shell("x")
        task = await bench.submit(action)
        await worker.began()
        worker.end()
        await task
        names = [(await bench.execute(action)).name for _ in range(5)]
        for name in names[:2]:
            with pytest.raises(OperationNotFound):
                bench.manager.operation(name)
        for name in names[2:]:
            assert bench.manager.operation(name).execution.outcome is not None


# ---- storage that fails ------------------------------------------------------------------------------------------


class FullActionCache(MemoryActionCache):
    """Takes nothing."""

    async def put(self, key: ActionKey, result: ActionResult, *, invocation_id: str = "") -> None:
        raise StorageFull("no space left")


async def test_EXE_34_a_cache_that_cannot_be_written_does_not_spoil_a_result(
    root: Path, worker: ScriptedWorker
) -> None:
    """Logged, and the client has its outputs."""
    async with open_bench(root, [worker], action_cache=FullActionCache()) as bench:
        assert ok(await run_one(bench, worker))


class ForgetfulStore(MemoryBlobStore):
    """Loses a blob between the check and the use of it."""

    def place(self, *args: object, **kwargs: object) -> None:
        self._blobs.clear()
        super().place(*args, **kwargs)  # type: ignore[arg-type]


async def test_EXE_03_an_input_evicted_while_waiting_is_missing(root: Path, worker: ScriptedWorker) -> None:
    """Reported as MISSING, so that the client uploads it again; the command never starts."""
    async with open_bench(root, [worker], blobs=ForgetfulStore()) as bench:
        outcome = await (await bench.submit(shell("x", inputs={"f": b"content"})))
        assert isinstance(outcome.error, MissingBlobs)
        assert [digest.size_bytes for digest in outcome.error.digests] == [7]
        assert worker.runs == []


class FullStore(MemoryBlobStore):
    """Has no room for outputs."""

    def ingest(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        raise StorageFull("no space left")


async def test_OUT_18_outputs_that_cannot_be_stored_are_an_error_not_a_result(
    root: Path, worker: ScriptedWorker
) -> None:
    """Never a result that names what is not there."""
    async with open_bench(root, [worker], blobs=FullStore()) as bench:
        outcome = await run_one(bench, worker)
        assert outcome.error is not None
        assert (outcome.error.code, outcome.result) == (Code.RESOURCE_EXHAUSTED, None)


async def test_EXE_20_what_is_cached_and_what_is_not(root: Path, worker: ScriptedWorker) -> None:
    """Exit code 0, no error, and caching not refused."""
    async with open_bench(root, [worker]) as bench:
        for action, result, cached in (
            (shell("a"), RunResult(0), True),
            (shell("b"), RunResult(1), False),
            (shell("c"), RunResult(0, timed_out=True), False),
            (shell("d", do_not_cache=True), RunResult(0), False),
        ):
            task = await bench.submit(action)
            await worker.began()
            worker.end(result)
            await task
            found = await bench.action_cache.get(ActionKey("", from_message(action.digest)))
            assert (found is not None) is cached


async def test_skip_cache_lookup_takes_over_what_later_calls_join(root: Path) -> None:
    """An old run in flight is left to those who joined it; plain calls join the new one."""
    old, new = ScriptedWorker("old", root / "a"), ScriptedWorker("new", root / "b")
    async with open_bench(root, [old, new]) as bench:
        action = shell("x")
        first = await bench.submit(action)
        await old.began()
        second = await bench.submit(action, skip_cache_lookup=True)
        await new.began()
        third = await bench.execute(action)
        assert third.execution.worker == "new"
        old.end()
        assert ok(await first)
        fourth = await bench.manager.execute(ExecuteCall("", from_message(action.digest), skip_cache_lookup=False))
        assert fourth.execution.outcome is not None or fourth.execution is third.execution
        new.end()
        assert ok(await second)
