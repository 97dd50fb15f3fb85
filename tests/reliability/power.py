"""Power cuts: the store lies in a disk image that is copied at random moments; the copy is what a cut leaves.

    python -m tests.reliability.power --cuts 500 --durability strict

What the kernel had not written at that moment is not in the copy. Nothing damaged may be served from it, and with
`strict` nothing that was acknowledged before the moment may be gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.crash import server_config
from tests.reliability.load import History, Load, check_everything, summary
from tests.support.files import scratch_directory
from tests.support.require import require_tool, unavailable
from tests.support.server import ReServer

_IMAGE_BYTES = 192 << 20


@dataclass
class Report:
    """What a run did, and what it found. gone: blobs acknowledged before a cut and missing after it."""

    cuts: int = 0
    gone: int = 0
    acknowledged: int = 0
    at_risk: int = 0
    history: History = field(default_factory=History)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.cuts} cuts in {self.seconds:.0f} s, {self.at_risk} of them noticed; of {self.acknowledged} blobs "
            f"acknowledged before a cut {self.gone} were gone after it\n{summary(self.history)}"
        )


async def run(directory: Path, cuts: int, seed: int, durability: str) -> Report:
    """Load a server whose store is in an image, cut the power `cuts` times, and serve what is left each time."""
    report, rng, start = Report(), random.Random(seed), time.monotonic()
    image = directory / "image"
    make_image(image)
    with mounted(image, directory / "disk") as disk:
        server = ReServer(directory / "server", server_config(disk, durability), start_timeout_s=120)
        history = report.history
        await asyncio.to_thread(server.start)
        try:
            for _ in range(cuts):
                load = Load(history, rng)
                working = asyncio.create_task(load.run(server.address))
                await load.is_busy.wait()
                await asyncio.sleep(rng.uniform(0, 0.25))
                if rng.random() < 0.5:  # what the kernel does every half minute
                    await asyncio.to_thread(subprocess.run, ["sync", "--file-system", str(disk)], check=True)
                await asyncio.sleep(rng.uniform(0, 0.25))
                before = History(blobs=dict(history.blobs), actions=dict(history.actions))
                await asyncio.to_thread(copy_image, server.pid, image, directory / "copy")
                working.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await working
                await _serve_copy(directory, report, before, durability)
        finally:
            await asyncio.to_thread(server.kill)
    report.seconds = time.monotonic() - start
    return report


async def _serve_copy(directory: Path, report: Report, before: History, durability: str) -> None:
    with mounted(directory / "copy", directory / "disk-copy") as disk:
        config = server_config(disk, durability)
        for store in ("cas", "action-cache"):
            _reboot(disk / "state" / store)
        with ReServer(directory / "server-copy", config, start_timeout_s=120) as server:
            report.gone += await check_everything(server.address, before, may_be_lost=True)
            report.at_risk += bool(server.events("storage.at_risk"))
        report.cuts += 1
        report.acknowledged += len(before.blobs)
        report.history.corrupt += before.corrupt
        report.history.broken_hits += before.broken_hits


def _reboot(root: Path) -> None:
    """Make the store of the copy belong to another boot of the machine, which a real cut would have ended."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        state = json.loads((root / "STATE").read_text())
        (root / "STATE").write_text(json.dumps({**state, "boot_id": "before the cut"}))


def make_image(path: Path, size_bytes: int = _IMAGE_BYTES) -> None:
    """Make an empty ext4 file system in a file."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run([require_tool("mkfs.ext4"), "-q", "-m", "0", str(path)], check=True, timeout=120)


def copy_image(pid: int, image: Path, target: Path) -> None:
    """Copy what is on the disk at one moment; the journal in it is replayed when it is mounted.

    The server is stopped while we copy, in the middle of whatever it does. The kernel is not, and may write what it has
    at any time; a copy during which it did is none of one moment, and is made again.
    """
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(100):
            shutil.copyfile(image, target)
            if filecmp.cmp(image, target, shallow=False):
                return
        raise AssertionError("the disk never held still")
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def mounted(image: Path, where: Path) -> Iterator[Path]:
    """Mount an image."""
    where.mkdir(exist_ok=True)
    mount = [require_tool("mount"), "-o", "loop", str(image), str(where)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        unavailable(f"cannot mount a disk image: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run([require_tool("umount"), "-l", str(where)], check=True, timeout=60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--durability", choices=["none", "ordered", "strict"], default="strict")
    options = parser.parse_args()
    with scratch_directory("expbuild-power-") as directory:
        report = asyncio.run(run(directory, options.cuts, options.seed, options.durability))
    sys.stdout.write(f"{report}\n")
    lost = options.durability == "strict" and report.gone > 0
    return 1 if lost or any(report.history.faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
