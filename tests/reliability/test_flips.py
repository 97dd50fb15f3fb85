"""Bits flip, files shrink and vanish under a running server: nothing wrong is served, and uploading again heals all."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import Code
from expbuild.reapi import ActionResult, BatchReadBlobsRequest, OutputFile, ReadRequest
from expbuild.storage.files import blob_name
from tests.reliability.load import content
from tests.support.actions import Blobs, Client, put, shell, subject, to_message
from tests.support.files import scratch_directory
from tests.support.require import only_in_full_runs
from tests.support.server import ReServer, host_pool_config

SHA256 = DigestFunction.SHA256
KINDS = ("flip", "flip-silently", "truncate", "delete", "zeros")


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory("expbuild-flips-") as path:
        yield path


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Damage one file. `flip-silently` and `zeros` are what disks and power cuts do: no time changes."""
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    seen = path.stat()
    match kind:
        case "delete":
            path.unlink()
            return
        case "truncate":
            del data[rng.randrange(len(data)) :]
        case "zeros":
            data = bytearray(len(data))
        case _:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    if kind in ("flip-silently", "zeros"):
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


async def read_batch(client: Client, digests: list[Digest]) -> dict[str, tuple[int, bytes]]:
    """Return code and data of each."""
    request = BatchReadBlobsRequest(digests=map(to_message, digests))
    answer = await client.cas.BatchReadBlobs(request, timeout=60)
    return {entry.digest.hash: (entry.status.code, entry.data) for entry in answer.responses}


async def read_stream(client: Client, digest: Digest) -> tuple[grpc.StatusCode, bytes]:
    got = b""
    call = client.byte_stream.Read(ReadRequest(resource_name=subject(to_message(digest))), timeout=60)
    try:
        async for response in call:
            got += response.data
    except grpc.aio.AioRpcError as error:
        return error.code(), got
    return grpc.StatusCode.OK, got


async def run(scratch: Path, count: int) -> None:
    rng = random.Random(count)
    cas = scratch / "state" / "cas"
    with ReServer(scratch / "server", host_pool_config(scratch / "state")) as server:
        async with Client(server.address) as client:
            blobs: Blobs = {}
            for number in range(count):
                size = 3_000_000 if number % 100 == 0 else rng.randint(1, 20_000)
                put(blobs, content(number, size))
            small = {digest: data for digest, data in blobs.items() if len(data) < 1_000_000}
            large = {digest: data for digest, data in blobs.items() if digest not in small}
            await upload_all(client, blobs)
            for digest in blobs:
                damage(cas / blob_name(digest), rng.choice(KINDS), rng)

            served = 0
            for batch in batches(small):
                for hash_text, (code, data) in (await read_batch(client, batch)).items():
                    served += code == Code.OK
                    assert code in (Code.OK, Code.NOT_FOUND), code
                    assert code == Code.NOT_FOUND or SHA256.digest_of(data).hash == hash_text
            for digest in large:
                ended, got = await read_stream(client, digest)
                assert ended in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED)
                assert len(got) < digest.size_bytes
            assert served <= count // 100, "only a flip of zeros into zeros is none"

            missing = len(await client.find_missing(blobs))
            assert missing >= count - served
            await upload_all(client, blobs)
            assert await client.find_missing(blobs) == []
            for digest in blobs:
                assert SHA256.digest_of(await client.read(to_message(digest))) == digest


async def upload_all(client: Client, blobs: Blobs) -> None:
    for batch in batches(blobs):
        await client.upload({digest: blobs[digest] for digest in batch})


def batches(blobs: Blobs) -> Iterator[list[Digest]]:
    batch: list[Digest] = []
    size = 0
    for digest in blobs:
        if batch and size + digest.size_bytes > 3_500_000:
            yield batch
            batch, size = [], 0
        batch.append(digest)
        size += digest.size_bytes
    if batch:
        yield batch


@pytest.mark.timeout(300)
async def test_a_thousand_damaged_blobs_are_found_and_heal(scratch: Path) -> None:
    await run(scratch, 1000)


@only_in_full_runs
@pytest.mark.timeout(3600)
async def test_twenty_thousand_damaged_blobs_are_found_and_heal(scratch: Path) -> None:
    await run(scratch, 20_000)


async def test_damaged_results_are_misses_and_damaged_inputs_are_asked_for(scratch: Path) -> None:
    rng = random.Random(7)
    with ReServer(scratch / "server", host_pool_config(scratch / "state")) as server:
        async with Client(server.address) as client:
            blobs: Blobs = {}
            output = put(blobs, b"output")
            await client.upload(blobs)
            actions = [shell("planted") for _ in range(100)]
            for action in actions:
                await client.plant(action, ActionResult(output_files=[OutputFile(path="out", digest=output)]))
            files = [path for path in (scratch / "state" / "action-cache").glob("*/sha256/*/*") if path.is_file()]
            assert len(files) == 100
            for path in files:
                damage(path, rng.choice(KINDS), rng)
            for action in actions:
                assert await client.cached(action) is None

            action = shell("cat in > out", inputs={"in": b"input of an action"}, output_paths=["out"])
            await client.upload(action.blobs)
            digest = SHA256.digest_of(b"input of an action")
            damage(scratch / "state" / "cas" / blob_name(digest), "flip", rng)
            response = (await client.call(action).finish()).response
            assert response.status.code == Code.FAILED_PRECONDITION
            await client.upload(action.blobs)
            result = (await client.execute(action)).result
            assert result.output_files[0].digest == to_message(digest)
