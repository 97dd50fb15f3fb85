"""What the queue costs: decisions of the scheduler alone, and of the whole pool with workers that do nothing.

python -m benchmarks.scheduling
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
import tracemalloc

import structlog

from expbuild.digest import Digest, DigestFunction
from expbuild.execution.action import ActionSpec, CommandSpec
from expbuild.execution.execution import Execution
from expbuild.execution.pool import PoolPolicy, WorkerPool
from expbuild.execution.resources import NOTHING, Capacity
from expbuild.execution.scheduler import QueuedAction, Scheduler, WorkerView
from expbuild.platform_properties import WorkerProperties

WORKERS = 64
BUILDS = 200
PROPERTIES = WorkerProperties([("OSFamily", "linux"), ("Arch", "x86_64")])
PLATFORM = (("OSFamily", "linux"),)


def pure(queued: int) -> tuple[float, list[float], float]:
    """Return seconds in all, seconds of each decision, and bytes per queued action."""
    names = [f"host-{i}" for i in range(WORKERS)]
    tracemalloc.start()
    scheduler = Scheduler([WorkerView(name, PROPERTIES) for name in names], Capacity())
    for i in range(queued):
        scheduler.add(QueuedAction(f"execution-{i}", PLATFORM, 0, i, build=f"build-{i % BUILDS}", expected_s=i % 97))
    bytes_each = tracemalloc.get_traced_memory()[0] / queued
    tracemalloc.stop()
    decisions = []
    begin = time.perf_counter()
    free = 0
    while len(scheduler):
        start = time.perf_counter()
        scheduler.assign([names[free % WORKERS]], NOTHING, now_s=free / 1000)
        decisions.append(time.perf_counter() - start)
        free += 1
    return time.perf_counter() - begin, decisions, bytes_each


async def whole_pool(queued: int) -> float:
    """Return seconds for the pool to give every queued execution to a worker, and to take it back."""
    digest = Digest.parse("0" * 64, 1, DigestFunction.SHA256)
    command = CommandSpec(
        arguments=("true",), environment={}, working_directory=(), outputs=(), wants_directories=False
    )
    spec = ActionSpec(digest, command, digest, 60.0, False, PLATFORM)

    class Runner:
        async def run(self, execution: Execution, worker: object) -> object:
            await asyncio.sleep(0)
            raise KeyError  # the end of a run, without the making of a result

    class Idle:
        progress = ""

        def __init__(self, name: str) -> None:
            self.name, self.properties = name, PROPERTIES

        async def start(self) -> None: ...

    async with asyncio.TaskGroup() as tasks:
        workers = [Idle(f"host-{i}") for i in range(WORKERS)]
        policy = PoolPolicy(max_queue_size=queued, interval_s=1.0)
        pool = WorkerPool(workers, Runner(), tasks, policy)  # type: ignore[arg-type]  # all that the pool uses of them
        await pool.start()

        async def one(i: int) -> None:
            execution = Execution(f"{i}", "", digest, spec=spec, sequence=i, build=f"build-{i % BUILDS}")
            try:
                await pool.execute(execution)
            except KeyError:
                return

        begin = time.perf_counter()
        await asyncio.gather(*(one(i) for i in range(queued)))
        return time.perf_counter() - begin


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    print(f"{WORKERS} workers, {BUILDS} builds\n")
    print("| queued | decisions/s | p50, µs | p99, µs | longest, µs | bytes per queued action |")
    print("|---:|---:|---:|---:|---:|---:|")
    for queued in (1_000, 10_000, 100_000):
        total, decisions, bytes_each = pure(queued)
        cuts = statistics.quantiles(decisions, n=100)
        print(
            f"| {queued:,} | {queued / total:,.0f} | {cuts[49] * 1e6:.0f} | {cuts[98] * 1e6:.0f} "
            f"| {max(decisions) * 1e6:.0f} | {bytes_each:,.0f} |"
        )
    total = asyncio.run(whole_pool(10_000))
    print(f"\nwhole pool, 10,000 queued: {10_000 / total:,.0f} executions/s")


if __name__ == "__main__":
    main()
