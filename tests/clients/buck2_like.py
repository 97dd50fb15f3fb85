"""A client that behaves like Buck2 where servers have to know it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence

from expbuild.reapi import (
    ActionResult,
    BatchReadBlobsRequest,
    BatchUpdateBlobsRequest,
    Compressor,
    DigestMessage,
    ExecuteRequest,
    ExecuteResponse,
    FindMissingBlobsRequest,
    UpdateActionResultRequest,
    WriteRequest,
)
from tests.clients.actions import Blobs, ClientError, Prepared
from tests.clients.connection import Connection, response_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_FIND_MISSING_DIGESTS = 100


class Buck2Like(Connection):
    """Never waits for an execution again, never names the digest function, and pings also while it has nothing to do.

    pings_ms: how often; Buck2's own default is 30 seconds.
    """

    tool_name = "buck2"

    def __init__(self, address: str, *, instance: str = "main", pings_ms: int = 30_000) -> None:
        self.channel_options = (
            ("grpc.keepalive_time_ms", pings_ms),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_receive_message_length", 2 * 4_000_000),
        )
        super().__init__(address, instance)
        self.compresses = False
        self._max_batch_bytes = 4_000_000
        self._present: set[str] = set()

    async def start(self) -> None:
        cache = (await self.ask_capabilities()).cache_capabilities
        self._max_batch_bytes = cache.max_batch_total_size_bytes or 4_000_000
        self.compresses = Compressor.ZSTD in cache.supported_compressors

    async def upload(self, blobs: Blobs) -> None:
        """Upload what is missing. What it once found present it believes to stay so for 12 hours."""
        unknown = [digest for digest in blobs.digests() if digest.hash not in self._present]
        missing: list[DigestMessage] = []
        for start in range(0, len(unknown), _FIND_MISSING_DIGESTS):
            request = FindMissingBlobsRequest(instance_name=self.instance)
            request.blob_digests.extend(unknown[start : start + _FIND_MISSING_DIGESTS])
            missing += (await self.cas.FindMissingBlobs(request, metadata=self.metadata)).missing_blob_digests
        batch: list[DigestMessage] = []
        for digest in missing:
            if digest.size_bytes >= self._max_batch_bytes:
                await self.write(digest, blobs.content[digest.hash])
            elif sum(d.size_bytes for d in (*batch, digest)) > self._max_batch_bytes:  # filled to the last byte
                await self._update(batch, blobs)
                batch = [digest]
            else:
                batch.append(digest)
        await self._update(batch, blobs)
        self._present |= {digest.hash for digest in unknown}

    async def write(self, digest: DigestMessage, data: bytes, *, break_off: bool = False) -> None:
        """Send a blob with its name in every message. A second try has the same name and begins at 0.

        break_off: end in the middle, as when the network does.
        """
        body = zstd.compress(data) if self.compresses else data
        kind = "compressed-blobs/zstd" if self.compresses else "blobs"
        name = self.name(f"uploads/same-each-time/{kind}/{digest.hash}/{digest.size_bytes}")
        step = min(self._max_batch_bytes, max(len(body) // 3, 1))

        async def messages() -> AsyncIterator[WriteRequest]:
            for offset in range(0, max(len(body), 1), step):
                piece = body[offset : offset + step]
                is_last = offset + len(piece) == len(body)
                if is_last and break_off:
                    call.cancel()
                    return
                yield WriteRequest(resource_name=name, write_offset=offset, data=piece, finish_write=is_last)

        call = self.bytestream.Write(messages(), metadata=self.metadata)
        committed = (await call).committed_size
        if committed not in (len(body), -1):
            raise ClientError(f"committed {committed} of {len(body)} bytes")

    async def get(self, digests: Sequence[DigestMessage]) -> dict[str, bytes]:
        """Fetch small blobs by hash, in one uncompressed batch. Every one that was asked for has to be answered."""
        request = BatchReadBlobsRequest(instance_name=self.instance, digests=digests)
        request.acceptable_compressors.append(Compressor.IDENTITY)
        batch = await self.cas.BatchReadBlobs(request, metadata=self.metadata)
        found = {entry.digest.hash: entry.data for entry in batch.responses if entry.status.code == 0}
        if absent := {digest.hash for digest in digests} - set(found):
            raise ClientError(f"no answer for {absent}")
        return found

    async def run(self, prepared: Prepared) -> ExecuteResponse:
        """Run an action by one Execute call: when its stream ends too soon, the action has failed."""
        await self.upload(prepared.blobs)
        request = ExecuteRequest(instance_name=self.instance, action_digest=prepared.digest)
        stream = self.execution.Execute(request, metadata=self.metadata)
        operations = [operation async for operation in stream]
        if not operations or not operations[-1].done:
            raise ClientError("the stream did not yield an ExecuteResponse")
        response = response_of(operations[-1])
        if response.status.code:
            raise ClientError(response.status.message, response)
        check_result(response.result)
        return response

    async def upload_result(self, action_digest: DigestMessage, result: ActionResult) -> None:
        """Write the result of a local run to the cache; the answer is read like any other result."""
        update = UpdateActionResultRequest(instance_name=self.instance, action_digest=action_digest)
        update.action_result.CopyFrom(result)
        check_result(await self.action_cache.UpdateActionResult(update, metadata=self.metadata))

    async def _update(self, digests: Sequence[DigestMessage], blobs: Blobs) -> None:
        request = BatchUpdateBlobsRequest(instance_name=self.instance)
        for digest in digests:
            request.requests.add(digest=digest, data=blobs.content[digest.hash])
        await self.update(request)


def check_result(result: ActionResult) -> None:
    if not result.HasField("execution_metadata"):
        raise ClientError("The execution metadata are not defined")
    if not all(directory.HasField("tree_digest") for directory in result.output_directories):
        raise ClientError("a directory has no tree digest")
