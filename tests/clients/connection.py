"""What the fakes have in common: a channel, the stubs on it, and how an operation's answer is taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from expbuild.reapi import (
    ActionCacheStub,
    BatchUpdateBlobsRequest,
    ByteStreamStub,
    CapabilitiesStub,
    ContentAddressableStorageStub,
    ExecuteResponse,
    ExecutionStub,
    GetCapabilitiesRequest,
    Operation,
    OperationsStub,
    ReadRequest,
    RequestMetadata,
    ServerCapabilities,
    ToolDetails,
    WriteRequest,
)
from tests.clients.actions import ClientError

METADATA_KEY = "build.bazel.remote.execution.v2.requestmetadata-bin"


class Connection:
    """One channel of a client. What a client adds is in its own module; an `async with` ends the channel."""

    tool_name = "unknown"
    metadata_key = METADATA_KEY
    channel_options: Sequence[tuple[str, Any]] = ()

    def __init__(self, address: str, instance: str) -> None:
        self.instance = instance
        self.channel = grpc.aio.insecure_channel(address, options=list(self.channel_options))
        self.capabilities = CapabilitiesStub(self.channel)
        self.cas = ContentAddressableStorageStub(self.channel)
        self.bytestream = ByteStreamStub(self.channel)
        self.action_cache = ActionCacheStub(self.channel)
        self.execution = ExecutionStub(self.channel)
        self.operations = OperationsStub(self.channel)
        who = RequestMetadata(tool_details=ToolDetails(tool_name=self.tool_name), tool_invocation_id="an-invocation")
        self.metadata = ((self.metadata_key, who.SerializeToString()),)

    async def ask_capabilities(self, timeout_s: float | None = None) -> ServerCapabilities:
        request = GetCapabilitiesRequest(instance_name=self.instance)
        return await self.capabilities.GetCapabilities(request, metadata=self.metadata, timeout=timeout_s)

    def name(self, resource: str) -> str:
        """Return a resource name within the instance."""
        return f"{self.instance}/{resource}" if self.instance else resource

    async def read(self, resource: str) -> bytes:
        """Return all that a ByteStream read gives."""
        stream = self.bytestream.Read(ReadRequest(resource_name=self.name(resource)), metadata=self.metadata)
        return b"".join([response.data async for response in stream])

    async def update(self, blobs: BatchUpdateBlobsRequest, timeout_s: float | None = None) -> None:
        """Send a batch of blobs. Raises ClientError when any of them is not taken."""
        answer = await self.cas.BatchUpdateBlobs(blobs, metadata=self.metadata, timeout=timeout_s)
        if len(answer.responses) != len(blobs.requests) or any(entry.status.code for entry in answer.responses):
            raise ClientError(f"batch update failed: {answer}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close()


def response_of(operation: Operation) -> ExecuteResponse:
    """Return the answer of a finished operation. Raises ClientError where every client would complain."""
    assert operation.done
    if operation.HasField("error"):
        raise ClientError(f"bad response: error instead of response: {operation.error.message}")
    response = ExecuteResponse()
    if not operation.response.Unpack(response):
        raise ClientError(f"bad response: {operation.response.type_url!r} is no ExecuteResponse")
    if response.status.code == 0 and not response.HasField("result"):
        raise ClientError("bad response: neither a result nor an error", response)
    return response


def write_requests(name: str, data: bytes, step_bytes: int) -> Iterator[WriteRequest]:
    """Yield the messages of an upload from 0: all have the name, the last finishes, an empty blob is one."""
    for offset in range(0, max(len(data), 1), step_bytes):
        piece = data[offset : offset + step_bytes]
        is_last = offset + len(piece) == len(data)
        yield WriteRequest(resource_name=name, write_offset=offset, data=piece, finish_write=is_last)
