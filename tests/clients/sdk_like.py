"""A client that behaves like the Go SDK, which is inside reclient and Please, where servers have to know it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterable, Sequence

import grpc

from expbuild.reapi import (
    ActionResult,
    BatchReadBlobsRequest,
    BatchUpdateBlobsRequest,
    Compressor,
    DigestFunctionMessage,
    DigestMessage,
    Directory,
    ExecuteRequest,
    ExecuteResponse,
    FindMissingBlobsRequest,
    GetTreeRequest,
    Operation,
    WaitExecutionRequest,
)
from tests.clients.actions import Blobs, ClientError, Hash, Prepared, sha256
from tests.clients.connection import Connection, response_of, write_requests

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_START_TIMEOUT_S = 5
_RPC_TIMEOUT_S = 20
_FIND_MISSING_DIGESTS = 10_000
_BATCH_BLOBS = 4_000
_CHUNK_BYTES = 1 << 20
_TRIES = 6
_TRANSIENT = ("CANCELLED", "UNKNOWN", "DEADLINE_EXCEEDED", "ABORTED", "INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED")
PLATFORM = {"OSFamily": "Linux", "reproxy-version": "0.195", "cache-silo": "a-silo"}
"""What reclient adds to an action's platform by itself."""


class SdkLike(Connection):
    """Short deadlines on everything, large calls, GetTree, and only the deprecated lists of output symlinks."""

    tool_name = "re-client"
    channel_options = (("grpc.max_receive_message_length", 100 << 20),)
    hash_of: Hash = staticmethod(sha256)

    def __init__(self, address: str, *, instance: str = "main") -> None:
        super().__init__(address, instance)
        self._max_batch_bytes = 0
        self._packs = False

    async def start(self) -> None:
        """Read the capabilities within 5 seconds. It knows the singular digest function of executions alone."""
        answer = await self.ask_capabilities(_START_TIMEOUT_S)
        function = answer.execution_capabilities.digest_function
        if function != DigestFunctionMessage.SHA256 or function not in answer.cache_capabilities.digest_functions:
            raise ClientError(f"digest function mismatch: {function}")
        self._max_batch_bytes = answer.cache_capabilities.max_batch_total_size_bytes  # 0 would mean: no batches
        self._packs = Compressor.ZSTD in answer.cache_capabilities.supported_batch_update_compressors

    async def find_missing(self, digests: Sequence[DigestMessage]) -> list[DigestMessage]:
        missing: list[DigestMessage] = []
        for start in range(0, len(digests), _FIND_MISSING_DIGESTS):
            request = FindMissingBlobsRequest(instance_name=self.instance)
            request.blob_digests.extend(digests[start : start + _FIND_MISSING_DIGESTS])
            answer = await self.cas.FindMissingBlobs(request, metadata=self.metadata, timeout=_RPC_TIMEOUT_S)
            missing += answer.missing_blob_digests
        return missing

    async def upload(self, blobs: Blobs) -> None:
        """Upload what is missing: batches of compressed blobs, and streams for what does not fit or is alone."""
        batch = BatchUpdateBlobsRequest(instance_name=self.instance)
        total_bytes = 0
        for digest in await self.find_missing(blobs.digests()):
            data = blobs.content[digest.hash]
            if len(data) > self._max_batch_bytes:
                await self._write(digest, data)
                continue
            if len(batch.requests) == _BATCH_BLOBS or total_bytes + len(data) > self._max_batch_bytes:
                await self.update(batch, _RPC_TIMEOUT_S)
                batch, total_bytes = BatchUpdateBlobsRequest(instance_name=self.instance), 0
            entry = batch.requests.add(digest=digest, data=data)
            if self._packs and data:
                entry.compressor, entry.data = Compressor.ZSTD, zstd.compress(data)
            total_bytes += len(data)
        await self.update(batch, _RPC_TIMEOUT_S)

    async def download_directory(self, root: DigestMessage) -> dict[str, bytes]:
        """Fetch a tree as path → content: its directories by GetTree, its files in batches."""
        directories: dict[str, Directory] = {}
        request, token = GetTreeRequest(instance_name=self.instance, root_digest=root), None
        while token != "":
            async for page in self.cas.GetTree(request, metadata=self.metadata):
                for directory in page.directories:
                    directories[self.hash_of(directory.SerializeToString(deterministic=True))] = directory
                token = request.page_token = page.next_page_token
        paths: dict[str, DigestMessage] = {}

        def walk(hash_text: str, prefix: str) -> None:
            for file in directories[hash_text].files:
                paths[prefix + file.name] = file.digest
            for child in directories[hash_text].directories:
                walk(child.digest.hash, f"{prefix}{child.name}/")

        walk(root.hash, "")
        read = BatchReadBlobsRequest(instance_name=self.instance, digests=paths.values())
        batch = await self.cas.BatchReadBlobs(read, metadata=self.metadata, timeout=_RPC_TIMEOUT_S)
        content = {entry.digest.hash: entry.data for entry in batch.responses if entry.status.code == 0}
        return {path: content[digest.hash] for path, digest in paths.items()}

    async def run(self, prepared: Prepared) -> ExecuteResponse:
        await self.upload(prepared.blobs)
        request = ExecuteRequest(instance_name=self.instance, action_digest=prepared.digest)
        stream: AsyncIterable[Operation] = self.execution.Execute(request, metadata=self.metadata)
        name = ""
        for _ in range(_TRIES):
            try:
                async for operation in stream:
                    name = operation.name
                    if operation.done:
                        return response_of(operation)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND and name:
                    name = ""
                elif error.code().name not in _TRANSIENT:
                    raise
            if name:
                stream = self.execution.WaitExecution(WaitExecutionRequest(name=name), metadata=self.metadata)
            else:
                stream = self.execution.Execute(request, metadata=self.metadata)
        raise ClientError("lost the stream too often")

    async def _write(self, digest: DigestMessage, data: bytes) -> None:
        name = self.name(f"uploads/{digest.hash[:36]}/blobs/{digest.hash}/{digest.size_bytes}")
        requests = write_requests(name, data, _CHUNK_BYTES)
        response = await self.bytestream.Write(requests, metadata=self.metadata, timeout=_RPC_TIMEOUT_S)
        if response.committed_size != digest.size_bytes:
            raise ClientError(f"committed {response.committed_size} of {digest.size_bytes} bytes")


def symlinks(result: ActionResult) -> dict[str, str]:
    """The symlinks it sees: those of the deprecated lists."""
    return {link.path: link.target for link in (*result.output_file_symlinks, *result.output_directory_symlinks)}
