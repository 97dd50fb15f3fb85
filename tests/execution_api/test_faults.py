"""Disks that fill up under an execution, workers that are lost, calls that end before their actions."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import grpc
import pytest

from expbuild.digest import DigestFunction
from expbuild.reapi import (
    Action,
    BatchUpdateBlobsRequest,
    Command,
    DigestMessage,
    ExecuteRequest,
    ExecuteResponse,
    ExecutionStage,
    FindMissingBlobsRequest,
    GetActionResultRequest,
)
from tests.execution_api.conftest import StartServer
from tests.support.actions import (
    RPC_TIMEOUT_S,
    Client,
    SideEffects,
    Stream,
    eventually,
    failing_rpc,
    metadata_of,
    shell,
    status_of,
)
from tests.support.files import scratch_directory, small_disk
from tests.support.processes import process_tree
from tests.support.server import Config, ReServer, host_pool_config

DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE = 4, 8, 13, 14


@pytest.fixture(scope="module")
def full_server() -> Iterator[ReServer]:
    """A server whose CAS has room for 4 MiB, and whose work directories for 3."""
    with (
        scratch_directory("expbuild-full-") as directory,
        small_disk(directory / "cas", "4m") as cas,
        small_disk(directory / "work", "3m") as work,
    ):
        config = host_pool_config(directory / "state", workers=1)
        config["storage"]["cas"]["root_dir"] = str(cas / "cas")
        config["execution"]["pool"]["workers"][0]["work_dir"] = str(work / "work")
        with ReServer(directory / "server", config) as server:
            yield server


@pytest.mark.duty("GEN-19", "EXE-36", "OUT-17", "OUT-18")
@pytest.mark.one_transport
async def test_outputs_that_find_no_room_are_an_error_and_no_result(full_server: ReServer) -> None:
    """RESOURCE_EXHAUSTED, which clients retry, without a MISSING; nothing cached; smaller actions go on."""
    async with Client(full_server.address) as client:
        script = "for i in 1 2; do head -c 1300000 /dev/urandom > $i; done"
        await client.execute(shell(script, output_paths=["1", "2"]))
        action = shell(script, output_paths=["1", "2"])  # twice is more than the store holds
        response = (await client.execute(action)).response
        assert response.status.code == RESOURCE_EXHAUSTED
        assert not response.status.details
        assert not response.result.output_files
        assert await client.cached(action) is None
        assert (await client.execute(shell("exit 3"))).result.exit_code == 3


@pytest.mark.one_transport
async def test_RUN_06_an_action_that_fills_its_disk_fails_by_itself(full_server: ReServer) -> None:
    """Its program is told that there is no room; what it does then is its exit code."""
    async with Client(full_server.address) as client:
        result = (await client.execute(shell("head -c 20000000 /dev/zero > f || exit 9"))).result
        assert result.exit_code == 9


@pytest.mark.one_transport
async def test_EXE_34_a_result_that_cannot_be_cached_is_returned_all_the_same(start_server: StartServer) -> None:
    """Something lies where the entries would: every write of one fails."""
    kept: list[Config] = []
    server = start_server(kept.append)
    action = shell("echo made")
    async with Client(server.address) as client:
        assert (await client.execute(shell("true"))).result.exit_code == 0
        (root,) = [kept[0]["storage"]["action_cache"]["root_dir"]]
        for entry in os.scandir(root):
            if entry.name != "tmp" and entry.is_dir():
                os.rename(entry.path, f"{root}/../moved-{entry.name}")
                open(entry.path, "w").close()
        result = (await client.execute(action, skip_cache_lookup=True)).result
        assert await client.stdout(result) == b"made\n"


async def test_EXE_35_an_execution_whose_worker_is_lost_runs_again_or_ends_as_unavailable(
    start_server: StartServer, effects: SideEffects
) -> None:
    """The process that watches the action is killed under it; the server goes on."""
    server = start_server(lambda config: None)
    gate = effects.gate()
    script = f"if mkdir {gate.path}.first 2>/dev/null; then {gate.script}; fi; echo done"
    async with Client(server.address) as client:
        stream = await client.start(shell(script))
        await gate.wait_reached()
        helpers = {process.pid for process in process_tree(server.pid) if process.parent == server.pid}
        watchers = [process for process in process_tree(server.pid) if process.parent in helpers]
        assert watchers
        for process in watchers:
            os.kill(process.pid, signal.SIGKILL)
        response = (await stream.finish()).response
        if response.status.code == 0:
            assert await client.stdout(response.result) == b"done\n"
        else:
            assert response.status.code in (INTERNAL, UNAVAILABLE)
        await eventually(lambda: _runs(client), "the server executes again")


async def _runs(client: Client) -> bool:
    try:
        return (await client.execute(shell("true"))).response.result.HasField("stdout_digest")
    except grpc.aio.AioRpcError as error:
        if status_of(error).code not in (INTERNAL, UNAVAILABLE):
            raise
        return False


@pytest.mark.one_transport
async def test_EXE_17_the_state_is_told_again_while_nothing_changes(client: Client, effects: SideEffects) -> None:
    """Proxies close streams that are quiet."""
    gate = effects.gate()
    stream = await client.start(shell(gate.script))
    await gate.wait_reached()
    first = await stream.until(ExecutionStage.EXECUTING)
    again = await stream.until(ExecutionStage.EXECUTING)
    assert again.name == first.name
    workers = [metadata_of(operation).partial_execution_metadata.worker for operation in (first, again)]
    assert workers[0] == workers[1] != ""
    await gate.open()
    assert (await stream.finish()).result.exit_code == 0


async def test_EXE_22_EXE_27_a_calls_deadline_is_not_the_actions_timeout(client: Client, effects: SideEffects) -> None:
    """The call ends, the action goes on, and its outcome is its own."""
    gate = effects.gate()
    action = shell(gate.script)
    await client.upload(action.blobs)
    call = client.execution.Execute(ExecuteRequest(action_digest=action.digest), timeout=2)
    stream = Stream(call)
    name = (await stream.first()).name
    async with failing_rpc() as status:
        await stream.finish()
    assert status.code == DEADLINE_EXCEEDED
    waiter = client.wait(name)
    assert metadata_of(await waiter.first()).stage == ExecutionStage.EXECUTING
    await gate.open()
    assert (await waiter.finish()).result.exit_code == 0


@pytest.mark.one_transport
async def test_EXE_24_time_in_the_queue_is_not_the_actions(start_server: StartServer, effects: SideEffects) -> None:
    """An action waits longer than its timeout is, and then runs."""

    def change(config: Config) -> None:
        config["execution"]["pool"]["workers"][0]["count"] = 1

    gate, timeout_s = effects.gate(), 3.0
    async with Client(start_server(change).address) as client:
        busy = await client.start(shell(gate.script))
        await gate.wait_reached()
        queued = await client.start(shell("echo ran", timeout_s=timeout_s))
        await asyncio.sleep(timeout_s + 0.5)  # the time itself is what is tested
        await gate.open()
        assert (await busy.finish()).result.exit_code == 0
        assert await client.stdout((await queued.finish()).result) == b"ran\n"


async def test_DIG_11_everything_of_an_action_is_of_its_function(start_server: StartServer) -> None:
    """An action by BLAKE3 has its command, inputs, outputs, trees and streams by BLAKE3."""

    def change(config: Config) -> None:
        config["capabilities"] = {"digest_functions": ["SHA256", "BLAKE3"]}

    blake3 = DigestFunction.BLAKE3
    number: int = blake3.value

    def named(data: bytes) -> DigestMessage:
        digest = blake3.digest_of(data)
        return DigestMessage(hash=digest.hash, size_bytes=digest.size_bytes)

    command = Command(arguments=["/bin/sh", "-c", "echo out; mkdir d; echo f > d/f; echo g > g"])
    command.output_paths.extend(["d", "g"])
    blobs = [command.SerializeToString(), b""]
    action = Action(command_digest=named(blobs[0]), input_root_digest=named(b"")).SerializeToString()
    async with Client(start_server(change).address) as client:
        request = BatchUpdateBlobsRequest(digest_function=number)  # type: ignore[arg-type]
        for data in (*blobs, action):
            request.requests.add(digest=named(data), data=data)
        await client.cas.BatchUpdateBlobs(request, timeout=RPC_TIMEOUT_S)
        execute = ExecuteRequest(action_digest=named(action), digest_function=number)  # type: ignore[arg-type]
        *_, last = [operation async for operation in client.execution.Execute(execute, timeout=RPC_TIMEOUT_S)]
        response = ExecuteResponse()
        assert last.response.Unpack(response)
        assert metadata_of(last).digest_function == number
        result = response.result
        assert result.stdout_digest == named(b"out\n")
        assert [file.digest for file in result.output_files] == [named(b"g\n")]
        digests = [result.stdout_digest, result.output_directories[0].tree_digest, named(b"f\n")]
        find = FindMissingBlobsRequest(blob_digests=digests, digest_function=number)  # type: ignore[arg-type]
        assert not (await client.cas.FindMissingBlobs(find, timeout=RPC_TIMEOUT_S)).missing_blob_digests
        get = GetActionResultRequest(action_digest=named(action), digest_function=number)  # type: ignore[arg-type]
        assert (await client.action_cache.GetActionResult(get, timeout=RPC_TIMEOUT_S)) == result
