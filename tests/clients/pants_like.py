"""A client that behaves like Pants where servers have to know it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterable

import grpc

from expbuild.reapi import (
    BatchUpdateBlobsRequest,
    CancelOperationRequest,
    Code,
    DigestMessage,
    ExecuteOperationMetadata,
    ExecuteRequest,
    ExecuteResponse,
    ExecutionStage,
    Operation,
    PreconditionFailure,
    WaitExecutionRequest,
)
from tests.clients.actions import Blobs, ClientError, Hash, Prepared, sha256
from tests.clients.connection import Connection, response_of, write_requests

_SMALL_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_RECONNECTS = 5
_SUBJECT = re.compile(r"blobs/([0-9a-f]{64})/([0-9]+)")


class PantsLike(Connection):
    """Uploads what the server says it misses, cancels by CancelOperation, and uses the metadata header's old name."""

    tool_name = "pants"
    metadata_key = "google.devtools.remoteexecution.v1test.requestmetadata-bin"
    hash_of: Hash = staticmethod(sha256)

    def __init__(self, address: str, *, instance: str = "main") -> None:
        super().__init__(address, instance)
        self.uploaded: list[set[str]] = []
        """The hashes that it sent because the server missed them, one set for each time it was told so."""
        self.executing = asyncio.Event()
        """Set when the server says that a worker runs the action."""
        self.operation_name = ""

    async def store(self, digest: DigestMessage, data: bytes) -> None:
        """Upload a blob: alone in a batch when it is small, else (and when it is empty) by one stream from 0."""
        if 0 < len(data) < _SMALL_BYTES:
            request = BatchUpdateBlobsRequest(instance_name=self.instance)
            request.requests.add(digest=digest, data=data)
            await self.update(request)
            return
        name = self.name(f"uploads/{digest.hash[:36]}/blobs/{digest.hash}/{digest.size_bytes}")
        response = await self.bytestream.Write(write_requests(name, data, _CHUNK_BYTES), metadata=self.metadata)
        if response.committed_size != len(data):
            raise ClientError(f"committed {response.committed_size} of {len(data)} bytes")

    async def load(self, digest: DigestMessage) -> bytes:
        """Fetch a blob, all of it, and check its hash."""
        data = await self.read(f"blobs/{digest.hash}/{digest.size_bytes}")
        if self.hash_of(data) != digest.hash:
            raise ClientError(f"not what {digest.hash} names")
        return data

    async def run(self, prepared: Prepared) -> ExecuteResponse:
        """Run an action without uploading anything first; the server says what it misses. Cancelled, it cancels."""
        while True:
            response = await self._execute(prepared)
            match response.status.code:
                case Code.OK:
                    return response
                case Code.FAILED_PRECONDITION:
                    await self._store_missing(response, prepared.blobs)
                case _:
                    raise ClientError(response.status.message, response)

    async def _execute(self, prepared: Prepared) -> ExecuteResponse:
        request = ExecuteRequest(instance_name=self.instance, action_digest=prepared.digest)
        stream: AsyncIterable[Operation] = self.execution.Execute(request, metadata=self.metadata)
        name, reconnects, was_running = "", 0, False
        try:
            while True:
                try:
                    async for operation in stream:
                        name = self.operation_name = operation.name
                        if operation.done:
                            return response_of(operation)
                        stage = ExecuteOperationMetadata.FromString(operation.metadata.value).stage
                        if was_running and stage == ExecutionStage.QUEUED:
                            break
                        if was_running := stage == ExecutionStage.EXECUTING:
                            self.executing.set()
                except grpc.aio.AioRpcError as error:
                    if not name or error.code() is grpc.StatusCode.NOT_FOUND:
                        raise
                reconnects += 1
                if reconnects > _RECONNECTS:
                    raise ClientError("lost the stream too often")
                stream = self.execution.WaitExecution(WaitExecutionRequest(name=name), metadata=self.metadata)
        except asyncio.CancelledError:
            if name:
                await self.cancel(name)
            raise

    async def cancel(self, name: str) -> None:
        await self.operations.CancelOperation(CancelOperationRequest(name=name), metadata=self.metadata)

    async def _store_missing(self, response: ExecuteResponse, blobs: Blobs) -> None:
        """Upload what the answer names. In any form but the one it knows, the answer is fatal."""
        failure = PreconditionFailure()
        details = response.status.details
        if len(details) != 1 or not details[0].Unpack(failure) or not failure.violations:
            raise ClientError("not one detail that is a PreconditionFailure", response)
        digests = set()
        for violation in failure.violations:
            subject = _SUBJECT.fullmatch(violation.subject)
            if violation.type != "MISSING" or subject is None or subject[1] not in blobs.content:
                raise ClientError(f"cannot do anything about {violation}", response)
            digests.add((subject[1], int(subject[2])))
        for hash_text, size_bytes in digests:
            await self.store(DigestMessage(hash=hash_text, size_bytes=size_bytes), blobs.content[hash_text])
        self.uploaded.append({hash_text for hash_text, _ in digests})
