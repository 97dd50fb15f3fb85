"""google.bytestream.ByteStream: blobs of any size, streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from expbuild.api.compression import Compressor, decoder, encoder
from expbuild.api.instances import Instances
from expbuild.api.resource_names import BlobName, ResourceNames
from expbuild.api.rpc import ServicerContext
from expbuild.digest import Digest
from expbuild.errors import BlobNotFound, Code, ExpbuildError, InvalidArgument, OutOfRange, UploadSuperseded
from expbuild.reapi import (
    ByteStreamServicer,
    QueryWriteStatusRequest,
    QueryWriteStatusResponse,
    ReadRequest,
    ReadResponse,
    WriteRequest,
    WriteResponse,
)
from expbuild.storage.base import INLINE_BYTES, BlobStore

_EARLY_ANSWER_BYTES = 1 << 20
"""An upload of a blob we have is answered early only beyond this size: some clients take that for a broken stream."""

_HALF_CLOSE_TIMEOUT_S = 1.0
"""How long after `finish_write` we wait to see that nothing follows."""


class UploadAhead(ExpbuildError):
    """An upload starts behind what we hold. The client asks QueryWriteStatus and begins again."""

    code = Code.ABORTED


@dataclass(eq=False)
class _Upload:
    """One Write stream. received: bytes of its stream so far, compressed ones where it is compressed."""

    name: str
    received: int = 0
    superseded: bool = False


class ByteStreamService(ByteStreamServicer):
    """Reads and writes of single blobs.

    Partial uploads are not kept: a broken one starts again at 0, which QueryWriteStatus says.
    """

    def __init__(self, blobs: BlobStore, names: ResourceNames, instances: Instances) -> None:
        self._blobs = blobs
        self._names = names
        self._instances = instances
        self._uploads: dict[str, _Upload] = {}

    async def Read(self, request: ReadRequest, context: ServicerContext) -> AsyncGenerator[ReadResponse, None]:
        blob = self._names.parse_read(request.resource_name)
        self._instances.resolve(blob.instance_name)
        limit = _read_limit(request, blob)
        if await self._absent(blob.digest):
            raise BlobNotFound(blob.digest)
        if not 0 <= request.read_offset <= blob.digest.size_bytes:
            raise OutOfRange(f"read_offset {request.read_offset} is outside of blob {blob.digest}")
        chunks = self._blobs.read(blob.digest, offset=request.read_offset, limit=limit)
        if blob.compressor is not Compressor.IDENTITY:
            chunks = _compressed(chunks, blob.compressor)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield ReadResponse(data=chunk)

    async def Write(self, request_iterator: AsyncIterator[WriteRequest], context: ServicerContext) -> WriteResponse:
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or not first.resource_name:
            raise InvalidArgument("the first WriteRequest must have a resource_name")
        blob = self._names.parse_write(first.resource_name)
        self._instances.resolve(blob.instance_name)
        if await self._is_answered_early(first, blob):
            return WriteResponse(committed_size=blob.digest.size_bytes)
        upload = self._begin(first.resource_name)
        try:
            return await self._receive(upload, blob, first, requests)
        finally:
            if self._uploads.get(upload.name) is upload:
                del self._uploads[upload.name]

    async def QueryWriteStatus(
        self, request: QueryWriteStatusRequest, context: ServicerContext
    ) -> QueryWriteStatusResponse:
        blob = self._names.parse_write(request.resource_name)
        self._instances.resolve(blob.instance_name)
        if not await self._absent(blob.digest):
            return QueryWriteStatusResponse(committed_size=blob.digest.size_bytes, complete=True)
        # Nothing of a broken upload is kept, and what a live one has received dies with its stream.
        return QueryWriteStatusResponse(committed_size=0, complete=False)

    async def _is_answered_early(self, first: WriteRequest, blob: BlobName) -> bool:
        """Whether this upload is of a large blob we have. Compressed ones are always read to their end."""
        if first.write_offset < 0:
            raise InvalidArgument(f"write_offset {first.write_offset} is negative")
        resumed = first.write_offset > 0
        may_be_early = resumed or blob.digest.size_bytes > _EARLY_ANSWER_BYTES
        if blob.compressor is Compressor.IDENTITY and may_be_early and not await self._absent(blob.digest):
            return True
        if resumed:
            raise UploadAhead(
                f"write_offset {first.write_offset}: nothing of this upload is held here; "
                "QueryWriteStatus tells where to start"
            )
        return False

    async def _absent(self, digest: Digest) -> bool:
        return bool(await self._blobs.find_missing([digest]))

    def _begin(self, name: str) -> _Upload:
        """Register an upload; the newest stream under a name takes over from an older one."""
        if (older := self._uploads.get(name)) is not None:
            older.superseded = True
        upload = self._uploads[name] = _Upload(name)
        return upload

    async def _receive(
        self, upload: _Upload, blob: BlobName, first: WriteRequest, requests: AsyncIterator[WriteRequest]
    ) -> WriteResponse:
        stream = decoder(blob.compressor)
        writer = self._blobs.open_writer(blob.digest)
        try:
            request: WriteRequest | None = first
            while request is not None:
                _check(request, upload)
                for piece in stream.feed(request.data):
                    if piece:
                        await writer.write(piece)
                    else:
                        await asyncio.sleep(0)
                upload.received += len(request.data)
                if request.finish_write:
                    break
                request = await anext(requests, None)
            else:
                raise InvalidArgument(
                    f"the upload ended after {upload.received} bytes without finish_write; nothing was stored"
                )
            await _expect_end(requests)
            stream.finish()
            await writer.commit()
        finally:
            await writer.close()
        return WriteResponse(committed_size=upload.received)


def _read_limit(request: ReadRequest, blob: BlobName) -> int | None:
    if request.read_limit < 0:
        raise InvalidArgument(f"read_limit {request.read_limit} is negative")
    if request.read_limit and blob.compressor is not Compressor.IDENTITY:
        raise InvalidArgument("read_limit cannot be used with compressed blobs (REAPI)")
    return request.read_limit or None


async def _compressed(chunks: AsyncGenerator[bytes, None], compressor: Compressor) -> AsyncGenerator[bytes, None]:
    """Compress a stream; large chunks in a thread."""
    stream = encoder(compressor)
    assert stream is not None  # IDENTITY does not come here
    async with aclosing(chunks):
        async for chunk in chunks:
            encode = stream.encode
            data = encode(chunk) if len(chunk) <= INLINE_BYTES else await asyncio.to_thread(encode, chunk)
            if data:
                yield data
    yield stream.finish()


def _check(request: WriteRequest, upload: _Upload) -> None:
    """Check a message against the ones before it."""
    if upload.superseded:
        raise UploadSuperseded("another stream took over this upload")
    if request.resource_name and request.resource_name != upload.name:
        raise InvalidArgument("resource_name changed within one upload")
    if request.write_offset != upload.received:
        raise InvalidArgument(
            f"write_offset {request.write_offset} does not continue the upload, which stands at {upload.received}"
        )


async def _expect_end(requests: AsyncIterator[WriteRequest]) -> None:
    """See that nothing follows `finish_write`. A client that waits for our answer before it half-closes gets one."""
    try:
        async with asyncio.timeout(_HALF_CLOSE_TIMEOUT_S):
            extra = await anext(requests, None)
    except TimeoutError:
        return
    if extra is not None:
        raise InvalidArgument("a message follows the one with finish_write")
