"""The largest things clients ask for, and what another client feels meanwhile.

    python -m benchmarks.large_requests

from the top of the repository. One fresh `re-server` with stores in files; time of each request as its client sees it,
and the server's memory at its highest (VmHWM, which only grows). Everything is checked, not only timed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

from expbuild.reapi import (
    ActionResult,
    BatchUpdateBlobsRequest,
    DigestMessage,
    Directory,
    DirectoryNode,
    FileNode,
    FindMissingBlobsRequest,
    GetActionResultRequest,
    GetTreeRequest,
    OutputFile,
    ReadRequest,
    UpdateActionResultRequest,
    WriteRequest,
)
from tests.support.actions import Client
from tests.support.files import scratch_directory
from tests.support.server import ReServer, host_pool_config

STORED = 100_000
ASKED = 50_000
GIB = 1 << 30
CHUNK = 1 << 20
TIMEOUT_S = 300.0


def digest_of(data: bytes) -> DigestMessage:
    return DigestMessage(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


class Bench:
    """A server, its client, and a table that is printed line by line."""

    def __init__(self, server: ReServer, client: Client) -> None:
        self.server, self.client = server, client
        print("| request | seconds | server's memory at its highest, MiB |\n|---|---:|---:|")

    def row(self, what: str, began: float) -> None:
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        print(f"| {what} | {time.perf_counter() - began:.2f} | {peak / 1024:.0f} |", flush=True)

    async def upload(self, blobs: list[bytes]) -> None:
        """Upload small blobs in batches of 3 MB."""
        request, size = BatchUpdateBlobsRequest(), 0
        for i, data in enumerate(blobs):
            request.requests.add(digest=digest_of(data), data=data)
            size += len(data) + 100
            if size > 3_000_000 or i == len(blobs) - 1:
                answer = await self.client.cas.BatchUpdateBlobs(request, timeout=TIMEOUT_S)
                assert all(response.status.code == 0 for response in answer.responses)
                request, size = BatchUpdateBlobsRequest(), 0

    async def find_missing(self) -> None:
        stored = [b"stored %d" % i for i in range(STORED)]
        await self.upload(stored)
        half = ASKED // 2
        asked = [digest_of(data) for data in stored[:half]] + [digest_of(b"absent %d" % i) for i in range(half)]
        began = time.perf_counter()
        answer = await self.client.cas.FindMissingBlobs(FindMissingBlobsRequest(blob_digests=asked), timeout=TIMEOUT_S)
        assert list(answer.missing_blob_digests) == asked[half:]
        self.row(f"FindMissingBlobs of {ASKED:,} digests, half of them stored, in a store of {STORED:,}", began)

    async def one_gib(self) -> None:
        began = time.perf_counter()
        name = await self.write_gib(b"1")
        self.row("1 GiB up (ByteStream.Write)", began)
        began, received = time.perf_counter(), 0
        async for response in self.client.byte_stream.Read(ReadRequest(resource_name=name), timeout=TIMEOUT_S):
            received += len(response.data)
        assert received == GIB
        self.row("1 GiB down (ByteStream.Read)", began)

    async def write_gib(self, seed: bytes) -> str:
        """Upload a blob of 1 GiB and return the name to read it by."""
        chunk = hashlib.sha256(seed).digest() * (CHUNK // 32)
        whole = hashlib.sha256()
        for _ in range(GIB // CHUNK):
            whole.update(chunk)
        name = f"blobs/{whole.hexdigest()}/{GIB}"

        async def requests() -> AsyncIterator[WriteRequest]:
            for offset in range(0, GIB, CHUNK):
                resource = f"uploads/{os.urandom(8).hex()}/{name}" if offset == 0 else ""
                last = offset + CHUNK == GIB
                yield WriteRequest(resource_name=resource, write_offset=offset, data=chunk, finish_write=last)

        answer = await self.client.byte_stream.Write(requests(), timeout=TIMEOUT_S)
        assert answer.committed_size == GIB
        return name

    async def outputs(self) -> None:
        contents = [b"output %d" % i for i in range(10_000)]
        await self.upload(contents)
        result = ActionResult(
            output_files=[OutputFile(path=f"out/{i:05}", digest=digest_of(data)) for i, data in enumerate(contents)]
        )
        action = digest_of(b"an action of 10,000 outputs")
        update = UpdateActionResultRequest(action_digest=action, action_result=result)
        await self.client.action_cache.UpdateActionResult(update, timeout=TIMEOUT_S)
        began = time.perf_counter()
        request = GetActionResultRequest(action_digest=action)
        found = await self.client.action_cache.GetActionResult(request, timeout=TIMEOUT_S)
        assert len(found.output_files) == len(contents)
        self.row("GetActionResult with 10,000 output files", began)

    async def directory(self) -> None:
        contents = [b"entry %d" % (i % 100) for i in range(20_000)]
        directory = Directory(
            files=[FileNode(name=f"{i:05}", digest=digest_of(data)) for i, data in enumerate(contents)]
        ).SerializeToString()
        root = Directory(directories=[DirectoryNode(name="d", digest=digest_of(directory))]).SerializeToString()
        await self.upload([*contents[:100], directory, root])
        began, entries = time.perf_counter(), 0
        request = GetTreeRequest(root_digest=digest_of(root))
        async for page in self.client.cas.GetTree(request, timeout=TIMEOUT_S):
            entries += sum(len(found.files) for found in page.directories)
        assert entries == len(contents)
        self.row("GetTree with a Directory of 20,000 entries", began)

    async def interference(self) -> None:
        """Ask small questions on a connection of its own while 1 GiB is uploaded on another."""
        idle = await self.question_ms(until=asyncio.create_task(asyncio.sleep(3)))
        busy = await self.question_ms(until=asyncio.create_task(self.write_gib(b"2")))
        print("\n| FindMissingBlobs of one other client | p50, ms | p99, ms | questions |\n|---|---:|---:|---:|")
        for what, times in (("idle server", idle), ("during an upload of 1 GiB", busy)):
            cuts = statistics.quantiles(times, n=100)
            print(f"| {what} | {cuts[49]:.1f} | {cuts[98]:.1f} | {len(times):,} |")

    async def question_ms(self, until: asyncio.Task[object]) -> list[float]:
        asked = FindMissingBlobsRequest(blob_digests=[digest_of(b"stored %d" % i) for i in range(10)])
        times = []
        async with Client(self.server.address) as other:
            while not until.done():
                began = time.perf_counter()
                await other.cas.FindMissingBlobs(asked, timeout=TIMEOUT_S)
                times.append((time.perf_counter() - began) * 1000)
                await asyncio.sleep(0.005)
        await until
        return times


async def measure(server: ReServer) -> None:
    async with Client(server.address) as client:
        bench = Bench(server, client)
        await bench.find_missing()
        await bench.outputs()
        await bench.directory()
        await bench.one_gib()
        await bench.interference()


def main() -> None:
    with (
        scratch_directory("expbuild-large-") as directory,
        ReServer(directory / "server", host_pool_config(directory / "state")) as server,
    ):
        asyncio.run(measure(server))


if __name__ == "__main__":
    main()
