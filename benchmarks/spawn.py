"""What starting a command costs: `python -m benchmarks.spawn`.

An instant command through the spawner at each level of isolation, against a bare posix_spawn from a small process; how
many of them per second with several slots; and what preparing input roots of several sizes costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from expbuild.config_workers import HostWorkerConfig
from expbuild.digest import Digest, DigestFunction
from expbuild.execution.input_root import create_workspace, materialize
from expbuild.execution.input_tree import load_input_tree
from expbuild.reapi import Directory, DirectoryNode, FileNode
from expbuild.storage.base import Sharing, write_blob
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.workers.base import Run
from expbuild.workers.host import HostWorker
from expbuild.workers.spawner_client import Spawner
from expbuild.workers.work_dir import remove_tree
from tests.support.files import scratch_directory

_BARE = """
import os, sys, time
times = []
for _ in range(int(sys.argv[1])):
    started = time.perf_counter()
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    times.append(time.perf_counter() - started)
print(sorted(times)[len(times) // 2] * 1000)
"""
_FILES_PER_DIRECTORY = 100


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="instant commands per figure")
    runs = parser.parse_args().runs
    bare = [sys.executable, "-I", "-S", "-c", _BARE, str(runs)]
    bare_ms = float(subprocess.run(bare, check=True, capture_output=True, text=True).stdout)
    asyncio.run(_measure(runs, bare_ms))


async def _measure(runs: int, bare_ms: float) -> None:
    levels = ("uid", "namespaces") if os.geteuid() == 0 else ("none", "namespaces")
    print(f"bare posix_spawn: {bare_ms:.2f} ms (median of {runs})")
    with scratch_directory("expbuild-benchmark-") as directory:
        for level in levels:
            async with _slots(directory, level, 1) as (worker,):
                times = [await _instant(worker, number) for number in range(runs)]
            median_ms = statistics.median(times) * 1000
            print(f"{level}: {median_ms:.2f} ms, {median_ms / bare_ms:.1f} times")
            for count in (1, 2, 4):
                async with _slots(directory, level, count) as workers:
                    print(f"{level}, {count} slots: {await _per_second(workers, runs):.0f} commands/s")
        for files in (10, 500, 5000):
            await _input_roots(directory, files)


@contextlib.asynccontextmanager
async def _slots(directory: Path, level: str, count: int) -> AsyncIterator[list[HostWorker]]:
    spawner = Spawner()
    config = HostWorkerConfig.model_validate({"work_dir": directory / "work", "isolation": level})
    workers = [HostWorker(f"host-{number}", config, number, spawner) for number in range(count)]
    for worker in workers:
        await worker.start()
    try:
        yield workers
    finally:
        for worker in workers:
            await worker.close()
        await spawner.close()


async def _instant(worker: HostWorker, number: int) -> float:
    workspace = worker.work_dir / f"run-{number}"
    create_workspace(workspace, worker.owner)
    run = Run(("/bin/true",), {}, workspace, "", 60, workspace / "stdout", workspace / "stderr")
    started = time.perf_counter()
    result = await worker.run(run)
    took_s = time.perf_counter() - started
    assert result.exit_code == 0
    remove_tree(workspace)
    return took_s


async def _per_second(workers: list[HostWorker], runs: int) -> float:
    async def slot(worker: HostWorker) -> None:
        for number in range(runs // len(workers)):
            await _instant(worker, number)

    started = time.perf_counter()
    await asyncio.gather(*map(slot, workers))
    return runs // len(workers) * len(workers) / (time.perf_counter() - started)


async def _input_roots(directory: Path, files: int) -> None:
    """Print what preparing an input root costs: the first time, and again, by links and by copies."""
    with ThreadPoolExecutor(4) as executor:
        store = FilesystemBlobStore(directory / f"cas-{files}", [DigestFunction.SHA256], executor)
        root = await _store_tree(store, files)
        tree = await load_input_tree(store, root, absolute_symlinks=True)
        times: dict[str, list[float]] = {"links": [], "copies": []}
        for kind, sharing in (("links", Sharing.LINK), ("copies", Sharing.COPY)):
            for number in range(6):
                workspace = directory / f"{kind}-{number}"
                started = time.perf_counter()
                create_workspace(workspace, None)
                materialize(tree, store, workspace / "root", output_parents=[], owner=None, sharing=sharing)
                times[kind].append(time.perf_counter() - started)
                remove_tree(workspace)
    words = ", ".join(
        f"{kind} {first * 1000:.1f} ms first, {statistics.median(rest) * 1000:.1f} ms again"
        for kind, (first, *rest) in times.items()
    )
    print(f"input root of {files} files: {words}")


async def _store_tree(store: FilesystemBlobStore, files: int) -> Digest:
    root = Directory()
    for start in range(0, files, _FILES_PER_DIRECTORY):
        directory = Directory()
        for number in range(start, min(files, start + _FILES_PER_DIRECTORY)):
            data = f"file {number}\n".encode() * 50
            digest = await _put(store, data)
            directory.files.append(FileNode(name=f"f{number:05}"))
            directory.files[-1].digest.hash, directory.files[-1].digest.size_bytes = digest.hash, digest.size_bytes
        digest = await _put(store, directory.SerializeToString(deterministic=True))
        node = DirectoryNode(name=f"d{start:05}")
        node.digest.hash, node.digest.size_bytes = digest.hash, digest.size_bytes
        root.directories.append(node)
    return await _put(store, root.SerializeToString(deterministic=True))


async def _put(store: FilesystemBlobStore, data: bytes) -> Digest:
    digest = DigestFunction.SHA256.digest_of(data)
    await write_blob(store, digest, data)
    return digest


if __name__ == "__main__":
    main()
