"""The crash runner: a server under load is killed at random moments, and held to everything it has acknowledged.

    python -m tests.reliability.crash --kills 2000 --seed 7 --durability ordered

A kill is not a power cut: the kernel has what was written. So nothing acknowledged may be lost, in any durability.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.load import WRITES, History, Load, check_everything, summary
from tests.support.files import scratch_directory
from tests.support.processes import process_tree
from tests.support.server import Config, ReServer, host_pool_config, wait_until

_SAMPLE_EVERY = 10
"""So often everything is read back; in between, the load itself reads what it was told before."""


@dataclass
class Report:
    """What a run did, and what it found. kills_inside: by how many calls of each kind were cut off."""

    seed: int
    kills: int = 0
    kills_inside_a_write: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    history: History = field(default_factory=History)
    leftovers: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        return (
            f"seed {self.seed}: {self.kills} kills in {self.seconds:.0f} s, {self.kills_inside_a_write} inside an "
            f"upload, an execution or a cache write (cut off: {kinds})\n{summary(self.history)}\n"
            f"left behind: {self.leftovers or 'nothing'}"
        )

    @property
    def is_clean(self) -> bool:
        return not self.leftovers and not any(self.history.faults.values())


def server_config(root: Path, durability: str) -> Config:
    config = host_pool_config(root / "state")
    for store in ("cas", "action_cache"):
        config["storage"][store]["durability"] = durability
    return config


async def run(directory: Path, kills: int, seed: int, durability: str) -> Report:
    """Start, load, kill, start again, `kills` times; then read everything and look for what was left behind."""
    report, rng, start = Report(seed), random.Random(seed), time.monotonic()
    server = ReServer(directory / "server", server_config(directory, durability), start_timeout_s=120)
    try:
        await _kill_again_and_again(server, report, kills, rng)
        await asyncio.to_thread(server.start)
        await check_everything(server.address, report.history)
        await asyncio.to_thread(server.terminate)
    finally:
        await asyncio.to_thread(server.kill)
    report.leftovers += leftovers(directory / "state")
    report.seconds = time.monotonic() - start
    return report


async def _kill_again_and_again(server: ReServer, report: Report, kills: int, rng: random.Random) -> None:
    for number in range(kills):
        await asyncio.to_thread(server.start)
        if number % _SAMPLE_EVERY == _SAMPLE_EVERY - 1:
            await check_everything(server.address, report.history)
        load = Load(report.history, rng)
        working = asyncio.create_task(load.run(server.address))
        await load.is_busy.wait()
        await asyncio.sleep(rng.uniform(0, 0.15))
        await _kill(server, report, load)
        await working


async def _kill(server: ReServer, report: Report, load: Load) -> None:
    """Kill the server, and see that all it had started ends by itself."""
    started = [process for process in process_tree(server.pid) if process.pid != server.pid]
    os.kill(server.pid, signal.SIGKILL)
    kinds = list(load.in_flight.values())
    report.kills += 1
    report.kinds.update(kinds)
    report.kills_inside_a_write += any(kind in WRITES for kind in kinds)
    try:
        await asyncio.to_thread(
            wait_until, lambda: not any(p.is_alive() for p in started), timeout_s=60, what="its processes have ended"
        )
    except AssertionError:
        report.leftovers += [f"process {process.pid}" for process in started if process.is_alive()]
    await asyncio.to_thread(server.kill)


def leftovers(state: Path) -> list[str]:
    """Return what no server should leave behind: temporary files, work directories, damaged blobs."""
    places = [state / store / name for store in ("cas", "action-cache") for name in ("tmp", "quarantine")]
    found = [str(path) for place in places if place.exists() for path in place.iterdir()]
    return found + [str(path) for path in (state / "work").glob("*/*")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--durability", choices=["none", "ordered", "strict"], default="none")
    options = parser.parse_args()
    with scratch_directory("expbuild-crash-") as directory:
        report = asyncio.run(run(directory, options.kills, options.seed, options.durability))
    sys.stdout.write(f"{report}\n")
    for name, found in report.history.faults.items():
        sys.stdout.writelines(f"{name}: {fault}\n" for fault in found[:20])
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
