"""ContentAddressableStorage: look-ups, batches and trees."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable

from google.protobuf.message import DecodeError

from expbuild.api.compression import Compressor, compress, decompress
from expbuild.api.instances import Instances
from expbuild.api.messages import parse_digest, request_digest, to_message
from expbuild.api.rpc import ServicerContext
from expbuild.api.status import OK, to_status
from expbuild.digest import Digest, DigestFunction, DigestFunctions
from expbuild.errors import BlobNotFound, Code, ExpbuildError, InvalidArgument, Unimplemented
from expbuild.reapi import (
    BatchReadBlobsRequest,
    BatchReadBlobsResponse,
    BatchUpdateBlobsRequest,
    BatchUpdateBlobsResponse,
    ContentAddressableStorageServicer,
    DigestMessage,
    Directory,
    FindMissingBlobsRequest,
    FindMissingBlobsResponse,
    GetTreeRequest,
    GetTreeResponse,
    SpliceBlobRequest,
    SpliceBlobResponse,
    SplitBlobRequest,
    SplitBlobResponse,
)
from expbuild.storage.base import INLINE_BYTES, BlobStore, read_blob, write_blob

MESSAGE_BYTES = 4_000_000
"""No response is larger: the receive limit of most clients is 4 MiB."""

_BATCH_RESPONSE_BYTES = (4 << 20) - (1 << 10)
"""The same for BatchReadBlobs, which must have room for as many blob bytes as we advertise, and their digests."""

_MAX_READ_ENTRIES = 10_000
"""So many blobs can be asked for in one batch: also if none of them is there, the answers fit into one message."""

_MAX_UPDATE_ENTRIES = 250_000
"""More valid entries than this do not fit into a request; counted before any of them is looked at."""

_MAX_DECOMPRESSED_BYTES = 64 << 20
"""Largest sum of the sizes that the compressed entries of one batch decompress to."""

_SLICE = 2000
"""So many digests are handled before the event loop gets its turn."""

_FEW = 32
"""The same for blobs that are read or written."""

_PAGE_TOKEN = re.compile(r"[0-9]{1,12}", re.ASCII)


class CasService(ContentAddressableStorageServicer):
    """The CAS. max_batch_bytes: the enforced limit of one batch's blobs together."""

    def __init__(
        self,
        blobs: BlobStore,
        functions: DigestFunctions,
        compressors: tuple[Compressor, ...],
        instances: Instances,
        max_batch_bytes: int,
    ) -> None:
        self._blobs = blobs
        self._functions = functions
        self._compressors = compressors
        self._instances = instances
        self._max_batch_bytes = max_batch_bytes

    async def FindMissingBlobs(
        self, request: FindMissingBlobsRequest, context: ServicerContext
    ) -> FindMissingBlobsResponse:
        self._instances.resolve(request.instance_name)
        messages = request.blob_digests
        function = self._function(request.digest_function, messages)
        response = FindMissingBlobsResponse()
        for start in range(0, len(messages), _SLICE):
            digests = [parse_digest(message, function) for message in messages[start : start + _SLICE]]
            missing = await self._blobs.find_missing(digests)
            for digest in dict.fromkeys(digests):
                if digest in missing:
                    response.missing_blob_digests.add(hash=digest.hash, size_bytes=digest.size_bytes)
            await asyncio.sleep(0)
        return response

    async def BatchUpdateBlobs(
        self, request: BatchUpdateBlobsRequest, context: ServicerContext
    ) -> BatchUpdateBlobsResponse:
        self._instances.resolve(request.instance_name)
        _check_count(len(request.requests), _MAX_UPDATE_ENTRIES)
        self._check_total(sum(len(entry.data) for entry in request.requests))
        function = self._function(request.digest_function, (entry.digest for entry in request.requests))
        response = BatchUpdateBlobsResponse()
        room = _MAX_DECOMPRESSED_BYTES
        for number, entry in enumerate(request.requests):
            status = OK
            try:
                room -= await self._update(entry, function, room)
            except ExpbuildError as error:
                status = to_status(error)
            response.responses.add(digest=entry.digest, status=status)
            if number % _FEW == 0:
                await asyncio.sleep(0)
        return response

    async def BatchReadBlobs(self, request: BatchReadBlobsRequest, context: ServicerContext) -> BatchReadBlobsResponse:
        self._instances.resolve(request.instance_name)
        _check_count(len(request.digests), _MAX_READ_ENTRIES)
        function = self._function(request.digest_function, request.digests)
        digests = [parse_digest(message, function) for message in request.digests]
        self._check_total(sum(digest.size_bytes for digest in digests))
        compressor = self._accepted(request.acceptable_compressors)
        missing = await self._blobs.find_missing(digests)
        room = _room_for_data(digests, missing)
        response = BatchReadBlobsResponse()
        for number, digest in enumerate(digests):
            entry = response.responses.add(digest=to_message(digest))
            try:
                if digest in missing:
                    raise BlobNotFound(digest)
                data = await self._read(digest, room)
            except ExpbuildError as error:
                entry.status.CopyFrom(to_status(error))
                continue
            entry.data = data
            if compressor is not Compressor.IDENTITY and data:
                packed = await _off_loop(len(data), compress, compressor, data)
                if len(packed) < len(data):
                    entry.data, entry.compressor = packed, compressor.value  # type: ignore[assignment]  # same numbers
            room -= len(entry.data)
            if number % _FEW == 0:
                await asyncio.sleep(0)
        return response

    async def GetTree(self, request: GetTreeRequest, context: ServicerContext) -> AsyncGenerator[GetTreeResponse, None]:
        self._instances.resolve(request.instance_name)
        root = request_digest(self._functions, request, "root_digest")
        if request.page_size < 0:
            raise InvalidArgument(f"page_size {request.page_size} is negative")
        start = _position(request.page_token)
        page, page_bytes, position = GetTreeResponse(), 0, 0
        async for directory, size_bytes in self._tree(root):
            position += 1
            if position <= start:
                continue
            is_full = page_bytes + size_bytes > MESSAGE_BYTES or len(page.directories) == request.page_size > 0
            if page.directories and is_full:
                page.next_page_token = str(position - 1)
                yield page
                page, page_bytes = GetTreeResponse(), 0
            page.directories.append(directory)
            page_bytes += size_bytes + 8
        if start and start >= position:
            raise InvalidArgument(f"page_token {request.page_token!r} is not one of this tree")
        yield page

    async def SplitBlob(self, request: SplitBlobRequest, context: ServicerContext) -> SplitBlobResponse:
        raise Unimplemented("SplitBlob")

    async def SpliceBlob(self, request: SpliceBlobRequest, context: ServicerContext) -> SpliceBlobResponse:
        raise Unimplemented("SpliceBlob")

    def _function(self, number: int, messages: Iterable[DigestMessage]) -> DigestFunction:
        """Return the digest function of a request; all its digests must agree with it."""
        first = next(iter(messages), None)
        return self._functions.resolve(number, len(first.hash) if first is not None else 0)

    def _check_total(self, total_bytes: int) -> None:
        if total_bytes > self._max_batch_bytes:
            raise InvalidArgument(
                f"the blobs of this batch are {total_bytes} bytes together; at most {self._max_batch_bytes} are "
                "allowed (max_batch_total_size_bytes); use ByteStream for large blobs"
            )

    async def _update(self, entry: BatchUpdateBlobsRequest.Request, function: DigestFunction, room: int) -> int:
        """Store a blob and return how much was decompressed for it, at most `room`."""
        if not entry.HasField("digest"):
            raise InvalidArgument("the entry has no digest")
        digest = parse_digest(entry.digest, function)
        compressor = next((c for c in self._compressors if c.value == entry.compressor), None)
        if compressor is None:
            raise InvalidArgument(f"compressor {entry.compressor} is not served here for batch updates")
        if compressor is Compressor.IDENTITY:
            await write_blob(self._blobs, digest, entry.data)
            return 0
        if digest.size_bytes > room:
            raise InvalidArgument(
                f"the compressed blobs of a batch may be {_MAX_DECOMPRESSED_BYTES} bytes together when decompressed; "
                "use ByteStream for large blobs"
            )
        data = await _off_loop(digest.size_bytes, decompress, compressor, entry.data, digest.size_bytes)
        await write_blob(self._blobs, digest, data)
        return digest.size_bytes

    async def _read(self, digest: Digest, room: int) -> bytes:
        if digest.size_bytes > room:
            raise BatchFull("the response is full; ask again for this blob")
        return await read_blob(self._blobs, digest)

    def _accepted(self, numbers: Iterable[int]) -> Compressor:
        """Return the compressor to answer with: the first of the client's that is served."""
        accepted = list(numbers)
        return next((c for number in accepted for c in self._compressors if c.value == number), Compressor.IDENTITY)

    async def _tree(self, root: Digest) -> AsyncIterator[tuple[Directory, int]]:
        """Yield each distinct directory of a tree with its size, breadth first, the root first.

        A missing or unreadable descendant is left out. Raises BlobNotFound or InvalidArgument for the root.
        """
        level, seen = [root], {root}
        while level:
            below: list[Digest] = []
            for number, digest in enumerate(level):
                if number % _FEW == 0:
                    await asyncio.sleep(0)
                try:
                    if digest.size_bytes > MESSAGE_BYTES:
                        raise InvalidArgument(f"Directory {digest} does not fit into a message")
                    directory = Directory.FromString(await read_blob(self._blobs, digest))
                    children = [parse_digest(node.digest, digest.function) for node in directory.directories]
                except (BlobNotFound, DecodeError, InvalidArgument) as error:
                    if digest != root:
                        continue
                    if isinstance(error, BlobNotFound):
                        raise
                    raise InvalidArgument(f"blob {digest} is not a valid Directory message") from error
                yield directory, digest.size_bytes
                for child in children:
                    if child not in seen:
                        seen.add(child)
                        below.append(child)
            level = below


class BatchFull(ExpbuildError):
    """A batch read whose blobs do not all fit into one message."""

    code = Code.RESOURCE_EXHAUSTED


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        raise InvalidArgument(f"the batch has {count} entries; at most {limit} are allowed")


def _room_for_data(digests: list[Digest], missing: set[Digest]) -> int:
    """Return how much blob data fits into a response beside what each digest takes in any case."""
    entry_bytes = digests[0].function.hash_length + 40 if digests else 0
    absent = sum(digest in missing for digest in digests)
    room = _BATCH_RESPONSE_BYTES - len(digests) * entry_bytes - absent * (entry_bytes + 40)
    wanted = sum(digest.size_bytes for digest in digests if digest not in missing)
    return room if wanted <= room else room - len(digests) * 70  # some will be told that the response is full


async def _off_loop(size_bytes: int, function: Callable[..., bytes], *args: object) -> bytes:
    """Call a function that works on so many bytes; in a thread where that takes long."""
    return function(*args) if size_bytes <= INLINE_BYTES else await asyncio.to_thread(function, *args)


def _position(token: str) -> int:
    if not token:
        return 0
    if _PAGE_TOKEN.fullmatch(token) is None:
        raise InvalidArgument(f"page_token {token[:40]!r} is not one of ours")
    return int(token)
