"""What is true of the blob store in files only: the files themselves."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound, StartupError, StorageFull, StorageUnavailable
from expbuild.reapi import ActionResult, OutputSymlink
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import CHUNK_BYTES, INLINE_BYTES, ActionKey, Sharing, read_blob, write_blob
from expbuild.storage.files import blob_name
from expbuild.storage.filesystem import FilesystemBlobStore
from tests.storage.conftest import FUNCTIONS, files_below
from tests.support.require import require_tool, unavailable

SHA256 = DigestFunction.SHA256
SMALL = b"a small blob"
LARGE = b"large " * (CHUNK_BYTES // 4)
HOUR_NS = 3600 * 10**9


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cas"


@pytest.fixture
def blobs(root: Path, executor: Executor) -> FilesystemBlobStore:
    return FilesystemBlobStore(root, FUNCTIONS, executor)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A directory of an input root, open."""
    (tmp_path / "inputs").mkdir()
    fd = os.open(tmp_path / "inputs", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


async def store(blobs: FilesystemBlobStore, data: bytes) -> Digest:
    digest = SHA256.digest_of(data)
    await write_blob(blobs, digest, data)
    return digest


async def upload(blobs: FilesystemBlobStore, data: bytes) -> None:
    await write_blob(blobs, SHA256.digest_of(data), data)


async def ingest(blobs: FilesystemBlobStore, data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        await asyncio.to_thread(blobs.ingest, file.fileno(), SHA256)


class TestFiles:
    @pytest.mark.parametrize("make", [upload, ingest])
    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
    async def test_a_blob_is_one_read_only_file_of_ours(
        self, blobs: FilesystemBlobStore, root: Path, make: Any, data: bytes, tmpfile: bool
    ) -> None:
        await make(blobs, data)
        assert files_below(root) == {blob_name(SHA256.digest_of(data))}
        seen = (root / blob_name(SHA256.digest_of(data))).stat()
        assert (stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_nlink) == (0o444, os.geteuid(), 1)

    def test_names_tell_function_hash_and_size(self) -> None:
        assert blob_name(Digest("ab" * 32, 7, SHA256)) == f"sha256/ab/{'ab' * 32}-7"
        assert blob_name(Digest("cd" * 32, 7, DigestFunction.BLAKE3)) == f"blake3/cd/{'cd' * 32}-7"

    @pytest.mark.usefixtures("blobs")
    def test_root_is_for_the_server_alone(self, root: Path) -> None:
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o700

    async def test_a_second_process_sees_every_blob(
        self, blobs: FilesystemBlobStore, root: Path, executor: Executor
    ) -> None:
        """Several servers may share a root; nothing is kept in memory alone."""
        digest = await store(blobs, SMALL)
        other = FilesystemBlobStore(root, FUNCTIONS, executor)
        later = await store(blobs, LARGE)
        assert await other.find_missing([digest, later]) == set()

    async def test_links_share_the_file_and_copies_do_not(
        self, blobs: FilesystemBlobStore, root: Path, directory: int
    ) -> None:
        digest = await store(blobs, SMALL)
        inode = (root / blob_name(digest)).stat().st_ino
        for name, executable, sharing in (
            ("linked", False, Sharing.LINK),
            ("copied", False, Sharing.COPY),
            ("linked-x", True, Sharing.LINK),
            ("linked-x2", True, Sharing.LINK),
            ("copied-x", True, Sharing.COPY),
        ):
            blobs.place(digest, directory, name, executable=executable, sharing=sharing)
        seen = {name: os.stat(name, dir_fd=directory).st_ino for name in os.listdir(directory)}
        assert seen["linked"] == inode
        assert seen["linked-x"] == seen["linked-x2"] == (root / f"{blob_name(digest)}.x").stat().st_ino
        assert len({inode, seen["copied"], seen["copied-x"], seen["linked-x"]}) == 4
        assert stat.S_IMODE((root / blob_name(digest)).stat().st_mode) == 0o444, "no mode of a shared file ever changes"

    @pytest.mark.parametrize("executable", [False, True])
    async def test_link_across_file_systems_becomes_a_copy(
        self, blobs: FilesystemBlobStore, root: Path, executable: bool
    ) -> None:
        shared_memory = Path("/dev/shm")
        if not os.access(shared_memory, os.W_OK) or shared_memory.stat().st_dev == root.stat().st_dev:
            unavailable("there is no second file system at /dev/shm")
        digest = await store(blobs, SMALL)
        with tempfile.TemporaryDirectory(dir=shared_memory) as there:
            fd = os.open(there, os.O_RDONLY | os.O_DIRECTORY)
            blobs.place(digest, fd, "f", executable=executable, sharing=Sharing.LINK)
            os.close(fd)
            assert Path(there, "f").read_bytes() == SMALL

    async def test_bs_23_blob_evicted_while_it_is_read_is_read_to_its_end(
        self, blobs: FilesystemBlobStore, root: Path
    ) -> None:
        data = os.urandom(3 * CHUNK_BYTES)
        digest = await store(blobs, data)
        reader = blobs.read(digest)
        chunks = [await anext(reader)]
        (root / blob_name(digest)).unlink()
        chunks += [chunk async for chunk in reader]
        assert b"".join(chunks) == data
        assert await blobs.find_missing([digest]) == {digest}


def _truncate(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, 0)


def _extend(path: Path) -> None:
    path.chmod(0o600)
    with path.open("ab") as file:
        file.write(b"!")


class TestDamage:
    """CAS-22: a file of another length than its name says is no blob, and heals when it is uploaded again."""

    @pytest.mark.parametrize("damage", [_truncate, _empty, _extend, Path.unlink])
    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
    async def test_damaged_blob_is_missing_everywhere(
        self, blobs: FilesystemBlobStore, root: Path, directory: int, data: bytes, damage: Callable[[Path], None]
    ) -> None:
        digest = await store(blobs, data)
        blobs.place(digest, directory, "before", executable=True, sharing=Sharing.LINK)
        damage(root / blob_name(digest))
        assert await blobs.find_missing([digest]) == {digest}
        with pytest.raises(BlobNotFound):
            await read_blob(blobs, digest)
        for sharing in Sharing:
            for executable in (False, True):
                with pytest.raises(BlobNotFound):
                    blobs.place(digest, directory, "f", executable=executable, sharing=sharing)
        assert os.listdir(directory) == ["before"]

    @pytest.mark.parametrize("damage", [_truncate, _empty, _extend, Path.unlink])
    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
    @pytest.mark.parametrize("make", [upload, ingest])
    async def test_damaged_blob_is_healed_by_storing_it_again(
        self,
        blobs: FilesystemBlobStore,
        root: Path,
        make: Any,
        data: bytes,
        damage: Callable[[Path], None],
        tmpfile: bool,
    ) -> None:
        digest = await store(blobs, data)
        damage(root / blob_name(digest))
        await make(blobs, data)
        assert await blobs.find_missing([digest]) == set()
        assert await read_blob(blobs, digest) == data
        assert files_below(root) == {blob_name(digest)}

    async def test_damaged_executable_file_is_made_anew(
        self, blobs: FilesystemBlobStore, root: Path, directory: int
    ) -> None:
        digest = await store(blobs, LARGE)
        blobs.place(digest, directory, "a", executable=True, sharing=Sharing.LINK)
        os.unlink("a", dir_fd=directory)
        _truncate(root / f"{blob_name(digest)}.x")
        blobs.place(digest, directory, "b", executable=True, sharing=Sharing.LINK)
        assert os.stat("b", dir_fd=directory).st_size == len(LARGE)

    @pytest.mark.parametrize("make", [upload, ingest])
    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
    async def test_removed_directories_are_made_anew(
        self, blobs: FilesystemBlobStore, root: Path, make: Any, data: bytes, tmpfile: bool
    ) -> None:
        digest = await store(blobs, data)
        shutil.rmtree(root / "sha256")
        assert await blobs.find_missing([digest]) == {digest}
        await make(blobs, data)
        assert await read_blob(blobs, digest) == data

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
    async def test_disorder_in_the_root_is_an_error_of_storage_not_of_the_client(
        self, blobs: FilesystemBlobStore, root: Path, data: bytes, open_files: Callable[[], set[str]]
    ) -> None:
        shutil.rmtree(root / "sha256")
        (root / "sha256").touch()
        before = open_files()
        with pytest.raises(StorageUnavailable, match=r"cannot write blob .*: Not a directory"):
            await upload(blobs, data)
        with pytest.raises(StorageUnavailable, match="cannot look up blobs: Not a directory"):
            await blobs.find_missing([SHA256.digest_of(data)])
        assert open_files() == before


class TestPromiseStamp:
    """CAS-03: the access time of a file says when we last told somebody that it is there."""

    @pytest.mark.parametrize("use", ["find_missing", "read", "upload", "ingest", "copy", "link", "link-executable"])
    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
    async def test_every_use_renews_it(
        self, blobs: FilesystemBlobStore, root: Path, directory: int, use: str, data: bytes
    ) -> None:
        digest = await store(blobs, data)
        path = root / blob_name(digest)
        modified = path.stat().st_mtime_ns
        now = time.time_ns()
        os.utime(path, ns=(now - HOUR_NS, modified))
        match use:
            case "find_missing":
                await blobs.find_missing([digest])
            case "read":
                await read_blob(blobs, digest)
            case "upload":
                await upload(blobs, data)
            case "ingest":
                await ingest(blobs, data)
            case "copy":
                blobs.place(digest, directory, "f", executable=False, sharing=Sharing.COPY)
            case _:
                blobs.place(digest, directory, "f", executable=use != "link", sharing=Sharing.LINK)
        assert path.stat().st_atime_ns >= now
        assert path.stat().st_mtime_ns == modified

    async def test_it_is_renewed_at_most_once_in_a_few_minutes(self, blobs: FilesystemBlobStore, root: Path) -> None:
        """A look-up writes nothing as a rule."""
        digest = await store(blobs, SMALL)
        path = root / blob_name(digest)
        recent = time.time_ns() - 60 * 10**9
        os.utime(path, ns=(recent, path.stat().st_mtime_ns))
        await blobs.find_missing([digest])
        assert path.stat().st_atime_ns == recent

    async def test_fresh_blob_has_a_fresh_stamp(self, blobs: FilesystemBlobStore, root: Path) -> None:
        before = time.time_ns()
        for data in (SMALL, LARGE):
            digest = await store(blobs, data)
            assert (root / blob_name(digest)).stat().st_atime_ns >= before


class TestOpening:
    def test_leftovers_of_a_crash_are_removed(self, root: Path, executor: Executor) -> None:
        (root / "tmp").mkdir(parents=True)
        for name in ("a", "b"):
            (root / "tmp" / name).write_bytes(b"half a blob")
        FilesystemBlobStore(root, FUNCTIONS, executor)
        assert files_below(root) == set()

    async def test_files_another_server_is_writing_are_left_alone(
        self, blobs: FilesystemBlobStore, root: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
        writer = blobs.open_writer(SHA256.digest_of(LARGE))
        await writer.write(LARGE)
        assert len(files_below(root)) == 1
        open_the_store = f"""if True:
            from concurrent.futures import ThreadPoolExecutor
            from pathlib import Path
            from expbuild.digest import DigestFunction
            from expbuild.storage.filesystem import FilesystemBlobStore
            FilesystemBlobStore(Path({str(root)!r}), [DigestFunction.SHA256], ThreadPoolExecutor(1))"""
        subprocess.run([sys.executable, "-c", open_the_store], check=True, timeout=60)
        assert len(files_below(root)) == 1
        await writer.commit()
        await writer.close()
        assert await read_blob(blobs, SHA256.digest_of(LARGE)) == LARGE

    @pytest.mark.parametrize("obstacle", ["", "sha256", "tmp"])
    def test_root_that_cannot_be_used_is_refused_by_name(self, root: Path, executor: Executor, obstacle: str) -> None:
        (root / obstacle).parent.mkdir(parents=True, exist_ok=True)
        (root / obstacle).touch()
        with pytest.raises(StartupError, match=f"storage.cas.root_dir: cannot use {root}: "):
            FilesystemBlobStore(root, FUNCTIONS, executor)
        if obstacle == "":
            with pytest.raises(StartupError, match=f"storage.action_cache.root_dir: cannot use {root}: "):
                FilesystemActionCache(root)


class _GatedExecutor(ThreadPoolExecutor):
    """Runs one job at a time, each only when the gate is open."""

    def __init__(self) -> None:
        super().__init__(1)
        self.gate = threading.Event()
        self.started = threading.Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def gated() -> Any:
            self.started.set()
            self.gate.wait(10)
            return fn(*args, **kwargs)

        return super().submit(gated)


@pytest.mark.parametrize("moment", ["queued", "running"])
@pytest.mark.parametrize("step", ["write", "commit"])
async def test_upload_cancelled_while_its_thread_works_leaves_no_trace(
    root: Path, moment: str, step: str, open_files: Callable[[], set[str]], tmpfile: bool
) -> None:
    """The thread cannot be stopped; it must find out itself, and write to no descriptor that is closed."""
    with _GatedExecutor() as executor:
        blobs = FilesystemBlobStore(root, FUNCTIONS, executor)
        data = LARGE[: INLINE_BYTES + 1] if step == "commit" else LARGE
        digest = SHA256.digest_of(data)
        before = open_files()
        loop = asyncio.get_running_loop()
        other = loop.run_in_executor(executor, int) if moment == "queued" else None
        writer = blobs.open_writer(digest)
        task = asyncio.ensure_future(write_and_commit(writer, data))
        await asyncio.to_thread(executor.started.wait, 10)
        task.cancel()
        closing = asyncio.ensure_future(writer.close())
        await asyncio.wait([task], timeout=10)
        assert task.cancelled()
        executor.gate.set()
        await closing
        if other is not None:
            await other
        assert open_files() == before
        if step == "write" or moment == "queued":
            assert files_below(root) == set()
        else:
            assert files_below(root) <= {blob_name(digest)}, "published whole, or not at all"


async def write_and_commit(writer: Any, data: bytes) -> None:
    await writer.write(data)
    await writer.commit()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small-disk"
    path.mkdir()
    mount = [require_tool("mount"), "-t", "tmpfs", "-o", "size=1m,mode=0755", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        unavailable(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run([require_tool("umount"), "-l", str(path)], check=True, timeout=30)


class TestFullDisk:
    """GEN-19: what does not fit is RESOURCE_EXHAUSTED, and leaves neither a file nor an open descriptor behind."""

    @pytest.mark.parametrize("make", [upload, ingest])
    @pytest.mark.parametrize("data", [SMALL * 15_000, LARGE * 2], ids=["small", "large"])
    async def test_blob_that_does_not_fit_leaves_nothing(
        self,
        small_disk: Path,
        executor: Executor,
        make: Any,
        data: bytes,
        tmpfile: bool,
        open_files: Callable[[], set[str]],
    ) -> None:
        blobs = FilesystemBlobStore(small_disk / "cas", [SHA256], executor)
        first = os.urandom(INLINE_BYTES)
        for start in range(0, 4 * 245_000, 245_000):
            await store(blobs, start.to_bytes(4) + first[:240_000])
        before, free = open_files(), os.statvfs(small_disk).f_bfree
        files = files_below(small_disk)
        with pytest.raises(StorageFull) as caught:
            await make(blobs, data)
        assert str(caught.value).endswith(": no space left on the storage device; free space or try again later")
        assert open_files() == before
        assert os.statvfs(small_disk).f_bfree == free
        assert files_below(small_disk) == files
        assert await blobs.find_missing([SHA256.digest_of(data)]) == {SHA256.digest_of(data)}

    async def test_executable_file_that_does_not_fit_leaves_nothing(
        self, small_disk: Path, executor: Executor, directory: int, open_files: Callable[[], set[str]]
    ) -> None:
        blobs = FilesystemBlobStore(small_disk / "cas", [SHA256], executor)
        digest = await store(blobs, LARGE[:700_000])
        before, files = open_files(), files_below(small_disk)
        with pytest.raises(StorageFull):
            blobs.place(digest, directory, "f", executable=True, sharing=Sharing.LINK)
        assert (open_files(), files_below(small_disk), os.listdir(directory)) == (before, files, [])

    async def test_action_result_that_does_not_fit_leaves_the_old_one(
        self, small_disk: Path, tmpfile: bool, open_files: Callable[[], set[str]]
    ) -> None:
        cache = FilesystemActionCache(small_disk / "ac")
        key = ActionKey("", SHA256.digest_of(b"action"))
        await cache.put(key, ActionResult(exit_code=1))
        before, files = open_files(), files_below(small_disk)
        big = ActionResult(output_symlinks=[OutputSymlink(path="x" * 2_000_000, target="t")])
        with pytest.raises(StorageFull):
            await cache.put(key, big)
        assert (open_files(), files_below(small_disk)) == (before, files)
        found = await cache.get(key)
        assert found is not None
        assert found.exit_code == 1
