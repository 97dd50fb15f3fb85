"""The two transports: which one is taken, and that no client can tell them apart.

What is here talks to each of them directly, with services made for the purpose, and compares two whole servers. The
suites beside it run on either: `EXPBUILD_TEST_TRANSPORT=grpcio|native` (see tests/support/server.py).
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as AnyMessage
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from expbuild.api import native
from expbuild.api.transport import Choice, Server, create_server, select
from expbuild.config import parse_config
from expbuild.digest import DigestFunction
from expbuild.errors import ConfigError, StartupError
from expbuild.reapi import (
    ActionCacheServicer,
    ActionCacheStub,
    ActionResult,
    ByteStreamServicer,
    ByteStreamStub,
    CapabilitiesStub,
    ContentAddressableStorageStub,
    DigestMessage,
    FindMissingBlobsRequest,
    GetActionResultRequest,
    GetCapabilitiesRequest,
    QueryWriteStatusRequest,
    QueryWriteStatusResponse,
    ReadRequest,
    ReadResponse,
    RetryInfo,
    Status,
    UpdateActionResultRequest,
    WriteRequest,
    WriteResponse,
    add_ActionCacheServicer_to_server,
    add_ByteStreamServicer_to_server,
)
from tests.support.server import Config, ReServer, host_pool_config

pytestmark = pytest.mark.one_transport

TRANSPORTS: tuple[Literal["grpcio", "native"], ...] = ("grpcio", "native")
MIB = 1 << 20


# ---- which one -------------------------------------------------------------------------------------------------

NOT_INSTALLED = "pygrpc-native is not installed: pip install 'expbuild[native]'"


@pytest.mark.parametrize(
    ("choice", "obstacle", "tls", "tokens", "expected"),
    [
        pytest.param(
            "auto", None, False, False, ("native", "the native transport can do all that is configured"), id="auto"
        ),
        pytest.param("auto", NOT_INSTALLED, False, False, ("grpcio", NOT_INSTALLED), id="auto-not-installed"),
        pytest.param("auto", None, True, False, ("grpcio", "the native transport has no TLS"), id="auto-tls"),
        pytest.param(
            "auto",
            None,
            False,
            True,
            ("grpcio", "the native transport does not protect memory from callers without a token"),
            id="auto-tokens",
        ),
        pytest.param("native", None, False, False, ("native", "server.transport says so"), id="native"),
        pytest.param("native", None, False, True, ("native", "server.transport says so"), id="native-tokens"),
        pytest.param("grpcio", None, False, False, ("grpcio", "server.transport says so"), id="grpcio"),
        pytest.param("grpcio", NOT_INSTALLED, True, True, ("grpcio", "server.transport says so"), id="grpcio-tls"),
    ],
)
def test_selection(choice: Choice, obstacle: str | None, tls: bool, tokens: bool, expected: tuple[str, str]) -> None:
    """`auto` is native where that can do what is configured; what is named is taken."""
    selected = select(choice, obstacle=obstacle, tls=tls, tokens=tokens)
    assert (selected.transport, selected.reason) == expected


def test_native_by_name_falls_back_where_it_lacks_something() -> None:
    """With TLS grpcio serves, and the line that says so is a warning."""
    selected = select("native", obstacle=None, tls=True, tokens=False)
    assert (selected.transport, selected.is_fallback) == ("grpcio", True)
    assert selected.reason == 'server.transport says "native", which has no TLS: grpcio serves in its place'


def test_native_by_name_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(StartupError) as caught:
        select("native", obstacle=NOT_INSTALLED, tls=False, tokens=False)
    assert NOT_INSTALLED in str(caught.value)


def test_a_version_nobody_has_tried_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """We replace one method of the library that is not public, so its version counts."""
    assert native.obstacle() is None
    monkeypatch.setattr("pygrpc_native.__version__", "0.6.0")
    assert native.obstacle() == "pygrpc-native 0.6.0 is installed, and expbuild knows only 0.5.x"


def test_the_default_is_auto_and_other_words_are_refused() -> None:
    """`server.transport` in the configuration."""
    assert parse_config("", "x").server.transport == "auto"
    with pytest.raises(ConfigError) as caught:
        parse_config('[server]\ntransport = "rust"', "x")
    assert caught.value.problems == ('server.transport: expected "auto", "grpcio" or "native", got "rust"',)


def _memory_config(transport: str) -> dict[str, Any]:
    return {
        "server": {"address": "127.0.0.1:0", "transport": transport},
        "storage": {"cas": {"backend": "memory"}, "action_cache": {"backend": "memory"}},
        "capabilities": {"exec_enabled": False},
    }


@pytest.fixture
def without_package(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that cannot import pygrpc_native."""
    (tmp_path / "pygrpc_native.py").write_text("raise ModuleNotFoundError(\"No module named 'pygrpc_native'\")\n")
    return {"PYTHONPATH": ":".join([str(tmp_path), *(path for path in sys.path if path)])}


def test_without_the_package_auto_serves_on_grpcio_and_says_why(
    tmp_path: Path, without_package: dict[str, str]
) -> None:
    """The extra is optional."""
    with ReServer(tmp_path, _memory_config("auto"), env=without_package) as server:
        (line,) = server.events("transport.selected")
    assert (line["transport"], line["reason"]) == ("grpcio", NOT_INSTALLED)


def test_without_the_package_native_does_not_start(tmp_path: Path, without_package: dict[str, str]) -> None:
    """The error says what to install."""
    server = ReServer(tmp_path, _memory_config("native"), env=without_package)
    with pytest.raises(AssertionError, match=r'ended with 1 .*(.|\n)*"native" is not possible: pygrpc-native is not '):
        server.start()


def test_check_config_needs_no_package(tmp_path: Path, without_package: dict[str, str]) -> None:
    """A configuration is checked without loading any transport."""
    (tmp_path / "x.toml").write_text('[server]\ntransport = "native"\n')
    done = subprocess.run(
        [sys.executable, "-m", "expbuild", "check-config", str(tmp_path / "x.toml")],
        env=without_package,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'transport = "native"' in done.stdout


# ---- services on each ------------------------------------------------------------------------------------------


class Calls(ActionCacheServicer):
    """Does in `GetActionResult` what `instance_name` says, and remembers what it saw."""

    def __init__(self) -> None:
        self.metadata: list[tuple[str, str | bytes]] = []
        self.peer = ""
        self.time_remaining_s = 0.0
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    async def GetActionResult(self, request: GetActionResultRequest, context: Any) -> ActionResult:
        self.metadata = list(context.invocation_metadata())
        self.peer, self.time_remaining_s = context.peer(), context.time_remaining()
        match request.instance_name:
            case "abort":
                await context.abort(grpc.StatusCode.NOT_FOUND, "not thére\n100%")
            case "details":
                await context.abort_with_status(rpc_status.to_status(DETAILED))
            case "trailing":
                context.set_trailing_metadata((("x-text", "1"), ("x-bytes-bin", b"\0\xff")))
            case "wait":
                await self.wait()
            case "big":
                return ActionResult(stdout_raw=bytes(40 * MIB))
        return ActionResult(exit_code=len(request.inline_output_files))

    async def UpdateActionResult(self, request: UpdateActionResultRequest, context: Any) -> ActionResult:
        raise NotImplementedError

    async def wait(self) -> None:
        self.waiting.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Streams(ByteStreamServicer):
    """Does in `Read` and `Write` what `resource_name` says."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Read(self, request: ReadRequest, context: Any) -> AsyncIterator[ReadResponse]:
        for number in range(request.read_limit):
            yield ReadResponse(data=bytes(MIB) if request.resource_name == "large" else b"%d" % number)
        if request.resource_name == "wait":
            await self._calls.wait()
        if request.resource_name == "abort":
            await context.abort(grpc.StatusCode.DATA_LOSS, "in the middle")

    async def Write(self, request_iterator: AsyncIterator[WriteRequest], context: Any) -> WriteResponse:
        received = 0
        async for request in request_iterator:
            received += len(request.data)
            if request.resource_name == "early":
                return WriteResponse(committed_size=-1)
            if request.resource_name == "abort":
                await context.abort_with_status(rpc_status.to_status(DETAILED))
            if request.resource_name == "wait":
                await self._calls.wait()
        return WriteResponse(committed_size=received)

    async def QueryWriteStatus(self, request: QueryWriteStatusRequest, context: Any) -> QueryWriteStatusResponse:
        raise NotImplementedError


def _detailed() -> Status:
    detail = AnyMessage()
    detail.Pack(RetryInfo())
    return Status(code=8, message="too müch", details=[detail])


DETAILED = _detailed()


class Running:
    """A server of one transport with the services above, and a client of it."""

    def __init__(self, transport: Choice) -> None:
        self.transport = transport
        self.server: Server = create_server(transport)
        self.calls = Calls()
        self.streams = Streams(self.calls)
        add_ActionCacheServicer_to_server(self.calls, self.server.handlers)
        add_ByteStreamServicer_to_server(self.streams, self.server.handlers)
        self.port = self.server.bind("127.0.0.1:0")
        self.channel = self.new_channel()
        self.action_cache = ActionCacheStub(self.channel)
        self.byte_stream = ByteStreamStub(self.channel)

    def new_channel(self) -> grpc.aio.Channel:
        """Return a channel with a connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=options)

    def get(self, what: str = "", **how: Any) -> Any:
        return self.action_cache.GetActionResult(GetActionResultRequest(instance_name=what), **how)

    async def read(self, what: str, limit: int) -> list[bytes]:
        return [m.data async for m in self.byte_stream.Read(ReadRequest(resource_name=what, read_limit=limit))]

    async def write(self, what: str, *chunks: bytes) -> int:
        async def requests() -> AsyncIterator[WriteRequest]:
            for chunk in chunks:
                yield WriteRequest(resource_name=what, data=chunk)

        return (await self.byte_stream.Write(requests())).committed_size


@pytest_asyncio.fixture(params=TRANSPORTS)
async def running(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    running = Running(request.param)
    await running.server.start()
    yield running
    await running.channel.close()
    await running.server.stop(0)


async def _error(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def _status_of(error: Any) -> Any:
    """Return the google.rpc.Status an error carries, None for one without details."""
    return rpc_status.from_call(error)


async def test_a_call_arrives_with_its_metadata_peer_and_deadline(running: Running) -> None:
    """Text, bytes and repeated keys arrive in order."""
    sent = (("x-bytes-bin", b"\0\xff"), ("x-text", "a"), ("x-text", "b"))
    await running.get(metadata=sent, timeout=30)
    assert [(key, value) for key, value in running.calls.metadata if key.startswith("x-")] == list(sent)
    assert running.calls.peer.startswith("ipv4:127.0.0.1:")
    assert 20 < running.calls.time_remaining_s < 31  # the wire's deadline is rounded up


async def test_a_status_arrives_whole(running: Running) -> None:
    """Code and message, whatever characters it has."""
    error = await _error(running.get("abort"))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "not thére\n100%")
    assert _status_of(error) is None


async def test_status_details_arrive_whole(running: Running) -> None:
    """Also from a call that streams its request."""
    for call in (running.get("details"), running.write("abort", b"x")):
        assert _status_of(await _error(call)) == DETAILED


async def test_trailing_metadata_arrives(running: Running) -> None:
    """Beside an OK."""
    call = running.get("trailing")
    await call
    assert [tuple(pair) for pair in await call.trailing_metadata()] == [("x-text", "1"), ("x-bytes-bin", b"\0\xff")]


async def test_a_stream_arrives_in_order_and_ends_with_its_status(running: Running) -> None:
    """What was sent before a failure is not lost."""
    assert await running.read("", 1000) == [b"%d" % number for number in range(1000)]
    stream: Any = running.byte_stream.Read(ReadRequest(resource_name="abort", read_limit=2))
    assert [(await stream.read()).data, (await stream.read()).data] == [b"0", b"1"]
    assert await stream.code() == grpc.StatusCode.DATA_LOSS
    assert await stream.details() == "in the middle"


async def test_uploads_stream_and_may_be_answered_early(running: Running) -> None:
    """A server that has the blob answers before the end of the upload."""
    assert await running.write("", *[bytes(1000)] * 300) == 300_000
    assert await running.write("early", *[bytes(1000)] * 300) == -1


async def test_a_deadline_ends_the_handler_too(running: Running) -> None:
    """Nobody waits for its answer any more."""
    error = await _error(running.get("wait", timeout=0.2))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(running.calls.cancelled.wait(), 10)


async def test_a_client_that_goes_away_cancels_its_calls(running: Running) -> None:
    """Each kind of call."""
    read = ReadRequest(resource_name="wait", read_limit=1)

    async def requests() -> AsyncIterator[WriteRequest]:
        yield WriteRequest(resource_name="wait")
        await asyncio.Event().wait()

    calls = running.calls
    starts: list[Callable[[], Any]] = [
        lambda: running.get("wait"),
        lambda: running.byte_stream.Read(read),
        lambda: running.byte_stream.Write(requests()),
    ]
    for start in starts:
        calls.waiting.clear()
        calls.cancelled.clear()
        call = start()
        await asyncio.wait_for(calls.waiting.wait(), 10)
        call.cancel()
        await asyncio.wait_for(calls.cancelled.wait(), 10)


async def test_messages_up_to_16_mib_are_taken_and_answers_may_be_larger(running: Running) -> None:
    """The limit is one for all kinds of calls, and says itself."""

    def request(size_mib: int) -> Any:
        files = ["x" * MIB] * size_mib
        return running.action_cache.GetActionResult(GetActionResultRequest(inline_output_files=files))

    assert (await request(15)).exit_code == 15
    assert await running.write("", bytes(15 * MIB)) == 15 * MIB
    for call in (request(17), running.write("", bytes(17 * MIB))):
        error = await _error(call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(error.details()).startswith("SERVER: Received message larger than max (178")
    assert len((await running.get("big")).stdout_raw) == 40 * MIB


async def test_gzip_requests_are_understood(running: Running) -> None:
    """gRPC's own compression, which every client has built in."""
    request = GetActionResultRequest(inline_output_files=["y" * 10_000])
    assert (await running.action_cache.GetActionResult(request, compression=grpc.Compression.Gzip)).exit_code == 1


async def test_an_unknown_method_is_unimplemented(running: Running) -> None:
    """In a service that is served, and in one that is not."""
    for method in ("/build.bazel.remote.execution.v2.ActionCache/Nope", "/nobody.Knows/It"):
        call: Any = running.channel.unary_unary(method)
        assert (await _error(call(b""))).code() == grpc.StatusCode.UNIMPLEMENTED


async def test_100_streams_on_one_connection_are_open_at_once(running: Running) -> None:
    """As many as Bazel opens; calls go on beside them."""
    request = ReadRequest(resource_name="wait", read_limit=1)
    streams: list[Any] = [running.byte_stream.Read(request) for _ in range(100)]
    assert {(await stream.read()).data for stream in streams} == {b"0"}
    assert (await running.get(timeout=10)).exit_code == 0
    running.calls.release.set()
    assert [await stream.code() for stream in streams] == [grpc.StatusCode.OK] * 100


@pytest.mark.timeout(60)
async def test_readers_who_stop_reading_stop_nobody_else(running: Running) -> None:
    """Their streams wait without a thread each: other streams, executors and the server's own stop go on."""
    async with AsyncExitStack() as channels:
        request = ReadRequest(resource_name="large", read_limit=1000)
        stalled: list[Any] = []
        for _ in range(40):
            channel = await channels.enter_async_context(running.new_channel())
            stalled.append(ByteStreamStub(channel).Read(request))
        for stream in stalled:
            assert len((await stream.read()).data) == MIB
        assert len(await asyncio.wait_for(running.read("large", 50), 20)) == 50
        await asyncio.wait_for(asyncio.to_thread(int), 10)
        await asyncio.wait_for(running.server.stop(0.2), 10)


async def _until_refused(running: Running) -> None:
    while True:
        await running.get(timeout=10)


async def test_stop_lets_running_calls_finish(running: Running) -> None:
    """Within the grace; new calls are refused."""
    call = running.get("wait")
    await asyncio.wait_for(running.calls.waiting.wait(), 10)
    stopping = asyncio.create_task(running.server.stop(20))
    refused = await _error(_until_refused(running))
    # grpcio cancels a call that comes in the very moment.
    assert refused.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    running.calls.release.set()
    assert (await call).exit_code == 0
    await asyncio.wait_for(stopping, 10)


async def test_stop_cancels_what_runs_longer_than_the_grace(running: Running) -> None:
    """The client is told UNAVAILABLE, which it retries."""
    call = running.get("wait")
    await asyncio.wait_for(running.calls.waiting.wait(), 10)
    await asyncio.wait_for(running.server.stop(0.1), 10)
    assert running.calls.cancelled.is_set()
    assert (await _error(call)).code() == grpc.StatusCode.UNAVAILABLE


async def test_a_port_that_is_taken_is_refused(running: Running) -> None:
    """By the other transport too: two servers on one port would take turns at answering."""
    for transport in TRANSPORTS:
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{running.port}"):
            create_server(transport).bind(f"127.0.0.1:{running.port}")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("address", ["203.0.113.1:0", "nobody.invalid:0"])
async def test_an_address_that_is_not_ours_is_refused(transport: Choice, address: str) -> None:
    """One sentence that names the key."""
    with pytest.raises(StartupError, match=f"server.address: cannot listen on {address}"):
        create_server(transport).bind(address)


# ---- two whole servers -----------------------------------------------------------------------------------------

BLOB = b"b" * (3 * MIB)
BLOB_DIGEST = DigestFunction.SHA256.digest_of(BLOB)
ABSENT = DigestFunction.SHA256.digest_of(b"never stored")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ReServer]]:
    """A cache on each transport."""
    directory = tmp_path_factory.mktemp("transports")
    with (
        ReServer(directory / "grpcio", _memory_config("grpcio")) as grpcio,
        ReServer(directory / "native", _memory_config("native")) as native,
    ):
        yield {"grpcio": grpcio, "native": native}


async def _upload(channel: grpc.aio.Channel, data: bytes) -> Any:
    async def requests() -> AsyncIterator[WriteRequest]:
        name = f"uploads/0/blobs/{BLOB_DIGEST.hash}/{BLOB_DIGEST.size_bytes}"
        for start in range(0, len(data), MIB):
            chunk = data[start : start + MIB]
            yield WriteRequest(
                resource_name=name, write_offset=start, data=chunk, finish_write=start + len(chunk) == len(data)
            )

    return await ByteStreamStub(channel).Write(requests())


async def _download(channel: grpc.aio.Channel, name: str, **how: int) -> bytes:
    stream = ByteStreamStub(channel).Read(ReadRequest(resource_name=name, **how))
    return b"".join([message.data async for message in stream])


async def _ask_health(channel: grpc.aio.Channel, service: str) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return await stub.Check(health_pb2.HealthCheckRequest(service=service))


async def _list_services(channel: grpc.aio.Channel) -> set[str]:
    async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # its stubs know no aio
    answers = [answer async for answer in stub.ServerReflectionInfo(requests())]
    return {service.name for answer in answers for service in answer.list_services_response.service}


def _wire(digest: Any) -> DigestMessage:
    return DigestMessage(hash=digest.hash, size_bytes=digest.size_bytes)


CASES: dict[str, Callable[[grpc.aio.Channel], Awaitable[Any]]] = {
    "capabilities": lambda c: CapabilitiesStub(c).GetCapabilities(GetCapabilitiesRequest()),
    "miss": lambda c: ActionCacheStub(c).GetActionResult(GetActionResultRequest(action_digest=_wire(ABSENT))),
    "no-digest": lambda c: ActionCacheStub(c).GetActionResult(GetActionResultRequest()),
    "bad-instance": lambda c: ActionCacheStub(c).GetActionResult(GetActionResultRequest(instance_name="a//b")),
    "find-missing": lambda c: ContentAddressableStorageStub(c).FindMissingBlobs(
        FindMissingBlobsRequest(blob_digests=[_wire(ABSENT)])
    ),
    "upload-of-other-bytes": lambda c: _upload(c, b"c" * len(BLOB)),
    "upload-too-long": lambda c: _upload(c, BLOB + b"x"),
    "upload": lambda c: _upload(c, BLOB),
    "upload-again": lambda c: _upload(c, BLOB),
    "download": lambda c: _download(c, f"blobs/{BLOB_DIGEST.hash}/{BLOB_DIGEST.size_bytes}"),
    "download-part": lambda c: _download(
        c, f"blobs/{BLOB_DIGEST.hash}/{BLOB_DIGEST.size_bytes}", read_offset=5, read_limit=2 * MIB
    ),
    "download-behind-the-end": lambda c: _download(
        c, f"blobs/{BLOB_DIGEST.hash}/{BLOB_DIGEST.size_bytes}", read_offset=len(BLOB) + 1
    ),
    "download-absent": lambda c: _download(c, f"blobs/{ABSENT.hash}/{ABSENT.size_bytes}"),
    "download-nonsense": lambda c: _download(c, "what/ever"),
    "write-status": lambda c: ByteStreamStub(c).QueryWriteStatus(
        QueryWriteStatusRequest(resource_name=f"uploads/0/blobs/{ABSENT.hash}/{ABSENT.size_bytes}")
    ),
    "health": lambda c: _ask_health(c, ""),
    "health-of-a-service": lambda c: _ask_health(c, "google.bytestream.ByteStream"),
    "reflection": lambda c: _list_services(c),
}


async def _outcome(address: str, case: str) -> Any:
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            return await CASES[case](channel)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details(), _status_of(error)


async def test_both_transports_answer_alike(servers: dict[str, ReServer]) -> None:
    """Answers and statuses are equal, word by word, and so are the lines they leave in the log."""
    for case in CASES:
        outcomes = {name: await _outcome(server.address, case) for name, server in servers.items()}
        assert outcomes["native"] == outcomes["grpcio"], case
    lines = {
        name: [(line["rpc"], line["code"], line.get("reason")) for line in server.events("rpc.completed")]
        for name, server in servers.items()
    }
    assert lines["native"] == lines["grpcio"]
    assert len(lines["native"]) > 10


def test_the_choice_is_one_line_in_the_log(servers: dict[str, ReServer]) -> None:
    """With its reason, before anything is served."""
    for name, server in servers.items():
        (line,) = server.events("transport.selected")
        assert (line["transport"], line["reason"]) == (name, "server.transport says so")


async def test_the_native_transport_serves_unary_calls_itself(tmp_path: Path) -> None:
    """What goes through the grpcio server behind it has a unix socket for a peer, and costs ten times as much."""
    config: Config = {
        **host_pool_config(tmp_path / "state"),
        "server": {"address": "127.0.0.1:0", "transport": "native"},
    }
    config["capabilities"] = {"exec_enabled": False}
    with ReServer(tmp_path / "server", config) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            await CapabilitiesStub(channel).GetCapabilities(GetCapabilitiesRequest(), timeout=20)
        (line,) = (line for line in server.events("rpc.completed") if line["rpc"].endswith("GetCapabilities"))
        assert line["peer"].startswith("ipv4:127.0.0.1:")
