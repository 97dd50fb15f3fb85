"""Building actions, uploading them and executing them, as a client does: over the wire, through stubs."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from expbuild.digest import Digest, DigestFunction
from expbuild.reapi import (
    Action,
    ActionCacheStub,
    ActionResult,
    BatchUpdateBlobsRequest,
    ByteStreamStub,
    CapabilitiesStub,
    Command,
    ContentAddressableStorageStub,
    DigestMessage,
    Directory,
    DirectoryNode,
    ExecuteOperationMetadata,
    ExecuteRequest,
    ExecuteResponse,
    ExecutionPolicy,
    ExecutionStage,
    ExecutionStub,
    FileNode,
    FindMissingBlobsRequest,
    GetActionResultRequest,
    Operation,
    OperationsStub,
    Platform,
    ReadRequest,
    RequestMetadata,
    Status,
    SymlinkNode,
    ToolDetails,
    UpdateActionResultRequest,
    WaitExecutionRequest,
)
from tests.support.server import patience

RPC_TIMEOUT_S = patience(30.0)
"""Nothing here takes this long; it turns a hang into a failure."""

_REQUEST_METADATA = "build.bazel.remote.execution.v2.requestmetadata-bin"


@dataclass(frozen=True, slots=True)
class Executable:
    """A file of an input tree with its executable bit set."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """A symlink of an input tree."""

    target: str


Node = bytes | Executable | Link | Mapping[str, Any]
"""A node of an input tree; a mapping is a directory of more of them."""

Blobs = dict[Digest, bytes]


def put(blobs: Blobs, content: bytes | Message) -> DigestMessage:
    """Add a blob; return its digest as it stands in messages."""
    data = content if isinstance(content, bytes) else content.SerializeToString(deterministic=True)
    digest = DigestFunction.SHA256.digest_of(data)
    blobs[digest] = data
    return to_message(digest)


def put_tree(blobs: Blobs, tree: Mapping[str, Node]) -> DigestMessage:
    """Add a whole input tree; return the digest of its root."""
    directory = Directory()
    for name, node in sorted(tree.items()):
        match node:
            case bytes():
                directory.files.append(FileNode(name=name, digest=put(blobs, node)))
            case Executable(content):
                directory.files.append(FileNode(name=name, digest=put(blobs, content), is_executable=True))
            case Link(target):
                directory.symlinks.append(SymlinkNode(name=name, target=target))
            case _:
                directory.directories.append(DirectoryNode(name=name, digest=put_tree(blobs, node)))
    return put(blobs, directory)


def to_message(digest: Digest) -> DigestMessage:
    return DigestMessage(hash=digest.hash, size_bytes=digest.size_bytes)


def from_message(message: DigestMessage) -> Digest:
    return Digest.parse(message.hash, message.size_bytes, DigestFunction.SHA256)


@dataclass(frozen=True)
class BuiltAction:
    """An action with every blob it needs."""

    digest: DigestMessage
    blobs: Blobs = field(repr=False)

    @property
    def subject(self) -> str:
        return subject(self.digest)


def subject(digest: DigestMessage) -> str:
    """Return how a missing blob is named in a PreconditionFailure."""
    return f"blobs/{digest.hash}/{digest.size_bytes}"


def build_action(
    arguments: Sequence[str],
    *,
    inputs: Mapping[str, Node] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    do_not_cache: bool = False,
    platform: Mapping[str, str] | None = None,
    salt: bytes = b"",
    **command: Any,
) -> BuiltAction:
    """Build an action. `command` sets further fields of its Command: output_paths, working_directory, …"""
    blobs: Blobs = {}
    variables = [
        Command.EnvironmentVariable(name=name, value=value) for name, value in sorted((environment or {}).items())
    ]
    action = Action(
        command_digest=put(blobs, Command(arguments=arguments, environment_variables=variables, **command)),
        input_root_digest=put_tree(blobs, inputs or {}),
        do_not_cache=do_not_cache,
        salt=salt,
    )
    if platform is not None:
        properties = [Platform.Property(name=name, value=value) for name, value in platform.items()]
        action.platform.properties.extend(properties)
    if timeout_s is not None:
        action.timeout.FromNanoseconds(int(timeout_s * 10**9))
    return BuiltAction(put(blobs, action), blobs)


def shell(script: str, **options: Any) -> BuiltAction:
    """Build an action that runs a shell script; never equal to one built elsewhere, unless `salt` says so."""
    options.setdefault("salt", os.urandom(8))
    return build_action(("/bin/sh", "-c", script), **options)


@dataclass(frozen=True)
class Finished:
    """A stream of operations, read to its end."""

    operations: list[Operation]

    @property
    def name(self) -> str:
        return self.operations[0].name

    @property
    def metadata(self) -> list[ExecuteOperationMetadata]:
        return [metadata_of(operation) for operation in self.operations]

    @property
    def response(self) -> ExecuteResponse:
        response = ExecuteResponse()
        assert self.operations[-1].response.Unpack(response)
        return response

    @property
    def result(self) -> ActionResult:
        """The result of an execution whose status is OK."""
        assert self.response.status == Status(), self.response.status
        assert self.response.HasField("result")
        return self.response.result


def metadata_of(operation: Operation) -> ExecuteOperationMetadata:
    metadata = ExecuteOperationMetadata()
    assert operation.metadata.Unpack(metadata)
    return metadata


def finished(operations: Sequence[Operation]) -> Finished:
    """Check a whole operation stream. Asserts what holds of each: the conformance duties EXE-10 to EXE-18."""
    assert operations, "the stream ended without an operation"
    *running, last = operations
    assert last.done
    assert not any(operation.done for operation in running)
    assert {operation.name for operation in operations} == {last.name}
    assert last.name
    assert not any(operation.HasField("error") for operation in operations)
    whole = Finished(list(operations))
    *stages, final = [metadata.stage for metadata in whole.metadata]
    assert final == ExecutionStage.COMPLETED
    assert ExecutionStage.COMPLETED not in stages
    assert all(metadata.HasField("action_digest") for metadata in whole.metadata)
    assert {metadata.digest_function for metadata in whole.metadata} == {DigestFunction.SHA256.value}
    if whole.response.status.code == 0:
        assert whole.response.HasField("result")
    return whole


class Stream:
    """The stream of an Execute or WaitExecution call, and what has been read of it."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[Any, Operation]) -> None:
        self.call = call
        self.operations: list[Operation] = []

    async def until(self, stage: int) -> Operation:
        """Read up to the first operation in a stage, and return that."""
        async for operation in self.call:
            self.operations.append(operation)
            if metadata_of(operation).stage == stage:
                return operation
        raise AssertionError(f"the stream ended without stage {stage}")

    async def first(self) -> Operation:
        """Read the first operation."""
        async for operation in self.call:
            self.operations.append(operation)
            return operation
        raise AssertionError("the stream ended without an operation")

    async def finish(self) -> Finished:
        """Read to the end."""
        async for operation in self.call:
            self.operations.append(operation)
        return finished(self.operations)

    def drop(self) -> None:
        """Go away in the middle."""
        self.call.cancel()


class Client:
    """One connection to a server, and what tests ask of it."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.cas = ContentAddressableStorageStub(self._channel)
        self.action_cache = ActionCacheStub(self._channel)
        self.execution = ExecutionStub(self._channel)
        self.operations = OperationsStub(self._channel)
        self.capabilities = CapabilitiesStub(self._channel)
        self.byte_stream = ByteStreamStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def upload(self, blobs: Blobs) -> None:
        """Upload what is not there yet."""
        missing = set(map(from_message, await self.find_missing(blobs)))
        request = BatchUpdateBlobsRequest()
        for digest, data in blobs.items():
            if digest in missing:
                request.requests.add(digest=to_message(digest), data=data)
        answer = await self.cas.BatchUpdateBlobs(request, timeout=RPC_TIMEOUT_S)
        assert all(response.status.code == 0 for response in answer.responses), answer

    async def find_missing(self, digests: Iterable[Digest]) -> list[DigestMessage]:
        request = FindMissingBlobsRequest(blob_digests=map(to_message, digests))
        return list((await self.cas.FindMissingBlobs(request, timeout=RPC_TIMEOUT_S)).missing_blob_digests)

    async def read(self, digest: DigestMessage) -> bytes:
        """Return a blob."""
        request = ReadRequest(resource_name=subject(digest))
        call = self.byte_stream.Read(request, timeout=RPC_TIMEOUT_S)
        return b"".join([response.data async for response in call])

    async def stdout(self, result: ActionResult) -> bytes:
        return await self.read(result.stdout_digest)

    async def stderr(self, result: ActionResult) -> bytes:
        return await self.read(result.stderr_digest)

    def call(
        self,
        action: BuiltAction,
        *,
        instance: str = "",
        priority: int = 0,
        tool: str = "",
        invocation: str = "",
        **request: Any,
    ) -> Stream:
        """Call Execute for an action whose blobs are there. `request` sets further fields of the ExecuteRequest."""
        caller = RequestMetadata(
            tool_details=ToolDetails(tool_name=tool), tool_invocation_id=invocation
        ).SerializeToString()
        message = ExecuteRequest(
            instance_name=instance,
            action_digest=action.digest,
            execution_policy=ExecutionPolicy(priority=priority),
            **request,
        )
        return Stream(self.execution.Execute(message, timeout=RPC_TIMEOUT_S, metadata=[(_REQUEST_METADATA, caller)]))

    async def start(self, action: BuiltAction, **options: Any) -> Stream:
        """Upload an action, call Execute and read the first operation."""
        await self.upload(action.blobs)
        stream = self.call(action, **options)
        await stream.first()
        return stream

    async def execute(self, action: BuiltAction, **options: Any) -> Finished:
        """Upload an action, execute it and wait for its end."""
        await self.upload(action.blobs)
        return await self.call(action, **options).finish()

    def wait(self, name: str) -> Stream:
        """Call WaitExecution."""
        return Stream(self.execution.WaitExecution(WaitExecutionRequest(name=name), timeout=RPC_TIMEOUT_S))

    async def cached(self, action: BuiltAction, instance: str = "") -> ActionResult | None:
        """Return what the action cache has."""
        request = GetActionResultRequest(instance_name=instance, action_digest=action.digest)
        try:
            return await self.action_cache.GetActionResult(request, timeout=RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return None

    async def plant(self, action: BuiltAction, result: ActionResult) -> None:
        """Write a result into the action cache."""
        request = UpdateActionResultRequest(action_digest=action.digest, action_result=result)
        await self.action_cache.UpdateActionResult(request, timeout=RPC_TIMEOUT_S)


async def eventually(
    condition: Callable[[], object] | Callable[[], Awaitable[object]], what: str, *, timeout_s: float = 20
) -> None:
    """Return as soon as `condition` holds; the loop goes on meanwhile. Raises AssertionError when it never does."""
    deadline = time.monotonic() + patience(timeout_s)
    while True:
        holds = condition()
        if await holds if inspect.isawaitable(holds) else holds:
            return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


class Gate:
    """Where an action stops until the test lets it go on: a named pipe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        path.chmod(0o666)
        self._fd: int | None = None

    @property
    def script(self) -> str:
        """Shell code that waits at the gate; needs no more of the machine than `cat`."""
        return f"cat {self.path} >/dev/null"

    async def wait_reached(self) -> None:
        """Wait until an action stands at the gate."""
        await eventually(self._is_reached, f"an action at {self.path.name}")

    async def open(self) -> None:
        """Wait until an action stands at the gate, and let it pass."""
        await self.wait_reached()
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None

    def _is_reached(self) -> bool:
        if self._fd is None:
            with contextlib.suppress(OSError):  # ENXIO: nobody reads
                self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        return self._fd is not None


class SideEffects:
    """A directory outside of every input root that actions of any user can write to: what is there, has happened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        directory.chmod(0o777)
        self._gates = 0

    def gate(self) -> Gate:
        self._gates += 1
        return Gate(self.directory / f"gate-{self._gates}")

    def gates_in_turn(self, count: int) -> tuple[str, list[Gate]]:
        """Return shell code for an action that runs several times, each run with a gate of its own, and the gates."""
        gates = [self.gate() for _ in range(count)]
        turns = [f"if mkdir {gate.path}.taken 2>/dev/null; then {gate.script}; exit; fi" for gate in gates]
        return "\n".join(turns), gates

    def mark(self, name: str) -> str:
        """Return shell code that leaves a mark of that name, a new one each time it runs."""
        return f"mktemp -q {self.directory}/{name}.XXXXXXXX >/dev/null"

    def count(self, name: str) -> int:
        return sum(1 for _ in self.directory.glob(f"{name}.*"))

    async def wait_for(self, name: str, count: int = 1) -> None:
        await eventually(lambda: self.count(name) >= count, f"{count} of {name}")

    def path(self, name: str) -> Path:
        return self.directory / name


def status_of(error: grpc.aio.AioRpcError) -> Status:
    """Return the status an RPC failed with, whole: with its details."""
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            status = Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details()), "GEN-02"
            return status
    return Status(code=error.code().value[0], message=error.details() or "")


@contextlib.asynccontextmanager
async def failing_rpc() -> AsyncIterator[Status]:
    """Expect the RPC inside to fail; the status given is filled in then."""
    status = Status()
    try:
        yield status
    except grpc.aio.AioRpcError as error:
        status.CopyFrom(status_of(error))
    else:
        raise AssertionError("the RPC did not fail")
