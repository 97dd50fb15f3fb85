"""ByteStream: Read, Write and QueryWriteStatus (conformance BS-*)."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from expbuild.digest import Digest
from expbuild.reapi import QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, WriteRequest
from tests.api.client import TIMEOUT_S, Client, Refusal, code_of, refusal, write_requests
from tests.api.compress import COMPRESSORS, compress, decompress
from tests.api.conftest import StartServer
from tests.support.server import ReServer, wait_until

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def blob(name: str, size_bytes: int) -> bytes:
    """Return bytes that no other test uses, half of them random."""
    rng = random.Random(f"{name} {size_bytes}")
    return b"".join(rng.randbytes(512) + bytes(512) for _ in range(size_bytes // 1024 + 1))[:size_bytes]


async def query(client: Client, name: str) -> QueryWriteStatusResponse:
    request = QueryWriteStatusRequest(resource_name=name)
    response: QueryWriteStatusResponse = await client.bytestream.QueryWriteStatus(request, timeout=TIMEOUT_S)
    return response


def _part(data: bytes, offset: int = 0, *, name: str = "", finish: bool = False) -> WriteRequest:
    return WriteRequest(resource_name=name, write_offset=offset, data=data, finish_write=finish)


SIZES = [1, 1000, 256 << 10, (256 << 10) + 1, 3_000_000]
"""Both sides of the size up to which a blob is handled in memory, and several chunks."""


class TestRead:
    @pytest.mark.parametrize("size_bytes", SIZES)
    async def test_bs_01_20_blob_is_read_whole_in_messages_of_at_most_2_mib(
        self, client: Client, size_bytes: int
    ) -> None:
        data = blob("bs-01", size_bytes)
        (digest,) = await client.upload(data)
        request = ReadRequest(resource_name=client.read_name(digest))
        parts = [part.data async for part in client.bytestream.Read(request, timeout=TIMEOUT_S)]
        assert b"".join(parts) == data
        assert max(map(len, parts)) <= 2 << 20

    @pytest.mark.parametrize("compressor", ["", *COMPRESSORS])
    async def test_bs_12_absent_blob_is_not_found(self, client: Client, compressor: str) -> None:
        digest = client.digest(b"bs-12 never stored")
        answer = await refusal(client.read(client.read_name(digest, compressor)))
        assert answer == Refusal(grpc.StatusCode.NOT_FOUND, f"blob {digest} is not in the CAS")

    async def test_dig_03_right_hash_with_wrong_size_is_not_found(self, client: Client) -> None:
        (digest,) = await client.upload(b"dig-03 bytestream")
        wrong = Digest(digest.hash, digest.size_bytes + 1, client.function)
        assert await code_of(client.read(client.read_name(wrong))) == "NOT_FOUND"

    @pytest.mark.parametrize(
        ("offset", "limit", "expected"),
        [
            pytest.param(0, 0, b"0123456789", id="whole"),
            pytest.param(3, 4, b"3456", id="BS-14-middle"),
            pytest.param(8, 100, b"89", id="BS-14-limit-past-the-end"),
            pytest.param(9, 0, b"9", id="BS-13-last-byte"),
            pytest.param(10, 0, b"", id="BS-13-at-the-end"),
            pytest.param(10, 5, b"", id="BS-13-at-the-end-with-limit"),
            pytest.param(0, 2**63 - 1, b"0123456789", id="BS-14-largest-limit"),
        ],
    )
    async def test_offset_and_limit_are_exact(self, client: Client, offset: int, limit: int, expected: bytes) -> None:
        (digest,) = await client.upload(b"0123456789")
        assert await client.read(client.read_name(digest), offset=offset, limit=limit) == expected

    @pytest.mark.parametrize(
        ("offset", "limit"), [((1 << 20) - 1, 2), (1 << 20, 1 << 20), (5, 2_000_000), (2_999_999, 9)]
    )
    async def test_offset_and_limit_are_exact_across_chunks(self, client: Client, offset: int, limit: int) -> None:
        data = blob("bs-14", 3_000_000)
        (digest,) = await client.upload(data)
        part = await client.read(client.read_name(digest), offset=offset, limit=limit)
        assert part == data[offset : offset + limit]

    @pytest.mark.parametrize(
        ("offset", "limit", "code"),
        [
            pytest.param(11, 0, "OUT_OF_RANGE", id="BS-13-beyond-the-end"),
            pytest.param(-1, 0, "OUT_OF_RANGE", id="BS-13-negative"),
            pytest.param(2**63 - 1, 0, "OUT_OF_RANGE", id="BS-13-largest"),
            pytest.param(0, -1, "INVALID_ARGUMENT", id="BS-14-negative-limit"),
        ],
    )
    async def test_impossible_ranges_are_refused(self, client: Client, offset: int, limit: int, code: str) -> None:
        (digest,) = await client.upload(b"0123456789")
        assert await code_of(client.read(client.read_name(digest), offset=offset, limit=limit)) == code

    async def test_dig_05_empty_blob_is_readable_without_upload(self, client: Client) -> None:
        assert await client.read(client.read_name(client.digest(b""))) == b""
        assert await code_of(client.read(client.read_name(client.digest(b"not empty")))) == "NOT_FOUND"

    @pytest.mark.parametrize("compressor", COMPRESSORS)
    async def test_bs_19_compressed_empty_blob_is_a_valid_stream(self, client: Client, compressor: str) -> None:
        data = await client.read(client.read_name(client.digest(b""), compressor))
        assert decompress(compressor, data) == b""

    @pytest.mark.parametrize("offset", [0, 1, 1 << 20, 2_999_999, 3_000_000])
    @pytest.mark.parametrize("compressor", COMPRESSORS)
    async def test_bs_16_17_compressed_read_starts_at_the_uncompressed_offset(
        self, client: Client, compressor: str, offset: int
    ) -> None:
        data = blob("bs-16", 3_000_000)
        (digest,) = await client.upload(data)
        packed = await client.read(client.read_name(digest, compressor), offset=offset)
        assert decompress(compressor, packed) == data[offset:]
        assert len(packed) < len(data) * 2 / 3

    @pytest.mark.parametrize("compressor", COMPRESSORS)
    async def test_bs_15_compressed_read_with_limit_is_invalid(self, client: Client, compressor: str) -> None:
        (digest,) = await client.upload(b"bs-15")
        assert await refusal(client.read(client.read_name(digest, compressor), limit=1)) == Refusal(
            INVALID, "read_limit cannot be used with compressed blobs (REAPI)"
        )

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("", id="empty"),
            pytest.param("blobs/{hash}", id="no-size"),
            pytest.param("blobs/{hash}/5/name", id="BS-05-something-behind"),
            pytest.param("blobs/{hash}/+5", id="BS-08-sign"),
            pytest.param("blobs/{hash}/-5", id="BS-08-negative"),
            pytest.param("blobs/{hash}/0x5", id="BS-08-hex"),
            pytest.param("blobs/{hash}/9223372036854775808", id="BS-08-beyond-int64"),
            pytest.param("blobs/{hash}/\u0665", id="BS-08-other-digits"),
            pytest.param("blobs/nohash/5", id="BS-08-bad-hash"),
            pytest.param("uploads/u/blobs/{hash}/5", id="BS-08-upload-form"),
            pytest.param("compressed-blobs/identity/{hash}/5", id="BS-07-identity"),
            pytest.param("compressed-blobs/brotli/{hash}/5", id="BS-07-not-advertised"),
            pytest.param("compressed-blobs/ZSTD/{hash}/5", id="BS-07-upper-case"),
            pytest.param("compressed-blobs/{hash}/5", id="BS-07-no-compressor"),
            pytest.param("blobs/sha1/{hash}/5", id="BS-06-function-not-served"),
            pytest.param("blobs/sha512/{hash}/5", id="BS-06-length-of-another-function"),
            pytest.param("main/logstreams/{hash}", id="BS-11-log-stream"),
            pytest.param("//blobs/{hash}/5", id="GEN-11-empty-segment"),
            pytest.param("a//blobs/{hash}/5", id="GEN-11-double-slash"),
            pytest.param("actions/blobs/{hash}/5", id="GEN-11-reserved-word"),
        ],
    )
    async def test_bs_08_malformed_name_is_invalid_argument(self, sha256_client: Client, name: str) -> None:
        """Also when the blob it may mean is there."""
        (digest,) = await sha256_client.upload(b"12345")
        assert await code_of(sha256_client.read(name.format(hash=digest.hash))) == "INVALID_ARGUMENT"

    @pytest.mark.parametrize(
        "name", ["/blobs/{hash}/5", "a/b/blobs/{hash}/5", "blobs/sha256/{hash}/5"], ids=["slash", "instance", "DIG-12"]
    )
    async def test_bs_03_lenient_forms_are_accepted(self, sha256_client: Client, name: str) -> None:
        (digest,) = await sha256_client.upload(b"12345")
        assert await sha256_client.read(name.format(hash=digest.hash)) == b"12345"

    @pytest.mark.duty("GEN-21")
    async def test_abandoned_reads_leave_no_open_files(self, server: ReServer, client: Client) -> None:
        """GEN-21: a client that goes away in the middle of a blob costs nothing afterwards."""
        (digest,) = [client.digest(data := blob("gen-21", 8_000_000))]
        await client.write_blob(data)
        for compressor in ("", "zstd"):
            for _ in range(10):
                request = ReadRequest(resource_name=client.read_name(digest, compressor))
                call = client.bytestream.Read(request, timeout=TIMEOUT_S)
                await call.read()
                call.cancel()
        wait_until(lambda: not open_blobs(server), timeout_s=10, what="no blob is open")
        assert await client.read(client.read_name(digest)) == data


class TestWrite:
    @pytest.mark.parametrize("chunk", [16 << 10, 1 << 20, 10 << 20], ids=["16K", "1M", "one-message"])
    @pytest.mark.parametrize("size_bytes", [1, 256 << 10, 5_000_000])
    async def test_bs_31_41_upload_commits_the_blob_size(self, client: Client, size_bytes: int, chunk: int) -> None:
        data = blob(f"bs-31 {chunk}", size_bytes)
        assert await client.write_blob(data, chunk=chunk) == size_bytes
        assert await client.read(client.read_name(client.digest(data))) == data

    @pytest.mark.duty("BS-39")
    async def test_name_may_be_repeated_and_finish_may_be_an_empty_message(self, client: Client) -> None:
        data = b"bs-39 in pieces"
        name = client.write_name(client.digest(data))
        committed = await client.write(
            WriteRequest(resource_name=name),
            WriteRequest(resource_name=name, data=data[:4]),
            WriteRequest(data=b"", write_offset=4),
            WriteRequest(resource_name=name, data=data[4:], write_offset=4),
            WriteRequest(write_offset=len(data), finish_write=True),
        )
        assert committed == len(data)
        assert await client.missing(client.digest(data)) == set()

    async def test_dig_05_empty_blob_may_be_uploaded(self, client: Client) -> None:
        name = client.write_name(client.digest(b""))
        assert await client.write(WriteRequest(resource_name=name, finish_write=True)) == 0
        too_much = WriteRequest(resource_name=name, data=b"x", finish_write=True)
        assert await code_of(client.write(too_much)) == "INVALID_ARGUMENT"

    @pytest.mark.parametrize("size_bytes", [100, 600_000])
    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda data: data + b"!", id="BS-30-one-too-many"),
            pytest.param(lambda data: data[:-1], id="BS-30-one-too-few"),
            pytest.param(lambda data: data[:-1] + b"\xff", id="BS-30-other-content"),
            pytest.param(lambda data: b"", id="BS-30-nothing"),
        ],
    )
    async def test_bs_30_wrong_upload_stores_nothing_and_can_be_repeated_right(
        self, client: Client, change: Callable[[bytes], bytes], size_bytes: int
    ) -> None:
        data = blob(f"bs-30 {change(b'sample')!r}", size_bytes)[:-1] + b"\x00"
        digest = client.digest(data)
        name = client.write_name(digest)
        assert await code_of(client.write(*write_requests(name, change(data), 1 << 16))) == "INVALID_ARGUMENT"
        assert await client.missing(digest) == {digest}
        assert await client.write_blob(data, name=name) == size_bytes
        assert await client.missing(digest) == set()

    async def test_bs_30_too_long_an_upload_fails_at_the_message_that_is_too_much(self, client: Client) -> None:
        """Not only at the end of the stream: the client is still sending."""
        digest = client.digest(b"bs-30 early")
        call = client.bytestream.Write(timeout=TIMEOUT_S)
        await call.write(WriteRequest(resource_name=client.write_name(digest), data=bytes(12)))
        assert await code_of(call) == "INVALID_ARGUMENT"

    @pytest.mark.parametrize(
        ("messages", "code"),
        [
            pytest.param(lambda name: [], "INVALID_ARGUMENT", id="BS-24-no-message"),
            pytest.param(lambda name: [_part(b"abc", finish=True)], "INVALID_ARGUMENT", id="BS-24-no-name"),
            pytest.param(
                lambda name: [_part(b"ab", name=name), _part(b"c", 2, name=f"{name}/x", finish=True)],
                "INVALID_ARGUMENT",
                id="BS-25-other-name",
            ),
            pytest.param(
                lambda name: [_part(b"abc", -1, name=name, finish=True)], "INVALID_ARGUMENT", id="BS-26-negative"
            ),
            pytest.param(
                lambda name: [_part(b"c", 2, name=name, finish=True)], "ABORTED", id="BS-26-ahead-of-the-server"
            ),
            pytest.param(
                lambda name: [_part(b"ab", name=name), _part(b"c", 3, finish=True)],
                "INVALID_ARGUMENT",
                id="BS-26-gap",
            ),
            pytest.param(
                lambda name: [_part(b"ab", name=name), _part(b"c", 1, finish=True)],
                "INVALID_ARGUMENT",
                id="BS-26-overlap",
            ),
            pytest.param(
                lambda name: [_part(b"ab", name=name), _part(b"c", -2, finish=True)],
                "INVALID_ARGUMENT",
                id="BS-26-negative-later",
            ),
            pytest.param(
                lambda name: [_part(b"abc", name=name, finish=True), _part(b"", 3)],
                "INVALID_ARGUMENT",
                id="BS-28-message-after-finish",
            ),
            pytest.param(
                lambda name: [_part(b"abc", name=name, finish=True), _part(b"", 3, finish=True)],
                "INVALID_ARGUMENT",
                id="BS-28-finish-twice",
            ),
            pytest.param(lambda name: [_part(b"ab", name=name)], "INVALID_ARGUMENT", id="BS-29-half-close-early"),
            pytest.param(
                lambda name: [_part(b"abc", name=name)], "INVALID_ARGUMENT", id="BS-29-half-close-without-finish"
            ),
        ],
    )
    async def test_rules_of_the_stream(
        self, client: Client, messages: Callable[[str], list[WriteRequest]], code: str
    ) -> None:
        """Each of these breaks one, and stores nothing."""
        digest = client.digest(b"abc")
        assert await code_of(client.write(*messages(client.write_name(digest)))) == code
        assert await client.missing(digest) == {digest}

    async def test_bs_10_one_upload_id_serves_several_blobs_at_once(self, client: Client) -> None:
        """Some clients make one id for all uploads of a process; here two streams alternate."""
        blobs = [blob(f"bs-10 {client.function} {i}", 700_000) for i in range(2)]
        names = [client.write_name(client.digest(data), upload_id="one-id") for data in blobs]
        calls = [client.bytestream.Write(timeout=TIMEOUT_S) for _ in blobs]
        messages = [write_requests(name, data, 100_000) for name, data in zip(names, blobs, strict=True)]
        for pair in zip(*messages, strict=True):
            for call, request in zip(calls, pair, strict=True):
                await call.write(request)
        for call in calls:
            await call.done_writing()
        assert [(await call).committed_size for call in calls] == [700_000] * 2

    @pytest.mark.parametrize("size_bytes", [100, 700_000])
    async def test_bs_37_uploads_of_one_blob_at_once_all_succeed(self, client: Client, size_bytes: int) -> None:
        data = blob(f"bs-37 {client.function}", size_bytes)
        assert await asyncio.gather(*(client.write_blob(data, chunk=50_000) for _ in range(8))) == [size_bytes] * 8
        assert await client.read(client.read_name(client.digest(data))) == data

    async def test_bs_38_newest_stream_of_a_name_takes_over(self, client: Client) -> None:
        data = blob("bs-38", 1000)
        name = client.write_name(client.digest(data))
        first, *rest = write_requests(name, data, 500)
        older = client.bytestream.Write(timeout=TIMEOUT_S)
        await older.write(first)
        # The answer to a question on the same connection shows that the server has the message before it.
        await query(client, name)
        assert await client.write_blob(data, name=name) == 1000
        await older.write(rest[0])
        assert await refusal(older) == Refusal(grpc.StatusCode.ABORTED, "another stream took over this upload")

    @pytest.mark.parametrize("size_bytes", [1000, 2_000_000])
    async def test_bs_32_present_blob_is_answered_with_its_size(self, client: Client, size_bytes: int) -> None:
        data = blob("bs-32", size_bytes)
        await client.upload(data)
        assert await client.write_blob(data, chunk=50_000) == size_bytes

    async def test_bs_32_large_present_blob_is_answered_after_the_first_message(self, client: Client) -> None:
        data = blob("bs-32 early", 2_000_000)
        await client.upload(data)
        call = client.bytestream.Write(timeout=TIMEOUT_S)
        await call.write(write_requests(client.write_name(client.digest(data)), data, 1000)[0])
        assert (await call).committed_size == 2_000_000

    async def test_bs_33_a_small_rest_is_read_before_the_early_answer(self, client: Client) -> None:
        """Simple clients take a stream that is closed under their hands for broken, whatever the answer says."""
        data = blob("bs-33", 200_000)
        await client.upload(data)
        call = client.bytestream.Write(timeout=TIMEOUT_S)
        for request in write_requests(client.write_name(client.digest(data)), data, 10_000):
            await call.write(request)
        await call.done_writing()
        assert (await call).committed_size == len(data)

    async def test_bs_40_a_blob_is_visible_when_it_is_answered_and_not_before(self, client: Client) -> None:
        data = blob(f"bs-40 {client.function}", 2_000_000)
        digest, other = client.digest(data), Client(client.address, client.function)
        *most, last = write_requests(client.write_name(digest), data, 500_000)
        call = client.bytestream.Write(timeout=TIMEOUT_S)
        for request in most:
            await call.write(request)
        assert await other.missing(digest) == {digest}
        await call.write(last)
        assert (await call).committed_size == len(data)
        assert await other.missing(digest) == set()
        assert await other.read(other.read_name(digest)) == data
        await other.close()

    async def test_bs_44_the_memory_of_an_upload_is_bounded(self, start_server: StartServer) -> None:
        """A blob of 300 MB leaves the server as small as it was, but for what is on the way."""
        server = start_server("bounded")
        client = Client(server.address)
        await client.write_blob(blob("bs-44 first", 3_000_000))
        before = peak_memory(server)
        data = bytes(300_000_000)
        assert await client.write_blob(data) == len(data)
        assert peak_memory(server) - before < 200_000_000
        await client.close()

    async def test_answer_comes_without_waiting_for_the_half_close(self, client: Client) -> None:
        data = b"finish_write is enough"
        call = client.bytestream.Write(timeout=TIMEOUT_S)
        await call.write(write_requests(client.write_name(client.digest(data)), data)[0])
        assert (await call).committed_size == len(data)

    @pytest.mark.parametrize(
        "tail", ["", "/", "/file.txt", "/a/blobs/b/uploads/c.txt", "/" + "x" * 4000], ids=lambda tail: tail[:20]
    )
    async def test_bs_04_anything_may_follow_the_size(self, sha256_client: Client, tail: str) -> None:
        data = b"bs-04" + tail.encode()
        name = sha256_client.write_name(sha256_client.digest(data)) + tail
        assert await sha256_client.write_blob(data, name=name) == len(data)

    @pytest.mark.parametrize("upload_id", ["x", "blobs", "uploads", "no-uuid", "0"])
    async def test_bs_09_any_upload_id_is_accepted(self, sha256_client: Client, upload_id: str) -> None:
        data = b"bs-09" + upload_id.encode()
        name = sha256_client.write_name(sha256_client.digest(data), upload_id=upload_id)
        assert await sha256_client.write_blob(data, name=name) == len(data)

    @pytest.mark.parametrize("instance", ["/", "main/", "/main/", "a/b/c/"])
    @pytest.mark.duty("BS-02")
    async def test_bs_03_instance_names_come_first(self, sha256_client: Client, instance: str) -> None:
        data = b"bs-03" + instance.encode()
        name = instance + sha256_client.write_name(sha256_client.digest(data))
        assert await sha256_client.write_blob(data, name=name) == len(data)

    @pytest.mark.parametrize(
        "name",
        [
            "blobs/{hash}/5",
            "uploads/blobs/{hash}/5",
            "uploads//blobs/{hash}/5",
            "uploads/u/{hash}/5",
            "uploads/u/blobs/{hash}",
            "uploads/u/blobs/{hash}/x",
            "uploads/u/compressed-blobs/identity/{hash}/5",
            "uploads/u/compressed-blobs",
            "blobs/uploads/u/blobs/{hash}/5",
            "//uploads/u/blobs/{hash}/5",
            "uploads",
            "uploads/u/blobs/{hash}/5" + "/x" * 5000,
        ],
        ids=lambda name: name[:40],
    )
    async def test_bs_08_malformed_name_is_invalid_argument(self, sha256_client: Client, name: str) -> None:
        name = name.format(hash=sha256_client.digest(b"12345").hash)
        request = WriteRequest(resource_name=name, data=b"12345", finish_write=True)
        assert await code_of(sha256_client.write(request)) == "INVALID_ARGUMENT"
        assert await code_of(query(sha256_client, name)) == "INVALID_ARGUMENT"


class TestCompressedWrite:
    @pytest.mark.parametrize("chunk", [1000, 1 << 20])
    @pytest.mark.parametrize("size_bytes", [0, 1, 256 << 10, 3_000_000])
    @pytest.mark.parametrize("compressor", COMPRESSORS)
    async def test_bs_34_36_content_is_stored_and_the_compressed_count_committed(
        self, client: Client, compressor: str, size_bytes: int, chunk: int
    ) -> None:
        data = blob(f"bs-36 {compressor} {chunk}", size_bytes)
        packed = compress(compressor, data)
        name = client.write_name(client.digest(data), compressor)
        assert await client.write(*write_requests(name, packed, chunk)) == len(packed)
        assert await client.read(client.read_name(client.digest(data))) == data

    @pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
    async def test_bs_18_several_zstd_frames_are_one_blob(self, client: Client, chunk: int) -> None:
        """Also skippable ones and empty ones, however they are cut into messages."""
        parts = [f"frame {chunk} {i} ".encode() * 10 for i in range(5)] + [b""]
        skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"skip!"
        packed = skippable.join(compress("zstd", part) for part in parts)
        data = b"".join(parts)
        name = client.write_name(client.digest(data), "zstd")
        assert await client.write(*write_requests(name, packed, chunk)) == len(packed)
        assert await client.read(client.read_name(client.digest(data))) == data

    @pytest.mark.parametrize("size_bytes", [5000, 600_000])
    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda packed: packed[:-1], id="truncated"),
            pytest.param(lambda packed: packed[: len(packed) // 2], id="half"),
            pytest.param(lambda packed: packed[:1], id="one-byte"),
            pytest.param(lambda packed: b"", id="nothing"),
            pytest.param(lambda packed: packed + b"garbage", id="trailing-garbage"),
            pytest.param(lambda packed: packed + b"\x00", id="trailing-zero"),
            pytest.param(lambda packed: packed + packed, id="twice"),
            pytest.param(lambda packed: b"\xff" * len(packed), id="no-stream-at-all"),
        ],
    )
    @pytest.mark.parametrize("compressor", COMPRESSORS)
    async def test_bs_34_broken_stream_is_invalid_and_stores_nothing(
        self, client: Client, compressor: str, change: Callable[[bytes], bytes], size_bytes: int
    ) -> None:
        data = blob("bs-34 broken", size_bytes)
        digest = client.digest(data)
        name = client.write_name(digest, compressor)
        packed = bytes(change(compress(compressor, data)))
        for chunk in (1 << 20, 999):
            assert await code_of(client.write(*write_requests(name, packed, chunk))) == "INVALID_ARGUMENT"
        assert await client.missing(digest) == {digest}

    @pytest.mark.parametrize("compressor", COMPRESSORS)
    async def test_bs_34_output_beyond_the_size_is_stopped(self, client: Client, compressor: str) -> None:
        """A megabyte of zeros for a digest of 1000 bytes."""
        digest = client.digest(blob("bs-34 bomb", 1000))
        packed = compress(compressor, bytes(1 << 20))
        name = client.write_name(digest, compressor)
        assert await code_of(client.write(*write_requests(name, packed))) == "INVALID_ARGUMENT"

    async def test_bomb_of_tiny_frames_does_not_hold_up_others(self, client: Client) -> None:
        """A megabyte of empty frames, each of which costs a decoder: other calls are answered meanwhile."""
        data = b"bomb of frames" + client.function.name.encode()
        packed = compress("zstd", b"") * ((1 << 20) // 9) + compress("zstd", data)
        name = client.write_name(client.digest(data), "zstd")
        upload = asyncio.ensure_future(client.write(*write_requests(name, packed)))
        answered = 0
        while not upload.done():
            await client.missing(client.digest(b""))
            answered += 1
        assert await upload == len(packed)
        assert answered > 5

    async def test_bs_18_window_beyond_8_mib_is_refused(self, client: Client) -> None:
        """A frame header that asks for 2 GiB of memory."""
        huge_window = b"\x28\xb5\x2f\xfd" + bytes([0x00, 21 << 3]) + b"\x01\x00\x00"
        digest = client.digest(b"bs-18 window")
        request = write_requests(client.write_name(digest, "zstd"), huge_window)
        assert await code_of(client.write(*request)) == "INVALID_ARGUMENT"

    async def test_bs_35_offsets_count_compressed_bytes(self, client: Client) -> None:
        data = blob("bs-35", 100_000)
        packed = compress("zstd", data)
        name = client.write_name(client.digest(data), "zstd")
        wrong = [
            WriteRequest(resource_name=name, data=packed[:100]),
            WriteRequest(data=packed[100:], write_offset=50_000, finish_write=True),
        ]
        assert await code_of(client.write(*wrong)) == "INVALID_ARGUMENT"
        assert await client.write(*write_requests(name, packed, 100)) == len(packed)

    async def test_present_blob_is_still_read_to_the_end(self, client: Client) -> None:
        """Some clients fail on an early answer to a compressed upload."""
        data = blob("compressed again", 2_000_000)
        await client.upload(data)
        packed = compress("zstd", data)
        name = client.write_name(client.digest(data), "zstd")
        assert await client.write(*write_requests(name, packed, 100_000)) == len(packed)


class TestQueryWriteStatus:
    @pytest.mark.parametrize("compressor", ["", *COMPRESSORS])
    async def test_bs_45_present_blob_is_complete_under_any_name(self, client: Client, compressor: str) -> None:
        (digest,) = await client.upload(b"bs-45")
        answer = await query(client, client.write_name(digest, compressor))
        assert (answer.committed_size, answer.complete) == (5, True)

    async def test_bs_47_unknown_upload_stands_at_zero(self, client: Client) -> None:
        name = client.write_name(client.digest(b"bs-47 unknown"))
        answer = await query(client, name)
        assert (answer.committed_size, answer.complete) == (0, False)
        await client.write_blob(b"bs-47 unknown", name=name)
        assert (await query(client, name)).complete

    async def test_bs_46_unfinished_upload_is_not_complete(self, client: Client) -> None:
        data = b"bs-46 unfinished"
        name = client.write_name(client.digest(data))
        call = client.bytestream.Write(timeout=TIMEOUT_S)
        await call.write(WriteRequest(resource_name=name, data=data))
        answer = await query(client, name)
        assert (answer.committed_size, answer.complete) == (0, False)
        await call.write(WriteRequest(write_offset=len(data), finish_write=True))
        assert (await call).committed_size == len(data)
        assert (await query(client, name)).complete

    async def test_bs_48_download_name_is_invalid(self, client: Client) -> None:
        assert await code_of(query(client, client.read_name(client.digest(b"x")))) == "INVALID_ARGUMENT"


class TestBrokenUploads:
    async def test_bs_42_abandoned_uploads_leave_nothing(self, server: ReServer, client: Client) -> None:
        """Neither an open file nor a visible blob; the same name can be used again."""
        data = blob("bs-42", 4_000_000)
        name = client.write_name(client.digest(data))
        for _ in range(10):
            call = client.bytestream.Write(timeout=TIMEOUT_S)
            for request in write_requests(name, data, 1_500_000)[:2]:
                await call.write(request)
            call.cancel()
        wait_until(lambda: not open_blobs(server), timeout_s=10, what="no temporary file is open")
        assert await client.missing(client.digest(data)) == {client.digest(data)}
        assert await client.write_blob(data, name=name) == len(data)

    async def test_bs_47_upload_cut_by_the_death_of_the_server_starts_again_at_zero(
        self, start_server: StartServer
    ) -> None:
        server = start_server("killed")
        client = Client(server.address)
        data = blob("killed", 4_000_000)
        whole = blob("survives", 2_000_000)
        await client.write_blob(whole)
        name = client.write_name(client.digest(data))
        call = client.bytestream.Write(timeout=TIMEOUT_S)
        await call.write(write_requests(name, data, 3_000_000)[0])
        await query(client, name)
        server.kill()
        assert await code_of(call) == "UNAVAILABLE"
        await client.close()
        server.start()
        client = Client(server.address)
        assert (await query(client, name)).committed_size == 0
        assert await client.write_blob(data, name=name) == len(data)
        assert await client.read(client.read_name(client.digest(whole))) == whole
        await client.close()


def peak_memory(server: ReServer) -> int:
    """Return the most memory the server has used so far, in bytes."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def open_blobs(server: ReServer) -> list[str]:
    """Return the blobs and temporary files the server has open in its store."""
    found = []
    with os.scandir(f"/proc/{server.pid}/fd") as descriptors:
        for descriptor in descriptors:
            try:
                target = os.readlink(descriptor.path)
            except FileNotFoundError:
                continue
            if "/state/cas/" in target and not target.endswith("/lock"):
                found.append(target)
    return found


async def test_gen_23_small_questions_are_answered_during_large_uploads(server: ReServer, client: Client) -> None:
    """Eight uploads of 16 MB at once; no question meanwhile waits for their end."""
    uploads = [
        asyncio.ensure_future(client.write_blob(bytes([i]) * 16_000_000 + client.function.name.encode()))
        for i in range(8)
    ]
    slowest_s, asked = 0.0, 0
    loop = asyncio.get_running_loop()
    while not all(upload.done() for upload in uploads):
        start = loop.time()
        await client.missing(client.digest(b""))
        slowest_s, asked = max(slowest_s, loop.time() - start), asked + 1
    assert set(await asyncio.gather(*uploads)) == {16_000_000 + len(client.function.name)}
    assert asked >= 1
    assert slowest_s < 10
