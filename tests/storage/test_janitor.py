"""Making room: the oldest promise first, none that was renewed, and nothing that fits is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import StorageFull
from expbuild.reapi import ActionResult
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import ActionKey, Sharing, read_blob, write_blob
from expbuild.storage.caretaker import Caretaker
from expbuild.storage.files import MTIME_NS, blob_name
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.janitor import Janitor
from expbuild.storage.policy import StorePolicy
from tests.storage.conftest import files_below
from tests.support.require import require_tool, unavailable
from tests.support.server import wait_until

SHA256 = DigestFunction.SHA256
KIB = 1024
HOUR_S = 3600.0


def make(root: Path, executor: Executor, **policy: float | int | None) -> tuple[FilesystemBlobStore, Janitor]:
    """Return a store that a janitor looks after."""
    blobs = FilesystemBlobStore(root, [SHA256], executor, StorePolicy(**{"min_free_bytes": 0, **policy}))  # type: ignore[arg-type]  # each has its type
    janitor = Janitor(blobs.root, blobs.policy, blobs.budget)
    blobs.budget.make_room = janitor.make_room
    return blobs, janitor


async def store(blobs: FilesystemBlobStore, number: int, size_bytes: int = 60 * KIB) -> Digest:
    data = number.to_bytes(4) + bytes(size_bytes - 4)
    digest = SHA256.digest_of(data)
    await write_blob(blobs, digest, data)
    return digest


def age(blobs: FilesystemBlobStore, digest: Digest, age_s: float) -> None:
    """Make a blob's promise so old."""
    path = blobs.root.path / blob_name(digest)
    os.utime(path, ns=(time.time_ns() - int(age_s * 10**9), MTIME_NS))


def stored(blobs: FilesystemBlobStore, digests: list[Digest]) -> list[int]:
    """Return the numbers of those that are there, without renewing them."""
    return [n for n, digest in enumerate(digests) if (blobs.root.path / blob_name(digest)).exists()]


class TestSizeLimit:
    async def test_the_oldest_go_first_and_what_is_promised_stays(self, tmp_path: Path, executor: Executor) -> None:
        blobs, janitor = make(tmp_path, executor, max_size_bytes=680 * KIB)
        digests = [await store(blobs, number) for number in range(10)]  # 64 KiB each, with its inode
        for number, digest in enumerate(digests):
            age(blobs, digest, HOUR_S * (20 - number if number < 6 else 1))
        new = [await store(blobs, number) for number in range(100, 104)]
        assert stored(blobs, new) == [0, 1, 2, 3]
        left = stored(blobs, digests)
        assert left[-4:] == [6, 7, 8, 9]
        assert left == list(range(left[0], 10)), "oldest first"
        assert janitor.broken_promises == 0
        assert blobs.budget.used_bytes <= 680 * KIB

    async def test_counting_agrees_with_the_disk(self, tmp_path: Path, executor: Executor) -> None:
        blobs, janitor = make(tmp_path, executor)
        digests = [await store(blobs, number, 5000 + number) for number in range(20)]
        counted = blobs.budget.used_bytes, blobs.budget.used_files
        scan = janitor.scan()
        assert (scan.size_bytes, scan.files) == counted
        on_disk = sum((tmp_path / blob_name(digest)).stat().st_blocks * 512 + 4096 for digest in digests)
        assert scan.size_bytes == on_disk

    async def test_broken_promise_is_the_last_resort_and_is_told(self, tmp_path: Path, executor: Executor) -> None:
        blobs, janitor = make(tmp_path, executor, max_size_bytes=400 * KIB)
        digests = [await store(blobs, number) for number in range(6)]
        for digest in digests:
            age(blobs, digest, HOUR_S)
        await store(blobs, 100)
        assert janitor.broken_promises == 1
        assert janitor.shortest_promise_s == pytest.approx(HOUR_S, abs=60)

    async def test_what_was_promised_minutes_ago_is_kept_and_the_upload_refused(
        self, tmp_path: Path, executor: Executor
    ) -> None:
        blobs, _ = make(tmp_path, executor, max_size_bytes=400 * KIB)
        digests = [await store(blobs, number) for number in range(6)]
        with pytest.raises(StorageFull, match=r"the store is full \(storage\.cas\.max_size_bytes = 409600\)"):
            await store(blobs, 100)
        assert stored(blobs, digests) == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("size_bytes", [500 * KIB, 1 << 50])
    async def test_claim_that_can_never_fit_is_refused_before_a_byte_is_written(
        self, tmp_path: Path, executor: Executor, size_bytes: int
    ) -> None:
        blobs, _ = make(tmp_path, executor, max_size_bytes=400 * KIB)
        for _ in range(20):
            writer = blobs.open_writer(Digest("ab" * 32, size_bytes, SHA256))
            with pytest.raises(StorageFull):
                await writer.write(b"first")
            await writer.close()
        await store(blobs, 1)

    async def test_claims_of_uploads_in_progress_count_until_they_end(self, tmp_path: Path, executor: Executor) -> None:
        blobs, janitor = make(tmp_path, executor, max_size_bytes=1000 * KIB)
        writer = blobs.open_writer(Digest("ab" * 32, 700 * KIB, SHA256))
        await writer.write(b"first")
        other = blobs.open_writer(Digest("cd" * 32, 700 * KIB, SHA256))
        with pytest.raises(StorageFull):
            await other.write(b"first")
        await writer.close()
        janitor._fails_until = 0.0  # at once, not in a second
        await other.write(b"first")
        await other.close()
        assert blobs.budget.used_bytes == 0
        assert not blobs.budget.shortage(900 * KIB)

    async def test_an_evicted_blob_takes_its_executable_variant_with_it(
        self, tmp_path: Path, executor: Executor
    ) -> None:
        blobs, janitor = make(tmp_path / "cas", executor)
        digest = await store(blobs, 1)
        (tmp_path / "inputs").mkdir()
        fd = os.open(tmp_path / "inputs", os.O_RDONLY)
        blobs.place(digest, fd, "f", executable=True, sharing=Sharing.LINK)
        os.close(fd)
        age(blobs, digest, HOUR_S)
        janitor.evict_before(time.time_ns())
        assert files_below(tmp_path / "cas") == set()
        assert blobs.budget.used_bytes == 0


class TestRenewal:
    async def test_renewed_in_the_last_moment_it_is_put_back(self, tmp_path: Path, executor: Executor) -> None:
        blobs, janitor = make(tmp_path, executor)
        digest = await store(blobs, 1)
        age(blobs, digest, 5 * HOUR_S)
        (candidate,) = janitor.scan(keep=10).oldest
        assert await blobs.find_missing([digest]) == set()
        assert not janitor.evict(candidate)
        assert files_below(tmp_path) == {blob_name(digest)}
        await read_blob(blobs, digest)

    async def test_storm_takes_nothing_that_was_promised(self, tmp_path: Path, executor: Executor) -> None:
        """FindMissing says "present" while everything old is being evicted: what it said holds."""
        blobs, janitor = make(tmp_path, executor, min_age_s=0.0)
        digests = [await store(blobs, number, 100) for number in range(300)]
        promised: set[Digest] = set()
        for _ in range(5):
            for digest in digests:
                if (tmp_path / blob_name(digest)).exists() and digest not in promised:
                    age(blobs, digest, HOUR_S)
            eviction = asyncio.create_task(asyncio.to_thread(janitor.evict_before, time.time_ns() - 10**10))
            while not eviction.done():
                for digest in digests[::3]:
                    if await blobs.find_missing([digest]) == set():
                        promised.add(digest)
                    await asyncio.sleep(0)
            await eviction
            for digest in promised:
                assert await blobs.find_missing([digest]) == set()


class TestActionResults:
    async def test_results_older_than_evicted_blobs_go_too(self, tmp_path: Path, executor: Executor) -> None:
        blobs = FilesystemBlobStore(
            tmp_path / "cas", [SHA256], executor, StorePolicy(max_size_bytes=400 * KIB, min_free_bytes=0)
        )
        cache = FilesystemActionCache(tmp_path / "ac")
        with Caretaker(blobs, cache):
            for number in range(3):
                await cache.put(ActionKey("", SHA256.digest_of(b"%d" % number)), ActionResult(exit_code=number))
            names = sorted(files_below(tmp_path / "ac"))
            old = time.time_ns() - int(20 * HOUR_S * 10**9)
            os.utime(tmp_path / "ac" / names[0], ns=(old - 10**9, MTIME_NS))
            for number in range(6):
                age(blobs, await store(blobs, number), 20 * HOUR_S if number < 3 else 0)
            await store(blobs, 100)
            await asyncio.to_thread(
                wait_until, lambda: sorted(files_below(tmp_path / "ac")) == names[1:], timeout_s=60, what="one went"
            )

    async def test_status_counts(self, tmp_path: Path, executor: Executor) -> None:
        blobs = FilesystemBlobStore(tmp_path / "cas", [SHA256], executor)
        caretaker = Caretaker(blobs, None)
        await store(blobs, 1, 5000)
        with caretaker:
            await asyncio.to_thread(
                wait_until, lambda: caretaker.status()[0].entries is not None, timeout_s=60, what="counted"
            )
            (status,) = caretaker.status()
        assert (status.entries, status.used_bytes, status.is_owner, status.is_at_risk) == (1, 12288, True, False)
        assert (status.broken_promises, status.quarantined) == (0, 0)


@pytest.fixture(params=["tmpfs", "tmpfs-inodes", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB, or with 400 inodes."""
    path = tmp_path / "disk"
    path.mkdir()
    if request.param == "ext4":
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run([require_tool("mkfs.ext4"), "-q", "-m", "0", str(image)], check=True, timeout=60)
        mount = [require_tool("mount"), "-o", "loop", str(image), str(path)]
    else:
        limit = "size=16m" if request.param == "tmpfs" else "size=64m,nr_inodes=400"
        mount = [require_tool("mount"), "-t", "tmpfs", "-o", limit, "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        unavailable(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run([require_tool("umount"), "-l", str(path)], check=True, timeout=30)


async def fill(blobs: FilesystemBlobStore, first: int) -> tuple[list[Digest], str]:
    """Store blobs until one is refused; return them, and what the refusal says."""
    digests: list[Digest] = []
    while len(digests) < 1000:
        number = first + len(digests)
        try:
            digests.append(await store(blobs, number, 200 * KIB if number % 2 else 100))
        except StorageFull as error:
            return digests, str(error)
    raise AssertionError("the disk never filled")


def fill_with_foreign_files(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(1000):
            (directory / str(number)).write_bytes(bytes(64 * KIB))


class TestFullDisk:
    async def test_cycles_of_a_full_disk(self, small_disk: Path, executor: Executor) -> None:
        """Uploads go on as long as something old can go; what cannot fit is refused, and room helps at once."""
        blobs, janitor = make(small_disk / "cas", executor, min_free_bytes=None)
        for cycle in range(10):
            digests, refusal = await fill(blobs, cycle * 1000)
            assert " left on the storage device; " in refusal
            assert len(digests) > 20
            assert stored(blobs, digests) == list(range(len(digests))), "nothing promised just now has gone"
            await read_blob(blobs, digests[-1])
            for digest in digests:
                age(blobs, digest, 5 * HOUR_S)
            janitor._fails_until = 0.0  # at once, not in a second
            await store(blobs, cycle * 1000 + 999)
        assert janitor.broken_promises == 0
        blobs.root.close()  # so that the disk can go

    async def test_foreign_files_that_fill_the_disk_are_waited_out(self, small_disk: Path, executor: Executor) -> None:
        blobs, janitor = make(small_disk / "cas", executor)
        await store(blobs, 1)
        (small_disk / "foreign").mkdir()
        fill_with_foreign_files(small_disk / "foreign")
        with pytest.raises(StorageFull):
            await store(blobs, 2)
        subprocess.run(["rm", "-rf", str(small_disk / "foreign")], check=True, timeout=60)
        janitor._fails_until = 0.0  # at once, not in a second
        blobs.budget.removed(0, 0)  # look at the disk now, not in two seconds
        await store(blobs, 2)
        blobs.root.close()
