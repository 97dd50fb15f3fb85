"""A client that behaves like Siso, Chromium's build tool, where servers have to know it."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

import grpc

from expbuild.reapi import (
    ActionResult,
    BatchReadBlobsRequest,
    BatchUpdateBlobsRequest,
    Code,
    Compressor,
    DigestMessage,
    ExecuteRequest,
    ExecuteResponse,
    FindMissingBlobsRequest,
    Operation,
    WaitExecutionRequest,
    WriteRequest,
)
from tests.clients.actions import Blobs, ClientError, Prepared
from tests.clients.connection import Connection, response_of

_BATCH_BLOBS = 1000
_PIECE_BYTES = 32 << 10
_SMALL_BYTES = 2 << 20
_TRIES = 10


class SisoLike(Connection):
    """Cuts its own Execute calls after `cut_s` and goes on with WaitExecution, always by the first name it saw."""

    tool_name = "siso"

    def __init__(self, address: str, *, instance: str = "projects/any/instances/main", cut_s: float = 60) -> None:
        super().__init__(address, instance)
        self._cut_s = cut_s
        self.waits = 0
        """How often it came back with WaitExecution."""
        self.compresses = False
        self._max_batch_bytes = 0

    async def start(self) -> None:
        cache = (await self.ask_capabilities()).cache_capabilities
        self._max_batch_bytes = cache.max_batch_total_size_bytes or 4 << 20
        # It takes the first compressor for the server's favourite.
        self.compresses = list(cache.supported_compressors[:1]) not in ([], [Compressor.IDENTITY])

    async def find_missing(self, blobs: Blobs) -> list[DigestMessage]:
        """Ask for all of them in one message, however many they are."""
        request = FindMissingBlobsRequest(instance_name=self.instance, blob_digests=blobs.digests())
        return list((await self.cas.FindMissingBlobs(request, metadata=self.metadata)).missing_blob_digests)

    async def upload(self, blobs: Blobs) -> list[DigestMessage]:
        """Upload what is missing, and return what that was."""
        missing = await self.find_missing(blobs)
        batch: list[DigestMessage] = []
        for digest in missing:
            if digest.size_bytes >= _SMALL_BYTES:
                await self.write(digest, blobs.content[digest.hash])
                continue
            if len(batch) == _BATCH_BLOBS or sum(d.size_bytes for d in (*batch, digest)) > self._max_batch_bytes:
                await self._update(batch, blobs)
                batch = []
            batch.append(digest)
        await self._update(batch, blobs)
        return missing

    async def write(self, digest: DigestMessage, data: bytes) -> None:
        """Send a blob in pieces and an empty message to finish. An early OK means that the server has it already."""
        name = self.name(f"uploads/{digest.hash[:32]}/blobs/{digest.hash}/{digest.size_bytes}")

        async def pieces() -> AsyncIterator[WriteRequest]:
            for offset in range(0, len(data), _PIECE_BYTES):
                yield WriteRequest(resource_name=name, write_offset=offset, data=data[offset : offset + _PIECE_BYTES])
            yield WriteRequest(resource_name=name, write_offset=len(data), finish_write=True)

        response = await self.bytestream.Write(pieces(), metadata=self.metadata)
        if response.committed_size != digest.size_bytes:
            raise ClientError(f"committed {response.committed_size} of {digest.size_bytes} bytes")

    async def get(self, digest: DigestMessage) -> bytes:
        """Fetch one blob. It looks at the length alone: a server that put errors into the data would fool it."""
        if digest.size_bytes >= _SMALL_BYTES:
            data = await self.read(f"blobs/{digest.hash}/{digest.size_bytes}")
        else:
            request = BatchReadBlobsRequest(instance_name=self.instance, digests=[digest])
            data = (await self.cas.BatchReadBlobs(request, metadata=self.metadata)).responses[0].data
        if len(data) != digest.size_bytes:
            raise ClientError(f"{len(data)} bytes instead of {digest.size_bytes}")
        return data

    async def run(self, prepared: Prepared, *, skip_cache_lookup: bool = False) -> ExecuteResponse:
        """Run an action to its end, as many calls as that takes."""
        await self.upload(prepared.blobs)
        for _ in range(_TRIES):
            response = await self._execute(prepared, skip_cache_lookup=skip_cache_lookup)
            match response.status.code:
                case Code.OK:
                    return await self._accepted(prepared, response, skip_cache_lookup=skip_cache_lookup)
                case Code.INTERNAL | Code.UNAVAILABLE:
                    continue
                case Code.DEADLINE_EXCEEDED if response.status.message != "execution timeout exceeded":
                    raise ClientError("not known as the action's own timeout: it would try for ever", response)
                case _:
                    raise ClientError(response.status.message, response)
        raise ClientError(f"failed {_TRIES} times")

    async def _accepted(
        self, prepared: Prepared, response: ExecuteResponse, *, skip_cache_lookup: bool
    ) -> ExecuteResponse:
        """Take a cached result without outputs for a broken one."""
        if response.result.exit_code == 0 and not _has_outputs(response.result):
            if skip_cache_lookup:
                raise ClientError("no outputs", response)
            return await self.run(prepared, skip_cache_lookup=True)
        return response

    async def _execute(self, prepared: Prepared, *, skip_cache_lookup: bool) -> ExecuteResponse:
        request = ExecuteRequest(instance_name=self.instance, skip_cache_lookup=skip_cache_lookup)
        request.action_digest.CopyFrom(prepared.digest)
        name = ""
        stream: AsyncIterable[Operation] = self.execution.Execute(request, metadata=self.metadata, timeout=self._cut_s)
        while True:
            try:
                last: Operation | None = None
                async for last in stream:
                    name = name or last.name
                if last is None or not last.done:
                    raise ClientError("bad response: the stream ended before the operation was done")
                return response_of(last)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or not name:
                    raise
            self.waits += 1
            wait = WaitExecutionRequest(name=name)
            stream = self.execution.WaitExecution(wait, metadata=self.metadata, timeout=self._cut_s)

    async def _update(self, digests: list[DigestMessage], blobs: Blobs) -> None:
        request = BatchUpdateBlobsRequest(instance_name=self.instance)
        for digest in digests:
            request.requests.add(digest=digest, data=blobs.content[digest.hash])
        await self.update(request)


def _has_outputs(result: ActionResult) -> bool:
    return bool(result.output_files or result.output_directories or result.output_symlinks)
