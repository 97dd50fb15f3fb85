"""Clients at work, and the history of what they were told: each acknowledged blob and result, to be held against.

Everything is drawn from one seed. A blob's bytes are made from its number, so the history stays small.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import Code
from expbuild.reapi import ActionResult, BatchUpdateBlobsRequest, OutputFile, WriteRequest
from tests.support.actions import Blobs, BuiltAction, Client, from_message, put, shell, subject, to_message

SHA256 = DigestFunction.SHA256

CHUNK_BYTES = 64 << 10
_BUSY_CALLS = 8
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
WRITES = frozenset({"upload", "upload-large", "execute", "cache-write"})
"""The kinds of call in which a server that dies has something half done."""


@dataclass
class History:
    """What clients were told, and what was found wrong with it. All lists of faults stay empty when all is well."""

    blobs: dict[Digest, int] = field(default_factory=dict)
    """Acknowledged blobs, and the number each is made from (-1: an output, whose bytes are told by its digest)."""
    actions: dict[str, tuple[BuiltAction, int]] = field(default_factory=dict)
    """Acknowledged results by the action's hash: the action, and the exit code or marker of its result."""
    calls: int = 0
    refused: int = 0
    corrupt: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    broken_hits: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, list[str]]:
        return {"corrupt": self.corrupt, "lost": self.lost, "broken hits": self.broken_hits}

    def check_bytes(self, digest: Digest, data: bytes) -> None:
        if SHA256.digest_of(data) != digest:
            self.corrupt.append(f"{digest}: got {len(data)} bytes that are not the blob")


def content(number: int, size_bytes: int) -> bytes:
    """Return the bytes of blob `number`: not compressible, and the same in every run."""
    return random.Random(number).randbytes(size_bytes)


class Load:
    """Clients that upload, execute, write results and read what they were told is there, until the server is gone."""

    def __init__(self, history: History, rng: random.Random) -> None:
        self._history = history
        self._rng = rng
        self._known = list(history.blobs)
        self._calls = 0
        self.in_flight: dict[int, str] = {}
        self.is_busy = asyncio.Event()
        """Set when some calls were answered, or none will be."""

    async def run(self, address: str, clients: int = 6) -> None:
        """Work until the server ends every call, or until cancelled."""
        async with Client(address) as client, asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(self._work(client, number))
        self.is_busy.set()

    async def _work(self, client: Client, number: int) -> None:
        kinds = ("upload", "upload", "upload-large", "execute", "cache-write", "read", "hit", "find-missing")
        steps = {
            "upload": self._upload,
            "upload-large": self._upload_large,
            "execute": self._execute,
            "cache-write": self._write_result,
            "read": self._read,
            "hit": self._hit,
            "find-missing": self._find_missing,
        }
        while True:
            kind = self._rng.choice(kinds)
            self.in_flight[number] = kind
            try:
                await steps[kind](client)
                self._history.calls += 1
                self._calls += 1
                if self._calls == _BUSY_CALLS:
                    self.is_busy.set()
            except grpc.aio.AioRpcError as error:
                if error.code() in _GONE or "Internal error from Core" in str(error.details()):
                    return  # the server is gone; what this call wanted was never acknowledged
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                await self._refused()
            except Refused:
                await self._refused()

    async def _refused(self) -> None:
        self._history.refused += 1
        await asyncio.sleep(0.01)

    async def _upload(self, client: Client) -> None:
        blobs: Blobs = {}
        numbers = {}
        for _ in range(self._rng.randint(1, 20)):
            number = self._rng.getrandbits(48)
            data = content(number, int(10 ** self._rng.uniform(0.5, 4.5)))
            numbers[from_message(put(blobs, data))] = number
        await upload(client, blobs)
        self._acknowledge(numbers)

    async def _upload_large(self, client: Client) -> None:
        number = self._rng.getrandbits(48)
        data = content(number, self._rng.randint(300_000, 3_000_000))
        digest = SHA256.digest_of(data)
        name = f"uploads/{self._rng.getrandbits(64):x}/{subject(to_message(digest))}"

        async def requests() -> AsyncIterator[WriteRequest]:
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                is_last = start + CHUNK_BYTES >= len(data)
                yield WriteRequest(resource_name=name, write_offset=start, data=chunk, finish_write=is_last)

        answer = await client.byte_stream.Write(requests(), timeout=60)
        assert answer.committed_size == len(data)
        self._acknowledge({digest: number})

    async def _execute(self, client: Client) -> None:
        number = self._rng.getrandbits(48)
        data = content(number, self._rng.randint(10, 50_000))
        script = "sha256sum < in > sum; cat in in > out"
        action = shell(script, inputs={"in": data}, salt=b"%d" % number, output_paths=["out", "sum"])
        await upload(client, action.blobs)
        finished = await client.call(action).finish()
        response = finished.response
        if response.status.code != 0:
            return  # ended with the server
        result = response.result
        outputs = {file.path: from_message(file.digest) for file in result.output_files}
        if outputs.get("out") != SHA256.digest_of(data + data):
            self._history.corrupt.append(f"action {action.digest.hash} has the outputs {outputs}")
        self._acknowledge({SHA256.digest_of(data): number, **dict.fromkeys(outputs.values(), -1)})
        self._history.actions[action.digest.hash] = (action, result.exit_code)

    async def _write_result(self, client: Client) -> None:
        number = self._rng.getrandbits(48)
        data = content(number, self._rng.randint(10, 5000))
        blobs: Blobs = {}
        digest = put(blobs, data)
        action = shell("planted", salt=b"%d" % number)
        await upload(client, blobs)
        self._acknowledge({from_message(digest): number})
        marker = number % 250
        await client.plant(action, ActionResult(exit_code=marker, output_files=[OutputFile(path="out", digest=digest)]))
        self._history.actions[action.digest.hash] = (action, marker)

    async def _read(self, client: Client) -> None:
        if self._known:
            digest = self._rng.choice(self._known)
            self._history.check_bytes(digest, await self._read_acknowledged(client, digest))

    async def _hit(self, client: Client) -> None:
        if self._history.actions:
            action, marker = self._rng.choice(list(self._history.actions.values()))
            await check_hit(client, self._history, action, marker)

    async def _find_missing(self, client: Client) -> None:
        wanted = self._rng.sample(self._known, min(100, len(self._known)))
        for digest in await client.find_missing(wanted):
            self._history.lost.append(f"{digest.hash}/{digest.size_bytes}: missing")

    async def _read_acknowledged(self, client: Client, digest: Digest) -> bytes:
        try:
            return await client.read(to_message(digest))
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED):
                self._history.lost.append(f"{digest}: {error.code().name}")
            raise

    def _acknowledge(self, numbers: dict[Digest, int]) -> None:
        self._history.blobs.update(numbers)
        self._known.extend(numbers)


class Refused(Exception):
    """The server has no room for a blob, and said so."""


async def upload(client: Client, blobs: Blobs) -> None:
    """Upload what is missing. Raises Refused when a blob does not fit."""
    missing = set(map(from_message, await client.find_missing(blobs)))
    request = BatchUpdateBlobsRequest()
    for digest in missing:
        request.requests.add(digest=to_message(digest), data=blobs[digest])
    answer = await client.cas.BatchUpdateBlobs(request, timeout=60)
    codes = {response.status.code for response in answer.responses}
    if codes - {0}:
        assert codes <= {0, Code.RESOURCE_EXHAUSTED}, answer
        raise Refused


async def check_hit(client: Client, history: History, action: BuiltAction, marker: int | None) -> None:
    """Look a result up that was acknowledged, and read all it names. marker None: it may be gone, but not be wrong."""
    result = await client.cached(action)
    if result is None:
        if marker is not None:
            history.lost.append(f"result of action {action.digest.hash}")
        return
    if marker is not None and result.exit_code != marker:
        history.corrupt.append(f"action {action.digest.hash}: exit code {result.exit_code}, not {marker}")
    named = [file.digest for file in result.output_files]
    named += [result.stdout_digest] if result.HasField("stdout_digest") else []
    for digest in named:
        try:
            history.check_bytes(from_message(digest), await client.read(digest))
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED):
                raise
            history.broken_hits.append(f"action {action.digest.hash} names {digest.hash}: {error.code().name}")


async def check_everything(address: str, history: History, *, may_be_lost: bool = False) -> int:
    """Read every acknowledged blob and result; returns how many blobs are gone. may_be_lost: that is no fault."""
    gone = 0
    async with Client(address) as client:
        for digest in list(history.blobs):
            try:
                history.check_bytes(digest, await client.read(to_message(digest)))
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED):
                    raise
                gone += 1
                if not may_be_lost:
                    history.lost.append(f"{digest}: {error.code().name}")
        for action, marker in list(history.actions.values()):
            await check_hit(client, history, action, None if may_be_lost else marker)
    return gone


def summary(history: History) -> str:
    """Return the figures of a run in a line."""
    told = hashlib.sha256("".join(sorted(map(str, history.blobs))).encode()).hexdigest()[:12]
    faults = ", ".join(f"{len(found)} {name}" for name, found in history.faults.items())
    return (
        f"{history.calls} calls, {len(history.blobs)} blobs ({told}) and {len(history.actions)} results "
        f"acknowledged, {history.refused} refused: {faults}"
    )
