"""Damaged blobs are never handed out: they are put aside, are missing from then on, and heal by being stored again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from threading import Event

import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobDamaged, BlobNotFound
from expbuild.reapi import ActionResult, OutputFile
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import CHUNK_BYTES, ActionKey, Sharing, read_blob, write_blob
from expbuild.storage.complete import CompleteActionCache
from expbuild.storage.files import MTIME_NS, blob_name
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.janitor import Janitor
from expbuild.storage.policy import StorePolicy
from expbuild.storage.scrubber import Scrubber
from tests.storage.conftest import FUNCTIONS, files_below
from tests.storage.test_root import reboot

SHA256 = DigestFunction.SHA256
SMALL = b"a small blob"
MIDDLE = b"middle" * 100_000
LARGE = b"large " * (CHUNK_BYTES // 2)
ALL = pytest.mark.parametrize("data", [SMALL, MIDDLE, LARGE], ids=["small", "middle", "large"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cas"


@pytest.fixture
def blobs(root: Path, executor: Executor) -> FilesystemBlobStore:
    return make(root, executor)


def make(root: Path, executor: Executor, *, verify_on_read: bool = True, scrub: int = 0) -> FilesystemBlobStore:
    policy = StorePolicy(min_free_bytes=0, verify_on_read=verify_on_read, scrub_bytes_per_s=scrub)
    return FilesystemBlobStore(root, FUNCTIONS, executor, policy)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "inputs").mkdir()
    fd = os.open(tmp_path / "inputs", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


async def store(blobs: FilesystemBlobStore, data: bytes) -> Digest:
    digest = SHA256.digest_of(data)
    await write_blob(blobs, digest, data)
    return digest


def flip(path: Path, *, silently: bool) -> None:
    """Flip one bit in the middle of a file; `silently`, as a disk does it: no time changes."""
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    seen = path.stat()
    path.write_bytes(data)
    if silently:
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def quarantined(root: Path) -> list[str]:
    return [name for name in files_below(root) if name.startswith("quarantine/")]


async def read_until_error(blobs: FilesystemBlobStore, digest: Digest) -> tuple[bytes, Exception | None]:
    got = b""
    try:
        async for chunk in blobs.read(digest):
            got += chunk
    except (BlobNotFound, BlobDamaged) as error:
        return got, error
    return got, None


class TestRunning:
    """Bits flip while the server runs."""

    @ALL
    @pytest.mark.parametrize("silently", [True, False])
    async def test_a_whole_read_never_ends_well_and_heals(
        self, blobs: FilesystemBlobStore, root: Path, data: bytes, silently: bool
    ) -> None:
        digest = await store(blobs, data)
        flip(root / blob_name(digest), silently=silently)
        got, error = await read_until_error(blobs, digest)
        assert len(got) < len(data)
        assert isinstance(error, BlobDamaged if got else BlobNotFound)
        assert await blobs.find_missing([digest]) == {digest}
        assert len(quarantined(root)) == 1
        await store(blobs, data)
        assert await read_blob(blobs, digest) == data

    async def test_a_whole_blob_in_memory_is_not_found_rather_than_torn(
        self, blobs: FilesystemBlobStore, root: Path
    ) -> None:
        digest = await store(blobs, LARGE)
        flip(root / blob_name(digest), silently=True)
        with pytest.raises(BlobNotFound):
            await read_blob(blobs, digest)

    @ALL
    async def test_look_ups_notice_that_a_file_was_written_to(
        self, blobs: FilesystemBlobStore, root: Path, data: bytes
    ) -> None:
        """The mtime is a constant, so FindMissing sees it without reading the file."""
        digest = await store(blobs, data)
        flip(root / blob_name(digest), silently=False)
        assert await blobs.find_missing([digest]) == {digest}

    @ALL
    async def test_a_touched_file_that_is_whole_is_kept(
        self, blobs: FilesystemBlobStore, root: Path, data: bytes
    ) -> None:
        """A restored backup, say."""
        digest = await store(blobs, data)
        path = root / blob_name(digest)
        os.utime(path)
        inode = path.stat().st_ino
        assert await blobs.find_missing([digest]) == set()
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (inode, MTIME_NS)
        assert quarantined(root) == []

    @ALL
    async def test_an_upload_replaces_a_file_that_was_written_to(
        self, blobs: FilesystemBlobStore, root: Path, data: bytes
    ) -> None:
        digest = await store(blobs, data)
        flip(root / blob_name(digest), silently=False)
        await store(blobs, data)
        assert await read_blob(blobs, digest) == data

    @ALL
    @pytest.mark.parametrize("offset", [0, 5])
    async def test_reads_of_a_part_are_verified_once(
        self, blobs: FilesystemBlobStore, root: Path, executor: Executor, data: bytes, offset: int
    ) -> None:
        digest = await store(blobs, data)
        flip(root / blob_name(digest), silently=True)
        fresh = make(root, executor)
        with pytest.raises(BlobNotFound):
            await anext(fresh.read(digest, offset=offset, limit=3))

    @ALL
    @pytest.mark.parametrize("sharing", Sharing)
    @pytest.mark.parametrize("executable", [False, True])
    async def test_inputs_are_verified_before_their_first_use(
        self,
        blobs: FilesystemBlobStore,
        root: Path,
        executor: Executor,
        directory: int,
        data: bytes,
        sharing: Sharing,
        executable: bool,
    ) -> None:
        digest = await store(blobs, data)
        flip(root / blob_name(digest), silently=True)
        fresh = make(root, executor)
        with pytest.raises(BlobNotFound):
            fresh.place(digest, directory, "f", executable=executable, sharing=sharing)
        assert os.listdir(directory) == []

    async def test_a_damaged_executable_variant_is_made_anew(
        self, blobs: FilesystemBlobStore, root: Path, executor: Executor, directory: int
    ) -> None:
        digest = await store(blobs, MIDDLE)
        blobs.place(digest, directory, "a", executable=True, sharing=Sharing.LINK)
        flip(root / (blob_name(digest) + ".x"), silently=True)
        fresh = make(root, executor)
        fresh.place(digest, directory, "b", executable=True, sharing=Sharing.LINK)
        with open("b", opener=lambda name, flags: os.open(name, flags, dir_fd=directory), mode="rb") as file:
            assert file.read() == MIDDLE

    async def test_quarantine_is_bounded(self, blobs: FilesystemBlobStore, root: Path) -> None:
        for number in range(70):
            digest = await store(blobs, b"%d" % number)
            flip(root / blob_name(digest), silently=False)
            await blobs.find_missing([digest])
        assert len(quarantined(root)) == 64
        assert blobs.verification.quarantined == 70

    async def test_without_verify_on_read_only_touched_files_are_hashed(self, root: Path, executor: Executor) -> None:
        blobs = make(root, executor, verify_on_read=False)
        digest = await store(blobs, SMALL)
        flip(root / blob_name(digest), silently=True)
        assert await read_blob(blobs, digest) != SMALL
        flip(root / blob_name(digest), silently=False)
        os.utime(root / blob_name(digest))
        assert await read_blob(blobs, digest) == SMALL, "flipped back"


class TestAtRisk:
    """The machine went down: what has the right name and size may hold anything."""

    @pytest.fixture
    def cut(self, root: Path, executor: Executor) -> Callable[[], FilesystemBlobStore]:
        """Returns the store after a power cut."""

        def after() -> FilesystemBlobStore:
            reboot(root)
            found = make(root, executor, verify_on_read=False)
            assert found.root.at_risk
            return found

        return after

    @ALL
    async def test_blob_of_zeros_is_not_served(
        self, blobs: FilesystemBlobStore, root: Path, data: bytes, cut: Callable[[], FilesystemBlobStore]
    ) -> None:
        digest = await store(blobs, data)
        path = root / blob_name(digest)
        path.chmod(0o600)
        path.write_bytes(bytes(len(data)))
        os.utime(path, ns=(1, MTIME_NS))
        after = cut()
        with pytest.raises(BlobNotFound):
            await read_blob(after, digest)
        await store(after, data)
        assert await read_blob(after, digest) == data

    @ALL
    async def test_upload_replaces_what_nobody_has_verified(
        self, blobs: FilesystemBlobStore, root: Path, data: bytes, cut: Callable[[], FilesystemBlobStore]
    ) -> None:
        digest = await store(blobs, data)
        flip(root / blob_name(digest), silently=True)
        after = cut()
        await store(after, data)
        assert await read_blob(after, digest) == data

    async def test_hit_names_only_verified_blobs(
        self, blobs: FilesystemBlobStore, root: Path, tmp_path: Path, cut: Callable[[], FilesystemBlobStore]
    ) -> None:
        digest = await store(blobs, SMALL)
        cache = FilesystemActionCache(tmp_path / "ac")
        key = ActionKey("", SHA256.digest_of(b"action"))
        result = ActionResult(output_files=[OutputFile(path="f")])
        result.output_files[0].digest.hash = digest.hash
        result.output_files[0].digest.size_bytes = digest.size_bytes
        await cache.put(key, result)
        after = CompleteActionCache(cache, cut())
        assert await after.get(key) == result
        flip(root / blob_name(digest), silently=True)
        assert await CompleteActionCache(cache, cut()).get(key) is None

    async def test_a_round_of_the_scrubber_ends_it(
        self, blobs: FilesystemBlobStore, root: Path, executor: Executor
    ) -> None:
        good = await store(blobs, SMALL)
        bad = await store(blobs, LARGE)
        flip(root / blob_name(bad), silently=True)
        stamp = (root / blob_name(good)).stat().st_atime_ns
        reboot(root)
        blobs.root.close()
        after = make(root, executor, scrub=1 << 30)
        scrubber = Scrubber(after, Janitor(after.root, after.policy, after.budget))
        for _ in range(100):
            if not after.root.at_risk:
                break
            scrubber.work(Event())
        assert not after.root.at_risk
        assert (root / blob_name(good)).stat().st_atime_ns == stamp
        assert not (root / blob_name(bad)).exists()
        assert len(quarantined(root)) == 1


async def test_a_restored_copy_of_a_store_works(blobs: FilesystemBlobStore, root: Path, executor: Executor) -> None:
    digest = await store(blobs, SMALL)
    shutil.copytree(root, root.parent / "copy")
    for path in (root.parent / "copy").rglob("*"):
        os.utime(path)
    assert await read_blob(make(root.parent / "copy", executor), digest) == SMALL
