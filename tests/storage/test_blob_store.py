"""The contract of BlobStore, for every implementation."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound, DigestMismatch
from expbuild.storage.base import CHUNK_BYTES, INLINE_BYTES, BlobStore, Sharing, read_blob, write_blob
from tests.storage.conftest import FUNCTIONS, files_below

SHA256 = DigestFunction.SHA256

SIZES = [1, INLINE_BYTES, INLINE_BYTES + 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 17]
"""Both sides of each limit at which something else happens."""


def blob(size_bytes: int, seed: str = "") -> bytes:
    return (f"{seed}{size_bytes} ".encode() * (size_bytes // 3 + 1))[:size_bytes]


async def store(blobs: BlobStore, data: bytes, function: DigestFunction = SHA256) -> Digest:
    digest = function.digest_of(data)
    await write_blob(blobs, digest, data)
    return digest


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A directory of an input root, open."""
    path = tmp_path / "inputs"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def read_at(directory: int, name: str) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory), "rb") as file:
        return file.read()


class TestWriteAndRead:
    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("size_bytes", SIZES)
    async def test_what_was_written_is_read(self, blobs: BlobStore, size_bytes: int, function: DigestFunction) -> None:
        data = blob(size_bytes)
        assert await read_blob(blobs, await store(blobs, data, function)) == data

    @pytest.mark.parametrize("chunk", [1000, CHUNK_BYTES - 1, 3 * CHUNK_BYTES])
    async def test_chunks_may_have_any_size(self, blobs: BlobStore, chunk: int) -> None:
        data = blob(2 * CHUNK_BYTES + 17, "chunks")
        digest = SHA256.digest_of(data)
        writer = blobs.open_writer(digest)
        for start in range(0, len(data), chunk):
            await writer.write(data[start : start + chunk])
        await writer.write(b"")
        await writer.commit()
        await writer.close()
        assert await read_blob(blobs, digest) == data

    @pytest.mark.parametrize("size_bytes", SIZES)
    async def test_read_is_exact_and_in_bounded_chunks(self, blobs: BlobStore, size_bytes: int) -> None:
        data = blob(size_bytes)
        digest = await store(blobs, data)
        for offset in {0, 1, size_bytes // 2, size_bytes - 1, size_bytes}:
            for limit in (None, 1, CHUNK_BYTES, CHUNK_BYTES + 1, size_bytes, size_bytes * 10):
                chunks = [chunk async for chunk in blobs.read(digest, offset=offset, limit=limit)]
                assert b"".join(chunks) == data[offset:][:limit]
                assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)

    async def test_absent_blob_is_not_found_before_the_first_chunk(self, blobs: BlobStore) -> None:
        absent = SHA256.digest_of(b"absent")
        with pytest.raises(BlobNotFound) as caught:
            await anext(blobs.read(absent))
        assert caught.value.digest == absent

    @pytest.mark.parametrize("function", FUNCTIONS)
    async def test_dig_04_empty_blob_exists_and_may_be_written(
        self, blobs: BlobStore, function: DigestFunction
    ) -> None:
        empty = function.digest_of(b"")
        assert await blobs.find_missing([empty]) == set()
        assert await read_blob(blobs, empty) == b""
        await write_blob(blobs, empty, b"")
        writer = blobs.open_writer(empty)
        with pytest.raises(DigestMismatch):
            await writer.write(b"x")
        await writer.close()

    async def test_dig_14_functions_and_sizes_are_part_of_the_name(self, blobs: BlobStore) -> None:
        digest = await store(blobs, b"named")
        others = [
            Digest(digest.hash, digest.size_bytes, DigestFunction.BLAKE3),
            Digest(digest.hash, digest.size_bytes + 1, SHA256),
        ]
        assert await blobs.find_missing([digest, *others]) == set(others)

    async def test_dropped_reader_holds_nothing_open(
        self, blobs: BlobStore, open_files: Callable[[], set[str]]
    ) -> None:
        digest = await store(blobs, blob(2 * CHUNK_BYTES))
        before = open_files()
        reader = blobs.read(digest)
        await anext(reader)
        await reader.aclose()
        assert open_files() == before


class TestFindMissing:
    @pytest.mark.parametrize("count", [1, 256, 257, 1000])
    async def test_cas_01_exactly_the_absent_ones(self, blobs: BlobStore, count: int) -> None:
        stored = [await store(blobs, b"stored %d" % i) for i in range(min(count, 20))]
        absent = [SHA256.digest_of(b"absent %d" % i) for i in range(count)]
        assert await blobs.find_missing([*absent, *stored, SHA256.digest_of(b""), *absent]) == set(absent)

    async def test_cas_02_nothing_of_nothing(self, blobs: BlobStore) -> None:
        assert await blobs.find_missing([]) == set()


class TestVerification:
    """Nothing but the blob itself is ever stored under its digest."""

    @pytest.mark.parametrize("size_bytes", [10, 2 * CHUNK_BYTES + 17])
    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda data: data[:-1], id="short"),
            pytest.param(lambda data: b"", id="empty"),
            pytest.param(lambda data: data[:-1] + b"\xff", id="wrong-hash"),
            pytest.param(lambda data: data + b"!", id="long"),
            pytest.param(lambda data: data * 2, id="twice"),
        ],
    )
    async def test_cas_10_wrong_content_is_refused_and_leaves_no_trace(
        self, blobs: BlobStore, change: Callable[[bytes], bytes], size_bytes: int, open_files: Callable[[], set[str]]
    ) -> None:
        data = blob(size_bytes, "right")
        digest = SHA256.digest_of(data)
        before = open_files()
        with pytest.raises(DigestMismatch):
            await write_blob(blobs, digest, change(data))
        assert open_files() == before
        assert await blobs.find_missing([digest]) == {digest}
        await write_blob(blobs, digest, data)
        assert await read_blob(blobs, digest) == data

    async def test_bs_30_too_much_is_refused_at_the_first_byte_beyond(self, blobs: BlobStore) -> None:
        writer = blobs.open_writer(SHA256.digest_of(b"12345"))
        await writer.write(b"1234")
        with pytest.raises(DigestMismatch):
            await writer.write(b"56")
        await writer.close()

    @pytest.mark.parametrize("size_bytes", SIZES)
    async def test_bs_40_nothing_is_visible_before_commit(self, blobs: BlobStore, size_bytes: int) -> None:
        data = blob(size_bytes, "invisible")
        digest = SHA256.digest_of(data)
        writer = blobs.open_writer(digest)
        await writer.write(data)
        assert await blobs.find_missing([digest]) == {digest}
        await writer.commit()
        assert await blobs.find_missing([digest]) == set()
        await writer.close()

    @pytest.mark.parametrize("size_bytes", SIZES)
    async def test_close_without_commit_leaves_no_trace(
        self, blobs: BlobStore, size_bytes: int, open_files: Callable[[], set[str]], tmp_path: Path
    ) -> None:
        data = blob(size_bytes, "dropped")
        digest = SHA256.digest_of(data)
        before = open_files()
        writer = blobs.open_writer(digest)
        await writer.write(data)
        await writer.close()
        await writer.close()
        assert open_files() == before
        assert await blobs.find_missing([digest]) == {digest}
        assert not {name for root in tmp_path.iterdir() for name in files_below(root)}

    @pytest.mark.parametrize("size_bytes", [10, 2 * CHUNK_BYTES + 17])
    async def test_bs_37_writers_of_one_blob_at_once_all_succeed(self, blobs: BlobStore, size_bytes: int) -> None:
        data = blob(size_bytes, "together")
        digest = SHA256.digest_of(data)
        await asyncio.gather(*(write_blob(blobs, digest, data) for _ in range(10)))
        assert await read_blob(blobs, digest) == data

    async def test_writing_a_present_blob_again_is_fine_and_checked_all_the_same(self, blobs: BlobStore) -> None:
        digest = await store(blobs, b"again")
        assert await store(blobs, b"again") == digest
        with pytest.raises(DigestMismatch):
            await write_blob(blobs, digest, b"Again")
        assert await read_blob(blobs, digest) == b"again"


@pytest.mark.parametrize("sharing", Sharing)
class TestPlace:
    @pytest.mark.parametrize("executable", [False, True], ids=["plain", "executable"])
    @pytest.mark.parametrize("size_bytes", SIZES)
    async def test_blob_appears_with_its_content_and_mode(
        self, blobs: BlobStore, directory: int, size_bytes: int, executable: bool, sharing: Sharing
    ) -> None:
        data = blob(size_bytes, "placed")
        digest = await store(blobs, data)
        for name in ("one", "two"):
            blobs.place(digest, directory, name, executable=executable, sharing=sharing)
            assert read_at(directory, name) == data
            mode = os.stat(name, dir_fd=directory).st_mode
            assert stat.S_IMODE(mode) == (0o555 if executable else 0o444)

    async def test_executable_and_plain_files_of_one_blob_stay_apart(
        self, blobs: BlobStore, directory: int, sharing: Sharing
    ) -> None:
        digest = await store(blobs, b"both")
        for name, executable in (("a", False), ("b", True), ("c", False), ("d", True)):
            blobs.place(digest, directory, name, executable=executable, sharing=sharing)
        modes = [stat.S_IMODE(os.stat(name, dir_fd=directory).st_mode) for name in "abcd"]
        assert modes == [0o444, 0o555, 0o444, 0o555]

    async def test_modification_time_is_always_the_same(
        self, blobs: BlobStore, directory: int, sharing: Sharing
    ) -> None:
        """So that actions which look at it behave alike in every run."""
        digests = [await store(blobs, b"a"), await store(blobs, blob(2 * CHUNK_BYTES)), SHA256.digest_of(b"")]
        times = set()
        for number, digest in enumerate(digests):
            for executable in (False, True):
                name = f"{number}{executable}"
                blobs.place(digest, directory, name, executable=executable, sharing=sharing)
                times.add(os.stat(name, dir_fd=directory).st_mtime_ns)
        assert len(times) == 1

    @pytest.mark.parametrize("executable", [False, True])
    async def test_empty_blob_is_a_file_of_its_own(
        self, blobs: BlobStore, directory: int, sharing: Sharing, executable: bool
    ) -> None:
        blobs.place(SHA256.digest_of(b""), directory, "empty", executable=executable, sharing=sharing)
        seen = os.stat("empty", dir_fd=directory)
        assert (seen.st_size, seen.st_nlink) == (0, 1)

    @pytest.mark.parametrize("executable", [False, True])
    async def test_absent_blob_is_not_found_and_makes_no_file(
        self, blobs: BlobStore, directory: int, sharing: Sharing, executable: bool
    ) -> None:
        with pytest.raises(BlobNotFound):
            blobs.place(SHA256.digest_of(b"absent"), directory, "f", executable=executable, sharing=sharing)
        assert os.listdir(directory) == []

    @pytest.mark.parametrize("data", [b"", b"data"])
    @pytest.mark.parametrize("obstacle", ["file", "directory", "dangling link"])
    async def test_nothing_is_ever_overwritten(
        self, blobs: BlobStore, directory: int, sharing: Sharing, data: bytes, obstacle: str
    ) -> None:
        digest = await store(blobs, data)
        if obstacle == "file":
            os.close(os.open("there", os.O_CREAT | os.O_EXCL, dir_fd=directory))
        elif obstacle == "directory":
            os.mkdir("there", dir_fd=directory)
        else:
            os.symlink("nowhere", "there", dir_fd=directory)
        with pytest.raises(FileExistsError):
            blobs.place(digest, directory, "there", executable=False, sharing=sharing)

    async def test_no_descriptor_stays_open(
        self, blobs: BlobStore, directory: int, sharing: Sharing, open_files: Callable[[], set[str]]
    ) -> None:
        digest = await store(blobs, b"descriptors")
        before = open_files()
        for executable in (False, True):
            blobs.place(digest, directory, f"{executable}", executable=executable, sharing=sharing)
            with pytest.raises(FileExistsError):
                blobs.place(digest, directory, f"{executable}", executable=executable, sharing=sharing)
        assert open_files() == before


class TestIngest:
    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("size_bytes", [0, *SIZES, CHUNK_BYTES - 1, CHUNK_BYTES + 1])
    async def test_file_becomes_a_blob_from_its_start(
        self, blobs: BlobStore, size_bytes: int, function: DigestFunction
    ) -> None:
        """Wherever its offset stands; twice is as good as once."""
        data = blob(size_bytes, "ingested")
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            digests = [await asyncio.to_thread(blobs.ingest, file.fileno(), function) for _ in range(2)]
        digest = function.digest_of(data)
        assert digests == [digest, digest]
        assert await blobs.find_missing([digest]) == set()
        assert await read_blob(blobs, digest) == data

    async def test_later_writes_to_the_file_do_not_reach_the_blob(self, blobs: BlobStore) -> None:
        """A process of the action may still have its output open."""
        data = blob(CHUNK_BYTES + 5, "mine")
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            digest = blobs.ingest(file.fileno(), SHA256)
            os.pwrite(file.fileno(), b"changed", 0)
        assert await read_blob(blobs, digest) == data

    async def test_no_descriptor_stays_open(self, blobs: BlobStore, open_files: Callable[[], set[str]]) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(blob(CHUNK_BYTES + 5))
            file.flush()
            before = open_files()
            blobs.ingest(file.fileno(), SHA256)
            assert open_files() == before
