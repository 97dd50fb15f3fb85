"""A plain client: the stubs of every service on one channel, and the steps most tests need."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from expbuild.digest import Digest, DigestFunction
from expbuild.reapi import (
    ActionCacheStub,
    BatchReadBlobsRequest,
    BatchReadBlobsResponse,
    BatchUpdateBlobsRequest,
    BatchUpdateBlobsResponse,
    ByteStreamStub,
    CapabilitiesStub,
    ContentAddressableStorageStub,
    DigestMessage,
    ExecutionStub,
    FindMissingBlobsRequest,
    ReadRequest,
    WriteRequest,
)
from tests.support.server import patience

TIMEOUT_S = patience(30.0)
"""Far beyond what any call here takes, so that a call that hangs fails its test and not the whole run."""


def message(digest: Digest) -> DigestMessage:
    """Return the wire form of a digest."""
    return DigestMessage(hash=digest.hash, size_bytes=digest.size_bytes)


class Client:
    """A client of one server that uses one digest function and one instance.

    Its receive limit is gRPC's default of 4 MiB, like that of real clients.
    """

    def __init__(self, address: str, function: DigestFunction = DigestFunction.SHA256, instance_name: str = "") -> None:
        self.address = address
        self.function = function
        self.instance_name = instance_name
        self.channel = grpc.aio.insecure_channel(address)
        # The generated async stubs exist only for the type checker; at run time a stub serves both kinds of channel.
        self.capabilities: Any = CapabilitiesStub(self.channel)
        self.cas: Any = ContentAddressableStorageStub(self.channel)
        self.bytestream: Any = ByteStreamStub(self.channel)
        self.action_cache: Any = ActionCacheStub(self.channel)
        self.execution: Any = ExecutionStub(self.channel)
        self._blocking_channel = grpc.insecure_channel(address)
        self._blocking: Any = ByteStreamStub(self._blocking_channel)  # type: ignore[arg-type]  # the stubs say async

    async def close(self) -> None:
        await self.channel.close()
        self._blocking_channel.close()

    def digest(self, data: bytes) -> Digest:
        return self.function.digest_of(data)

    async def missing(self, *digests: Digest) -> set[Digest]:
        """Ask FindMissingBlobs."""
        request = FindMissingBlobsRequest(
            instance_name=self.instance_name,
            digest_function=self.function.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
            blob_digests=map(message, digests),
        )
        response = await self.cas.FindMissingBlobs(request, timeout=TIMEOUT_S)
        return {Digest(m.hash, m.size_bytes, self.function) for m in response.missing_blob_digests}

    async def upload(self, *blobs: bytes) -> list[Digest]:
        """Store blobs by BatchUpdateBlobs; every one must be accepted."""
        response = await self.update(
            *(BatchUpdateBlobsRequest.Request(digest=message(self.digest(b)), data=b) for b in blobs)
        )
        assert [entry.status.code for entry in response.responses] == [0] * len(blobs)
        return [self.digest(blob) for blob in blobs]

    async def update(self, *entries: BatchUpdateBlobsRequest.Request) -> BatchUpdateBlobsResponse:
        """Call BatchUpdateBlobs."""
        request = BatchUpdateBlobsRequest(
            instance_name=self.instance_name,
            digest_function=self.function.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
            requests=entries,
        )
        response: BatchUpdateBlobsResponse = await self.cas.BatchUpdateBlobs(request, timeout=TIMEOUT_S)
        return response

    async def batch_read(self, *digests: Digest, accept: Iterable[int] = ()) -> BatchReadBlobsResponse:
        """Call BatchReadBlobs."""
        request = BatchReadBlobsRequest(
            instance_name=self.instance_name,
            digest_function=self.function.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
            digests=map(message, digests),
            acceptable_compressors=accept,  # type: ignore[arg-type]  # numbers as they may come over the wire
        )
        response: BatchReadBlobsResponse = await self.cas.BatchReadBlobs(request, timeout=TIMEOUT_S)
        return response

    def read_name(self, digest: Digest, compressor: str = "") -> str:
        kind = f"compressed-blobs/{compressor}" if compressor else "blobs"
        return "/".join(filter(None, (self.instance_name, kind, str(digest))))

    def write_name(self, digest: Digest, compressor: str = "", upload_id: str = "") -> str:
        kind = f"compressed-blobs/{compressor}" if compressor else "blobs"
        upload = f"uploads/{upload_id or uuid.uuid4()}"
        return "/".join(filter(None, (self.instance_name, upload, kind, str(digest))))

    async def read(self, name: str, *, offset: int = 0, limit: int = 0) -> bytes:
        """Call Read and return all it sends."""
        request = ReadRequest(resource_name=name, read_offset=offset, read_limit=limit)
        return b"".join([part.data async for part in self.bytestream.Read(request, timeout=TIMEOUT_S)])

    async def write(self, *requests: WriteRequest) -> int:
        """Call Write with these messages and return the committed size."""
        # By a blocking stub: when the server ends a call that is still sending, grpc.aio often reports "INTERNAL:
        # Internal error from Core" in place of the status it was sent.
        response = await asyncio.to_thread(self._blocking.Write, iter(requests), timeout=TIMEOUT_S)
        return int(response.committed_size)

    async def write_blob(self, data: bytes, *, chunk: int = 1 << 20, name: str = "") -> int:
        """Upload a blob by Write in chunks and return the committed size."""
        return await self.write(*write_requests(name or self.write_name(self.digest(data)), data, chunk))


def write_requests(name: str, data: bytes, chunk: int = 1 << 20) -> list[WriteRequest]:
    """Return the messages of an upload: the name in the first one, `finish_write` in the last."""
    starts = range(0, len(data), chunk) if data else range(1)
    requests = [WriteRequest(write_offset=start, data=data[start : start + chunk]) for start in starts]
    requests[0].resource_name = name
    requests[-1].finish_write = True
    return requests


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call failed."""

    code: grpc.StatusCode
    message: str


async def refusal(call: Awaitable[object]) -> Refusal:
    """Return the status a call fails with. Raises AssertionError when it succeeds."""
    try:
        result = await call
    except grpc.RpcError as error:
        return Refusal(error.code(), error.details() or "")
    raise AssertionError(f"succeeded with {result!r:.300}")


async def code_of(call: Awaitable[object]) -> str:
    """Return the name of the status code a call fails with. Raises AssertionError when it succeeds."""
    return (await refusal(call)).code.name
