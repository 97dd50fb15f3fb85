"""How long an instant action takes from Execute to done, what an idle server costs, and what a thousand waiters do.

    python -m benchmarks.dispatch

from the top of the repository, as root or not: isolation is `uid` as root, `none` otherwise.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path

from expbuild.reapi import ExecutedActionMetadata, FindMissingBlobsRequest
from tests.support.actions import Client, Stream, build_action, shell
from tests.support.files import scratch_directory
from tests.support.server import ReServer, host_pool_config

ACTIONS = 200
WAITERS = 1000
WATCHED_S = 10.0

PARTS = (
    ("queue", "queued", "worker_start"),
    ("input root", "input_fetch_start", "input_fetch_completed"),
    ("command", "execution_start", "execution_completed"),
    ("outputs", "output_upload_start", "output_upload_completed"),
)


def milliseconds(metadata: ExecutedActionMetadata, begin: str, end: str) -> float:
    first, last = (getattr(metadata, f"{name}_timestamp").ToNanoseconds() for name in (begin, end))
    return float(last - first) / 1e6


async def dispatch(server: ReServer) -> None:
    """Run instant actions one after the other; print the median of the whole and of its parts."""
    whole: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name, _, _ in PARTS}
    async with Client(server.address) as client:
        for i in range(ACTIONS + 20):
            action = build_action(("/bin/true",), salt=os.urandom(8))
            await client.upload(action.blobs)
            began = time.perf_counter()
            finished = await client.call(action).finish()
            elapsed = (time.perf_counter() - began) * 1000
            if i < 20:  # the first ones warm things up
                continue
            whole.append(elapsed)
            for name, begin, end in PARTS:
                parts[name].append(milliseconds(finished.result.execution_metadata, begin, end))
    medians = {name: statistics.median(times) for name, times in parts.items()}
    total = statistics.median(whole)
    print("| part of an instant action | p50, ms |\n|---|---:|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} |")
    print(f"| RPC, look-ups, cache entry | {total - sum(medians.values()):.2f} |")
    print(f"| **Execute to done** | **{total:.2f}** (p99 {statistics.quantiles(whole, n=100)[98]:.1f}) |")


async def find_missing_ms(client: Client, until_s: float) -> list[float]:
    """Ask small questions until a time; return how long each took."""
    times = []
    request = FindMissingBlobsRequest(blob_digests=[shell("true").digest])
    while time.perf_counter() < until_s:
        began = time.perf_counter()
        await client.cas.FindMissingBlobs(request, timeout=60)
        times.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.01)
    return times


def memory_mib(server: ReServer) -> float:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024


async def waiters(server: ReServer) -> None:
    """Let a thousand streams wait, each for an action of its own behind one that does not end."""
    async with Client(server.address) as client, Client(server.address) as other:
        idle_cpu = server.own_cpu_seconds()
        await asyncio.sleep(WATCHED_S)
        idle_cpu = server.own_cpu_seconds() - idle_cpu
        alone = await find_missing_ms(other, time.perf_counter() + 3)
        before = memory_mib(server)
        busy = [await client.start(shell("sleep 600")) for _ in range(2)]
        began = time.perf_counter()
        waiting: list[Stream] = [await client.start(shell("true")) for _ in range(WAITERS)]
        started_s = time.perf_counter() - began
        after, cpu = memory_mib(server), server.own_cpu_seconds()
        beside = await find_missing_ms(other, time.perf_counter() + WATCHED_S)
        cpu = server.own_cpu_seconds() - cpu
        for stream in (*waiting, *busy):
            stream.drop()
    print(f"\nidle: {idle_cpu / WATCHED_S:.2%} of a core over {WATCHED_S:.0f} s, {before:.0f} MiB")
    print(f"{WAITERS} waiting Execute streams (opened in {started_s:.1f} s): {after - before:.0f} MiB more,")
    print(f"{cpu / WATCHED_S:.1%} of a core while 100 small questions a second are asked;")
    without, with_them = statistics.median(alone), statistics.median(beside)
    print(f"FindMissingBlobs p50 {without:.1f} ms without them, {with_them:.1f} ms beside them")


def main() -> None:
    with scratch_directory("expbuild-dispatch-") as directory:
        config = host_pool_config(directory / "state")
        config["execution"]["pool"]["max_queue_size"] = 2 * WAITERS
        with ReServer(directory / "server", config) as server:
            asyncio.run(dispatch(server))
            asyncio.run(waiters(server))


if __name__ == "__main__":
    main()
