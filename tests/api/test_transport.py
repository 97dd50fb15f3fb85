"""What every call has in common: instance names, headers, health, reflection, pings (conformance GEN-*)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from expbuild.digest import DigestFunction
from expbuild.reapi import (
    ActionResult,
    BatchReadBlobsRequest,
    BatchUpdateBlobsRequest,
    FindMissingBlobsRequest,
    GetActionResultRequest,
    GetCapabilitiesRequest,
    GetTreeRequest,
    RequestMetadata,
    ToolDetails,
    UpdateActionResultRequest,
    WriteRequest,
)
from tests.api.client import TIMEOUT_S, Client, Refusal, code_of, message, refusal
from tests.api.conftest import StartServer

METADATA = "build.bazel.remote.execution.v2.requestmetadata-bin"

SERVICES = {
    "build.bazel.remote.execution.v2.ActionCache",
    "build.bazel.remote.execution.v2.Capabilities",
    "build.bazel.remote.execution.v2.ContentAddressableStorage",
    "google.bytestream.ByteStream",
}
"""What a server without workers serves, beside health and reflection."""


@pytest_asyncio.fixture
async def plain(start_server: StartServer) -> AsyncIterator[Client]:
    """A client of a cache with the default configuration."""
    client = Client(start_server("plain").address)
    yield client
    await client.close()


def calls_of_every_kind(client: Client, instance_name: str) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return one harmless call of each rpc that names an instance, not yet made; the later ones need the earlier."""
    digest = message(client.digest(b"of every kind"))
    prefix = f"{instance_name}/" if instance_name else ""
    name = f"{prefix}uploads/u/blobs/{digest.hash}/{digest.size_bytes}"
    result = ActionResult(exit_code=1)
    cas, cache = client.cas, client.action_cache

    async def tree() -> None:
        request = GetTreeRequest(instance_name=instance_name, root_digest=message(client.digest(b"")))
        async for _ in cas.GetTree(request, timeout=TIMEOUT_S):
            pass

    return {
        "GetCapabilities": lambda: client.capabilities.GetCapabilities(
            GetCapabilitiesRequest(instance_name=instance_name)
        ),
        "FindMissingBlobs": lambda: cas.FindMissingBlobs(FindMissingBlobsRequest(instance_name=instance_name)),
        "BatchUpdateBlobs": lambda: cas.BatchUpdateBlobs(BatchUpdateBlobsRequest(instance_name=instance_name)),
        "BatchReadBlobs": lambda: cas.BatchReadBlobs(BatchReadBlobsRequest(instance_name=instance_name)),
        "GetTree": tree,
        "Write": lambda: client.write(WriteRequest(resource_name=name, data=b"of every kind", finish_write=True)),
        "Read": lambda: client.read(f"{prefix}blobs/{client.digest(b'').hash}/0"),
        "UpdateActionResult": lambda: cache.UpdateActionResult(
            UpdateActionResultRequest(instance_name=instance_name, action_digest=digest, action_result=result)
        ),
        "GetActionResult": lambda: cache.GetActionResult(
            GetActionResultRequest(instance_name=instance_name, action_digest=digest)
        ),
    }


@pytest.mark.parametrize("instance_name", ["", "main", "remote-execution/default_instance", "ünïcode", "a b"])
async def test_gen_10_any_well_formed_instance_is_served_by_every_rpc(plain: Client, instance_name: str) -> None:
    answers: list[Any] = [await call() for call in calls_of_every_kind(plain, instance_name).values()]
    assert answers[-1].exit_code == 1


@pytest.mark.parametrize("instance_name", ["blobs", "a/operations/b", "/a", "a//b", "x" * 1025])
async def test_gen_11_malformed_instance_is_invalid_for_every_rpc(plain: Client, instance_name: str) -> None:
    # A slash before the name belongs to the resource name where there is one.
    lenient = {"Read", "Write"} if instance_name == "/a" else set()
    for method, call in calls_of_every_kind(plain, instance_name).items():
        if method in lenient:
            await call()
        else:
            assert await code_of(call()) == "INVALID_ARGUMENT", method


@pytest.mark.duty("GEN-12", "CAP-02")
async def test_strict_server_serves_its_own_instance_only(start_server: StartServer) -> None:
    server = start_server("strict", server={"instance_name": "my/builds", "strict_instance_name": True})
    client = Client(server.address)
    for call in calls_of_every_kind(client, "my/builds").values():
        await call()
    for instance_name in ("", "my", "my/builds/x", "My/Builds"):
        for call in calls_of_every_kind(client, instance_name).values():
            assert await refusal(call()) == Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"instance {instance_name!r} is not served here; this server serves only 'my/builds' "
                "(server.strict_instance_name)",
            )
    await client.close()


async def test_no_instance_name_means_the_default_instance(start_server: StartServer) -> None:
    client = Client(start_server("named", server={"instance_name": "main"}).address)
    action = message(client.digest(b"default instance"))
    await client.action_cache.UpdateActionResult(
        UpdateActionResultRequest(action_digest=action, action_result=ActionResult(exit_code=5))
    )
    request = GetActionResultRequest(instance_name="main", action_digest=action)
    assert (await client.action_cache.GetActionResult(request)).exit_code == 5
    await client.close()


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(RequestMetadata(tool_details=ToolDetails(tool_name="bazel")).SerializeToString(), id="good"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xff\xff garbage", id="garbage"),
        pytest.param(b"\x12\x02\xff\xfe", id="not-utf-8"),
        pytest.param(bytes(20_000), id="20-kB"),
    ],
)
async def test_gen_08_request_metadata_never_fails_a_call(plain: Client, value: bytes) -> None:
    for metadata in ([(METADATA, value)], [(METADATA, value), (METADATA, b"\x00twice")]):
        request = GetCapabilitiesRequest()
        answer = await plain.capabilities.GetCapabilities(request, metadata=metadata, timeout=TIMEOUT_S)
        assert answer.low_api_version.major == 2


@pytest.mark.parametrize("service", ["", *sorted(SERVICES)])
async def test_gen_22_server_and_each_service_are_healthy(plain: Client, service: str) -> None:
    stub: Any = health_pb2_grpc.HealthStub(plain.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_gen_22_unknown_service_is_not_found(plain: Client) -> None:
    stub: Any = health_pb2_grpc.HealthStub(plain.channel)
    call = stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=TIMEOUT_S)
    assert await refusal(call) == Refusal(grpc.StatusCode.NOT_FOUND, "there is no service 'no.such.Service' here")


async def test_gen_22_health_of_everything_is_listed(plain: Client) -> None:
    stub: Any = health_pb2_grpc.HealthStub(plain.channel)
    answer = await stub.List(health_pb2.HealthListRequest(), timeout=TIMEOUT_S)  # type: ignore[attr-defined]  # newer than its stubs
    assert {name: entry.status for name, entry in answer.statuses.items()} == dict.fromkeys(["", *SERVICES], 1)


async def test_gen_20_health_watchers_hear_of_the_end_and_do_not_delay_it(start_server: StartServer) -> None:
    server = start_server("watched")
    client = Client(server.address)
    stub: Any = health_pb2_grpc.HealthStub(client.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="?"), timeout=TIMEOUT_S)
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    stopped = asyncio.ensure_future(asyncio.to_thread(server.terminate, timeout_s=4))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await watch.read() is grpc.aio.EOF
    await stopped
    await client.close()
    server.start()


async def test_gen_22_reflection_lists_every_service(plain: Client) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(plain.channel)  # type: ignore[arg-type]  # its stubs know no aio
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=service) for service in SERVICES),
    ]
    answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests), timeout=TIMEOUT_S)]
    listed = {service.name for service in answers[0].list_services_response.service}
    assert listed == SERVICES | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in answers[1:])


@pytest.mark.parametrize(
    "method",
    [
        "build.bazel.remote.execution.v2.Execution/Execute",
        "build.bazel.remote.execution.v2.ContentAddressableStorage/NoSuchMethod",
        "google.longrunning.Operations/GetOperation",
        "no.such.Service/Method",
    ],
)
async def test_gen_01_what_is_not_served_is_unimplemented(plain: Client, method: str) -> None:
    call: Any = plain.channel.unary_unary(f"/{method}")
    assert await code_of(call(b"", timeout=TIMEOUT_S)) == "UNIMPLEMENTED"


async def test_gen_17_frequent_pings_on_an_idle_connection_are_tolerated(plain: Client) -> None:
    """Clients ping idle connections; the library's defaults would end the connection after the third.

    Spoken by hand, because its own client waits a second between pings.
    """
    host, _, port = plain.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, b""))
    answered: list[bytes] = []
    async with asyncio.timeout(TIMEOUT_S):
        for number in range(20):
            writer.write(_frame(_PING, number.to_bytes(8)))
            while len(answered) <= number:
                header = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(header[:3]))
                assert header[3] != _GOAWAY, payload
                if header[3] == _PING and header[4] == _ACK:
                    answered.append(payload)
    assert answered == [number.to_bytes(8) for number in range(20)]
    writer.close()
    await writer.wait_closed()


_SETTINGS, _PING, _GOAWAY, _ACK = 4, 6, 7, 1


def _frame(kind: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame of the connection itself, without flags."""
    return len(payload).to_bytes(3) + bytes([kind, 0]) + bytes(4) + payload


async def test_gen_06_message_beyond_the_receive_limit_is_resource_exhausted(plain: Client) -> None:
    call: Any = plain.channel.unary_unary("/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs")
    assert await code_of(call(bytes((16 << 20) + 1), timeout=TIMEOUT_S)) == "RESOURCE_EXHAUSTED"
    assert await plain.missing(plain.digest(b"")) == set()


async def test_gen_17_long_headers_are_accepted(plain: Client) -> None:
    """Tokens and metadata together may be far beyond the library's default of 8 KiB."""
    metadata = [("authorization", "Bearer " + "t" * 30_000)]
    await plain.capabilities.GetCapabilities(GetCapabilitiesRequest(), metadata=metadata, timeout=TIMEOUT_S)


async def test_a_hundred_streams_on_one_connection_are_served_at_once(plain: Client) -> None:
    """Bazel and Buck2 open that many before they open another connection."""
    blobs = [b"stream %d" % i for i in range(100)]
    digests = [DigestFunction.SHA256.digest_of(blob) for blob in blobs]
    writes = [plain.bytestream.Write(timeout=TIMEOUT_S) for _ in blobs]
    for write, digest, blob in zip(writes, digests, blobs, strict=True):
        await write.write(WriteRequest(resource_name=plain.write_name(digest), data=blob, finish_write=True))
    for write in writes:
        await write.done_writing()
    assert [(await write).committed_size for write in writes] == [len(blob) for blob in blobs]
