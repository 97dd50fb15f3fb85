"""The CAS in files: what durability and verification cost, and how it does with a million blobs.

python -m benchmarks.storage                      uploads and reads, for each mode
python -m benchmarks.storage --blobs 1000000      a store of so many blobs: start, FindMissing, memory
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from expbuild.digest import Digest, DigestFunction
from expbuild.storage.base import write_blob
from expbuild.storage.files import MTIME_NS, blob_name
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.janitor import Janitor
from expbuild.storage.policy import StorePolicy
from expbuild.storage.root import Durability

SHA256 = DigestFunction.SHA256
SMALL_BYTES = 4096
UPLOADS = 1000
AT_ONCE = 16


def open_store(root: Path, executor: ThreadPoolExecutor, **policy: object) -> FilesystemBlobStore:
    return FilesystemBlobStore(root, [SHA256], executor, StorePolicy(min_free_bytes=0, **policy))  # type: ignore[arg-type]  # each has its type


async def uploads_per_s(root: Path, durability: Durability) -> float:
    """Store small blobs, so many at once as a busy server does."""
    with ThreadPoolExecutor(AT_ONCE) as executor:
        store = open_store(root, executor, durability=durability)
        make_directories(root)
        blobs = [os.urandom(SMALL_BYTES) for _ in range(UPLOADS)]

        async def work(mine: list[bytes]) -> None:
            for data in mine:
                await write_blob(store, SHA256.digest_of(data), data)

        start = time.perf_counter()
        await asyncio.gather(*(work(blobs[n::AT_ONCE]) for n in range(AT_ONCE)))
        return UPLOADS / (time.perf_counter() - start)


def make_directories(root: Path) -> None:
    """Make what the first blobs would: every directory there can be."""
    for number in range(256):
        (root / f"sha256/{number:02x}").mkdir()


async def read_mb_per_s(root: Path, size_bytes: int, *, verify: bool) -> float:
    """Read one blob again and again, from the page cache."""
    with ThreadPoolExecutor(2) as executor:
        store = open_store(root, executor, verify_on_read=verify)
        data = os.urandom(size_bytes)
        digest = SHA256.digest_of(data)
        await write_blob(store, digest, data)
        total, start = 0, time.perf_counter()
        while time.perf_counter() - start < 1.0:
            async for chunk in store.read(digest):
                total += len(chunk)
        return total / (time.perf_counter() - start) / 1e6


def fill(root: Path, count: int) -> list[Digest]:
    """Make `count` files that look like blobs, as fast as the disk takes them; return some of them."""
    sample = []
    root.mkdir()
    for number in range(count):
        digest = Digest(hashlib.sha256(number.to_bytes(8)).hexdigest(), 1, SHA256)
        path = root / blob_name(digest)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o444)
        except FileNotFoundError:
            path.parent.mkdir(parents=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o444)
        os.write(fd, b"x")
        os.utime(fd, ns=(time.time_ns(), MTIME_NS))
        os.close(fd)
        if number % 97 == 0:
            sample.append(digest)
    return sample


async def big_store(root: Path, count: int) -> None:
    start = time.perf_counter()
    sample = fill(root, count)
    print(f"made {count} files in {time.perf_counter() - start:.0f} s")
    with ThreadPoolExecutor(4) as executor:
        before = _rss_mib()
        start = time.perf_counter()
        store = open_store(root, executor)
        print(f"opened in {(time.perf_counter() - start) * 1000:.1f} ms")
        janitor = Janitor(store.root, store.policy, store.budget)
        start = time.perf_counter()
        counting = asyncio.create_task(asyncio.to_thread(janitor.scan, lambda worked_s: time.sleep(4 * worked_s)))
        print(f"FindMissing of 100 digests while it is counted: {await find_missing_ms(store, sample)}")
        scan = await counting
        print(f"counted {scan.entries} entries in {time.perf_counter() - start:.0f} s, a fifth of it at work")
        print(f"FindMissing of 100 digests afterwards: {await find_missing_ms(store, sample)}")
        start = time.perf_counter()
        await asyncio.to_thread(janitor.scan, None, 50_000)
        print(f"looked for the oldest in {time.perf_counter() - start:.1f} s")
        print(f"memory: {_rss_mib() - before:.0f} MiB more than before it was opened")


async def find_missing_ms(store: FilesystemBlobStore, sample: list[Digest]) -> str:
    times = []
    for _ in range(500):
        digests = random.sample(sample, 100)
        start = time.perf_counter()
        await store.find_missing(digests)
        times.append((time.perf_counter() - start) * 1000)
        await asyncio.sleep(0)
    return f"p50 {statistics.median(times):.2f} ms, p99 {statistics.quantiles(times, n=100)[98]:.2f} ms"


def _rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def compare(root: Path) -> None:
    rates = {mode: await uploads_per_s(root / mode.value, mode) for mode in Durability}
    for mode, rate in rates.items():
        part = rate / rates[Durability.NONE]
        print(f"uploads of {SMALL_BYTES} bytes, {AT_ONCE} at once, {mode.value}: {rate:.0f}/s ({part:.2f})")
    for size_bytes in (SMALL_BYTES, 256 << 10, 4 << 20, 64 << 20):
        plain = await read_mb_per_s(root / "reads", size_bytes, verify=False)
        verified = await read_mb_per_s(root / "reads", size_bytes, verify=True)
        part = verified / plain
        print(f"reads of {size_bytes} bytes: {plain:.0f} MB/s plain, {verified:.0f} MB/s verified ({part:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blobs", type=int, help="measure a store of so many blobs")
    parser.add_argument("--directory", type=Path, help="where to make the stores; a temporary directory otherwise")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="expbuild-bench-", dir=options.directory))
    try:
        asyncio.run(big_store(directory / "cas", options.blobs) if options.blobs else compare(directory))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
