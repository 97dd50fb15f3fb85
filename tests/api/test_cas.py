"""FindMissingBlobs, BatchUpdateBlobs, BatchReadBlobs (conformance CAS-*, DIG-*)."""

from __future__ import annotations

import asyncio
import functools
import random
import zlib
from typing import Any

import grpc
import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.reapi import (
    BatchReadBlobsRequest,
    BatchUpdateBlobsRequest,
    BatchUpdateBlobsResponse,
    DigestMessage,
    FindMissingBlobsRequest,
    SpliceBlobRequest,
    SplitBlobRequest,
)
from tests.api.client import TIMEOUT_S, Client, Refusal, code_of, message, refusal
from tests.api.compress import COMPRESSORS, NUMBERS, compress, decompress
from tests.api.conftest import StartServer

Entry = BatchUpdateBlobsRequest.Request

ADVERTISED = 4_000_000
ENFORCED = 4 << 20
"""The batch limits of the default configuration: what clients are told, and what is refused."""


def codes(response: BatchUpdateBlobsResponse) -> list[str]:
    """Return the code of each entry's status, by name."""
    by_number = {code.value[0]: code.name for code in grpc.StatusCode}
    return [by_number[entry.status.code] for entry in response.responses]


async def find_missing(client: Client, *digests: DigestMessage, digest_function: int = 0) -> list[DigestMessage]:
    request = FindMissingBlobsRequest(
        blob_digests=digests,
        digest_function=digest_function,  # type: ignore[arg-type]  # a number as it may come over the wire
    )
    return list((await client.cas.FindMissingBlobs(request, timeout=TIMEOUT_S)).missing_blob_digests)


class TestFindMissing:
    async def test_cas_01_exactly_the_absent_digests_are_returned(self, client: Client) -> None:
        stored = await client.upload(b"cas-01 a", b"cas-01 b")
        absent = [client.digest(b"cas-01 absent %d" % i) for i in range(5)]
        assert await client.missing(*stored, *absent) == set(absent)

    async def test_cas_01_duplicates_are_answered_once(self, client: Client) -> None:
        absent = message(client.digest(b"cas-01 never stored"))
        assert await find_missing(client, absent, absent, digest_function=client.function.value) == [absent]

    async def test_cas_02_empty_list_is_answered_empty(self, client: Client) -> None:
        assert await find_missing(client) == []
        absent = message(client.digest(b"cas-02 never stored"))
        assert await find_missing(client, absent, digest_function=client.function.value) == [absent]

    async def test_dig_05_empty_blob_is_never_missing(self, client: Client) -> None:
        absent = client.digest(b"dig-05 never stored")
        assert await client.missing(client.digest(b""), absent) == {absent}

    async def test_dig_03_right_hash_with_wrong_size_is_absent(self, client: Client) -> None:
        (stored,) = await client.upload(b"dig-03")
        wrong = Digest(stored.hash, stored.size_bytes + 1, client.function)
        assert await client.missing(stored, wrong) == {wrong}

    async def test_dig_06_empty_hash_with_a_size_is_absent(self, client: Client) -> None:
        wrong = Digest(client.function.empty_hash, 5, client.function)
        assert await client.missing(wrong) == {wrong}

    async def test_dig_14_functions_do_not_share_blobs(self, sha256_client: Client) -> None:
        """A BLAKE3 digest with the hash of a stored SHA256 blob names nothing."""
        (stored,) = await sha256_client.upload(b"dig-14")
        assert await find_missing(sha256_client, message(stored), digest_function=9) == [message(stored)]
        assert await find_missing(sha256_client, message(stored), digest_function=1) == []

    async def test_dig_08_function_is_inferred_from_the_hash_length(self, sha256_client: Client) -> None:
        (stored,) = await sha256_client.upload(b"dig-08")
        assert await find_missing(sha256_client, message(stored)) == []

    @pytest.mark.parametrize(
        ("hash_text", "size_bytes", "function"),
        [
            pytest.param("AB" * 32, 1, 0, id="DIG-01-upper-case"),
            pytest.param("g" * 64, 1, 0, id="DIG-01-not-hex"),
            pytest.param("a" * 63, 1, 0, id="DIG-01-short"),
            pytest.param("a" * 65, 1, 0, id="DIG-01-long"),
            pytest.param("", 0, 0, id="DIG-01-unset"),
            pytest.param("a" * 64 + "\n", 1, 0, id="DIG-01-line-feed"),
            pytest.param("../" * 21 + "a", 1, 0, id="DIG-01-path"),
            pytest.param("\u0661" * 64, 1, 0, id="DIG-01-other-digits"),
            pytest.param("a" * 64, -1, 0, id="DIG-02-negative-size"),
            pytest.param("a" * 64, -(2**63), 0, id="DIG-02-most-negative-size"),
            pytest.param("a" * 64, 0, 0, id="DIG-06-size-0-of-another-hash"),
            pytest.param("a" * 40, 1, 1, id="DIG-07-length-of-another-function"),
            pytest.param("a" * 40, 1, 0, id="DIG-08-length-of-a-function-not-served"),
            pytest.param("a" * 40, 1, 2, id="DIG-09-SHA1-not-served"),
            pytest.param("a" * 64, 1, 8, id="DIG-09-SHA256TREE"),
            pytest.param("a" * 40, 1, 10, id="DIG-18-GITSHA1"),
            pytest.param("a" * 64, 1, 77, id="GEN-15-unknown-number"),
            pytest.param("a" * 64, 1, -1, id="GEN-15-negative-number"),
        ],
    )
    async def test_cas_05_one_malformed_digest_fails_the_call(
        self, sha256_client: Client, hash_text: str, size_bytes: int, function: int
    ) -> None:
        bad = DigestMessage(hash=hash_text, size_bytes=size_bytes)
        good = message(sha256_client.digest(b"fine"))
        assert await code_of(find_missing(sha256_client, bad, digest_function=function)) == "INVALID_ARGUMENT"
        assert await code_of(find_missing(sha256_client, good, bad, digest_function=function)) == "INVALID_ARGUMENT"

    async def test_dig_10_mixed_hash_lengths_fail_the_call(self, sha256_client: Client) -> None:
        good, other = b"dig-10", DigestFunction.SHA512.digest_of(b"dig-10")
        call = find_missing(sha256_client, message(sha256_client.digest(good)), message(other))
        answer = await refusal(call)
        assert answer == Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{other.hash!r} is not a SHA256 hash: expected 64 lower-case hex digits",
        )

    async def test_gen_06_cas_06_request_of_5_mib_is_served_without_delaying_others(
        self, sha256_client: Client
    ) -> None:
        """80,000 digests, the first 200 of them stored; a small question meanwhile is answered as well."""
        client = sha256_client
        rng = random.Random(6)
        known = await client.upload(*(rng.randbytes(9) for _ in range(200)))
        many = [Digest(rng.randbytes(32).hex(), 9, client.function) for _ in range(80_000 - len(known))]
        request = FindMissingBlobsRequest(
            blob_digests=map(message, [*known, *many]),
            digest_function=client.function.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
        )
        assert request.ByteSize() > 5 << 20
        # The answer is as large as the question: this client must be willing to receive it.
        async with grpc.aio.insecure_channel(
            client.address, options=[("grpc.max_receive_message_length", 16 << 20)]
        ) as channel:
            path = "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs"
            ask = channel.unary_unary(
                path,
                request_serializer=FindMissingBlobsRequest.SerializeToString,
                response_deserializer=type(await client.cas.FindMissingBlobs(FindMissingBlobsRequest())).FromString,
            )
            large = asyncio.ensure_future(ask(request, timeout=TIMEOUT_S))
            small = asyncio.ensure_future(client.missing(known[0]))
            await asyncio.wait([large, small])
        assert small.result() == set()
        assert {(m.hash, m.size_bytes) for m in large.result().missing_blob_digests} == {(d.hash, 9) for d in many}


class TestBatchUpdate:
    async def test_cas_08_each_entry_is_answered_in_order_with_its_digest(self, client: Client) -> None:
        blobs = [b"cas-08 a", b"cas-08 b", b"", b"cas-08 a"]
        response = await client.update(*(Entry(digest=message(client.digest(b)), data=b) for b in blobs))
        assert [entry.digest for entry in response.responses] == [message(client.digest(blob)) for blob in blobs]
        assert codes(response) == ["OK"] * 4

    async def test_cas_16_blob_is_visible_on_another_connection_at_once(self, client: Client) -> None:
        (digest,) = await client.upload(b"cas-16")
        other = Client(client.address, client.function)
        assert await other.missing(digest) == set()
        await other.close()

    async def test_cas_09_10_bad_entries_fail_alone_and_store_nothing(self, client: Client) -> None:
        good = b"cas-09 good"
        digest = client.digest(b"cas-09 wanted")
        other_length = DigestFunction.SHA512.digest_of(b"cas-09")
        response = await client.update(
            Entry(digest=message(client.digest(good)), data=good),
            Entry(digest=message(digest), data=b"cas-09 w@nted"),
            Entry(digest=message(digest), data=b"cas-09 wante"),
            Entry(digest=message(digest), data=b"cas-09 wanted!"),
            Entry(digest=DigestMessage(hash=digest.hash, size_bytes=-1), data=b"x"),
            Entry(digest=DigestMessage(hash="no", size_bytes=1), data=b"x"),
            Entry(digest=message(other_length), data=b"cas-09"),
            Entry(data=b"no digest"),
            Entry(digest=DigestMessage(hash=client.function.empty_hash), data=b"not empty"),
        )
        assert codes(response) == ["OK"] + ["INVALID_ARGUMENT"] * 8
        assert await client.missing(client.digest(good), digest) == {digest}

    async def test_cas_09_a_malformed_first_digest_does_not_fail_the_others(self, client: Client) -> None:
        good = b"cas-09 second"
        response = await client.update(
            Entry(digest=DigestMessage(hash="zz", size_bytes=1), data=b"x"),
            Entry(digest=message(client.digest(good)), data=good),
        )
        assert codes(response) == ["INVALID_ARGUMENT", "OK"]

    async def test_cas_14_present_and_empty_blobs_are_ok(self, client: Client) -> None:
        await client.upload(b"cas-14")
        await client.upload(b"cas-14", b"")

    @pytest.mark.parametrize("compressor", COMPRESSORS)
    @pytest.mark.duty("CAP-09")
    async def test_cap_14_compressed_entries_are_stored_under_the_digest_of_their_content(
        self, client: Client, compressor: str
    ) -> None:
        blobs = [f"{compressor} ".encode() * count for count in (1, 1000, 100_000)]
        response = await client.update(
            *(
                Entry(
                    digest=message(client.digest(blob)),
                    data=compress(compressor, blob),
                    compressor=NUMBERS[compressor],  # type: ignore[arg-type]  # numbers as on the wire
                )
                for blob in blobs
            )
        )
        assert codes(response) == ["OK"] * 3
        assert [e.data for e in (await client.batch_read(*map(client.digest, blobs))).responses] == blobs

    @pytest.mark.parametrize("compressor", COMPRESSORS)
    async def test_cas_13_broken_streams_and_bombs_fail_alone(self, client: Client, compressor: str) -> None:
        """A bomb of 256 MiB is stopped at the size its digest names; a digest that names it all is refused."""
        blob = f"cas-13 {compressor} ".encode() * 100
        packed = compress(compressor, blob)
        bomb = _bomb(compressor, 256 << 20)
        digest = message(client.digest(blob))
        number = NUMBERS[compressor]
        response = await client.update(
            *(
                Entry(digest=digest, data=data, compressor=number)  # type: ignore[arg-type]  # as on the wire
                for data in (
                    packed[:-1],
                    packed + b"garbage",
                    packed[:10] + b"\xff\xff" + packed[12:],
                    b"",
                    blob,
                    compress(compressor, blob + b"!"),
                    compress(compressor, blob[:-1]),
                    bomb,
                )
            ),
            Entry(
                digest=DigestMessage(hash=digest.hash, size_bytes=256 << 20),
                data=bomb,
                compressor=number,  # type: ignore[arg-type]  # as on the wire
            ),
            Entry(digest=digest, data=packed, compressor=number),  # type: ignore[arg-type]  # as on the wire
        )
        assert codes(response) == ["INVALID_ARGUMENT"] * 9 + ["OK"]

    @pytest.mark.parametrize("number", [3, 4, 99, -1])
    async def test_cas_12_compressor_that_is_not_advertised_fails_its_entry(self, client: Client, number: int) -> None:
        blob = b"cas-12"
        response = await client.update(
            Entry(digest=message(client.digest(blob)), data=blob, compressor=number),  # type: ignore[arg-type]  # ditto
            Entry(digest=message(client.digest(b"ok")), data=b"ok"),
        )
        assert codes(response) == ["INVALID_ARGUMENT", "OK"]

    async def test_cas_11_limit_is_exact_and_beyond_it_nothing_is_stored(self, client: Client) -> None:
        one = b"\x01" * (ENFORCED - 5)
        await client.upload(one, b"cas11")
        two = b"\x02" * (ENFORCED - 5)
        call = client.update(*(Entry(digest=message(client.digest(b)), data=b) for b in (two, b"cas-11")))
        assert await refusal(call) == Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the blobs of this batch are {ENFORCED + 1} bytes together; at most {ENFORCED} are allowed "
            "(max_batch_total_size_bytes); use ByteStream for large blobs",
        )
        assert await client.missing(client.digest(two), client.digest(b"cas-11")) == {
            client.digest(two),
            client.digest(b"cas-11"),
        }

    async def test_cap_11_limit_counts_the_bytes_carried(self, client: Client) -> None:
        """Clients fill batches by compressed size: 12 MB that travel as a few KB are accepted."""
        blobs = [bytes([i]) * 6_000_000 for i in range(2)]
        response = await client.update(
            *(Entry(digest=message(client.digest(b)), data=compress("zstd", b), compressor=1) for b in blobs)  # type: ignore[arg-type]  # ditto
        )
        assert codes(response) == ["OK", "OK"]

    async def test_gen_06_thousands_of_one_byte_entries_are_accepted(self, sha256_client: Client) -> None:
        entries = [Entry(digest=message(sha256_client.digest(b"1")), data=b"1")] * 5000
        assert codes(await sha256_client.update(*entries)) == ["OK"] * 5000

    async def test_millions_of_empty_entries_are_refused_unseen(self, sha256_client: Client) -> None:
        path = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs"
        send: Any = sha256_client.channel.unary_unary(path)
        assert await refusal(send(b"\x12\x00" * 2_000_000, timeout=TIMEOUT_S)) == Refusal(
            grpc.StatusCode.INVALID_ARGUMENT, "the batch has 2000000 entries; at most 250000 are allowed"
        )


@functools.cache
def _bomb(compressor: str, size_bytes: int) -> bytes:
    """Return zeros compressed, without ever holding them all."""
    if compressor == "deflate":
        stream = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
        return b"".join(stream.compress(bytes(1 << 20)) for _ in range(size_bytes >> 20)) + stream.flush()
    return compress("zstd", bytes(1 << 20)) * (size_bytes >> 20)


class TestBatchRead:
    async def test_cas_17_23_every_digest_is_answered_in_order(self, client: Client) -> None:
        a, b = await client.upload(b"cas-17 a", b"cas-17 b")
        absent, empty = client.digest(b"cas-17 absent"), client.digest(b"")
        response = await client.batch_read(a, absent, b, empty, a)
        assert [(e.digest, e.data, e.status.code) for e in response.responses] == [
            (message(a), b"cas-17 a", 0),
            (message(absent), b"", 5),
            (message(b), b"cas-17 b", 0),
            (message(empty), b"", 0),
            (message(a), b"cas-17 a", 0),
        ]
        assert response.responses[1].status.message == f"blob {absent} is not in the CAS"

    async def test_cas_23_empty_list_is_ok(self, client: Client) -> None:
        assert list((await client.batch_read()).responses) == []
        assert len((await client.batch_read(client.digest(b"cas-23 never stored"))).responses) == 1

    async def test_dig_03_right_hash_with_wrong_size_is_not_found(self, client: Client) -> None:
        (stored,) = await client.upload(b"dig-03 read")
        response = await client.batch_read(Digest(stored.hash, stored.size_bytes - 1, client.function))
        assert [e.status.code for e in response.responses] == [5]

    @pytest.mark.parametrize(
        "digest", [DigestMessage(hash="a" * 64, size_bytes=-5), DigestMessage(hash="x"), DigestMessage()]
    )
    async def test_dig_10_malformed_digest_fails_the_call(self, sha256_client: Client, digest: DigestMessage) -> None:
        good = message(sha256_client.digest(b""))
        call = sha256_client.cas.BatchReadBlobs(BatchReadBlobsRequest(digests=[good, digest]), timeout=TIMEOUT_S)
        assert await code_of(call) == "INVALID_ARGUMENT"

    async def test_cas_18_20_limit_is_exact(self, client: Client) -> None:
        """What we advertise can be read in one call by a client with a receive limit of 4 MiB; too much is refused."""
        blobs = [random.Random(size).randbytes(size) for size in (3_000_000, 999_990, 10)]
        digests = [*await client.upload(*blobs)]
        response = await client.batch_read(*digests)
        assert [entry.data for entry in response.responses] == blobs
        beyond = Digest("a" * 64, ENFORCED - ADVERTISED + 1, client.function)
        assert await refusal(client.batch_read(*digests, beyond)) == Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the blobs of this batch are {ENFORCED + 1} bytes together; at most {ENFORCED} are allowed "
            "(max_batch_total_size_bytes); use ByteStream for large blobs",
        )

    async def test_gen_07_a_full_batch_of_many_small_blobs_fits_into_one_message(self, sha256_client: Client) -> None:
        client = sha256_client
        rng = random.Random(7)
        blobs = [rng.randbytes(ADVERTISED // 1000) for _ in range(1000)]
        digests = await client.upload(*blobs)
        response = await client.batch_read(*digests)
        assert [entry.data for entry in response.responses] == blobs

    async def test_gen_07_what_does_not_fit_is_said_per_entry(self, client: Client) -> None:
        """Between the advertised and the enforced limit: the message stays receivable, the client may ask again."""
        rng = random.Random(8)
        blobs = [rng.randbytes(ENFORCED // 100) for _ in range(100)]
        digests = await client.upload(*blobs)
        response = await client.batch_read(*digests)
        assert response.ByteSize() < 4 << 20
        for blob, entry in zip(blobs, response.responses, strict=True):
            assert (entry.data, entry.status.code) in ((blob, 0), (b"", 8))
        refused = [e.status for e in response.responses if e.status.code]
        assert 0 < len(refused) < len(blobs)
        assert refused[0].message == "the response is full; ask again for this blob"

    async def test_gen_07_ten_thousand_absent_blobs_fit_into_one_message(self, client: Client) -> None:
        digests = [Digest(f"{i:064x}", 400, client.function) for i in range(10_000)]
        assert {e.status.code for e in (await client.batch_read(*digests)).responses} == {5}
        assert await code_of(client.batch_read(*digests, digests[0])) == "INVALID_ARGUMENT"

    @pytest.mark.parametrize("compressor", COMPRESSORS)
    async def test_cas_19_25_answer_is_compressed_as_accepted_however_it_was_uploaded(
        self, client: Client, compressor: str
    ) -> None:
        blob, noise = b"cas-19 " * 1000, random.Random(19).randbytes(5000)
        digests = await client.upload(blob, noise, b"")
        response = await client.batch_read(*digests, accept=[NUMBERS[compressor]])
        packed, raw, empty = response.responses
        assert packed.compressor == NUMBERS[compressor]
        assert len(packed.data) < len(blob)
        assert decompress(compressor, packed.data) == blob
        assert (raw.compressor, raw.data) == (0, noise), "what does not shrink comes as it is"
        assert (empty.compressor, empty.data) == (0, b"")

    @pytest.mark.parametrize(("accept", "used"), [([], 0), ([0], 0), ([3, 99], 0), ([3, 2, 1], 2), ([0, 1], 0)])
    async def test_cas_19_first_accepted_compressor_that_is_served_is_used(
        self, client: Client, accept: list[int], used: int
    ) -> None:
        (digest,) = await client.upload(b"cas-19 order " * 1000)
        assert [e.compressor for e in (await client.batch_read(digest, accept=accept)).responses] == [used]


@pytest.mark.duty("DIG-19")
async def test_dig_01_09_other_functions_work_when_configured(start_server: StartServer) -> None:
    """Explicitly named or told by the length of the hash."""
    server = start_server("all-functions", capabilities={"digest_functions": [f.name for f in DigestFunction]})
    for function in DigestFunction:
        client = Client(server.address, function)
        (digest,) = await client.upload(b"every function")
        assert await client.read(client.read_name(digest)) == b"every function"
        expected = [message(digest)] if function is DigestFunction.BLAKE3 and _shadowed(function) else []
        assert await find_missing(client, message(digest)) == expected
        await client.close()


@pytest.mark.parametrize(
    ("size", "hash_text"),
    [
        (1025, "36c0998b21839ef74300b9de47d96d1f62323dc81f2b4231e98ce70cd6ffe750"),
        (3073, "517d20c0e5835f060a1bd6388ed68574f63424bdac2a2c3a35a5c2ef859d8fe2"),
        (102_400, "0668d69e5331840d2f1823d717b7b3f5d1fdc8a09504cddb692b87ff83d50e5f"),
    ],
)
async def test_dig_15_sha256tree_is_the_published_function(
    start_server: StartServer, size: int, hash_text: str
) -> None:
    """Hashes from outside, of the bytes 0, 1, …, 250, 0, 1, …: accepted in a batch and in an upload."""
    server = start_server("all-functions", capabilities={"digest_functions": [f.name for f in DigestFunction]})
    client = Client(server.address, DigestFunction.SHA256TREE)
    data = bytes(i % 251 for i in range(size))
    entry = Entry(digest=DigestMessage(hash=hash_text, size_bytes=size), data=data)
    assert codes(await client.update(entry)) == ["OK"]
    digest = Digest(hash_text, size, DigestFunction.SHA256TREE)
    assert await client.write_blob(data, name=client.write_name(digest)) == size
    assert await client.read(client.read_name(digest)) == data
    await client.close()


def _shadowed(function: DigestFunction) -> bool:
    """Whether another function's hashes are equally long, so that the length cannot mean this one."""
    return any(f.hash_length == function.hash_length for f in DigestFunction if f is not function)


@pytest.mark.parametrize("method", ["SplitBlob", "SpliceBlob"])
async def test_chk_01_rpcs_that_are_not_advertised_are_unimplemented(sha256_client: Client, method: str) -> None:
    request = SplitBlobRequest() if method == "SplitBlob" else SpliceBlobRequest()
    answer = await refusal(getattr(sha256_client.cas, method)(request, timeout=TIMEOUT_S))
    assert answer == Refusal(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
