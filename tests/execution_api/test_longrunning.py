"""google.longrunning.Operations: look at operations, cancel and forget them."""

from __future__ import annotations

import pytest

from expbuild.reapi import (
    CancelOperationRequest,
    DeleteOperationRequest,
    ExecutionStage,
    GetOperationRequest,
    ListOperationsRequest,
    WaitOperationRequest,
)
from tests.support.actions import RPC_TIMEOUT_S, Client, SideEffects, failing_rpc, metadata_of, shell

CANCELLED, INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED = 1, 3, 5, 12
UNKNOWN_NAMES = ["", "x", "a/b", "operations/4b1f5a0e-6d43-4b8e-9c6b-0a4a2f3c1d2e"]


async def test_OPS_01_get_operation_is_what_the_stream_says(client: Client, effects: SideEffects) -> None:
    """While it runs: name and stage, not done. Afterwards: the very last message of the stream."""
    gate = effects.gate()
    stream = await client.start(shell(gate.script))
    await stream.until(ExecutionStage.EXECUTING)
    name = stream.operations[0].name
    running = await client.operations.GetOperation(GetOperationRequest(name=name), timeout=RPC_TIMEOUT_S)
    assert running.name == name
    assert not running.done
    assert metadata_of(running).stage == ExecutionStage.EXECUTING
    await gate.open()
    await stream.finish()
    ended = await client.operations.GetOperation(GetOperationRequest(name=name), timeout=RPC_TIMEOUT_S)
    assert ended == stream.operations[-1]


@pytest.mark.parametrize("name", UNKNOWN_NAMES)
async def test_OPS_01_unknown_names_are_not_found(client: Client, name: str) -> None:
    """Malformed or merely unknown: NOT_FOUND, so that clients execute again."""
    async with failing_rpc() as status:
        await client.operations.GetOperation(GetOperationRequest(name=name), timeout=RPC_TIMEOUT_S)
    assert status.code == NOT_FOUND
    async with failing_rpc() as status:
        await client.operations.CancelOperation(CancelOperationRequest(name=name), timeout=RPC_TIMEOUT_S)
    assert status.code == NOT_FOUND
    async with failing_rpc() as status:
        await client.operations.DeleteOperation(DeleteOperationRequest(name=name), timeout=RPC_TIMEOUT_S)
    assert status.code == NOT_FOUND


async def test_OPS_02_cancel_ends_the_command_and_every_watcher(client: Client, effects: SideEffects) -> None:
    """The stream ends with CANCELLED in the response, the command is dead, and nothing was cached."""
    gate = effects.gate()
    action = shell(f"{gate.script}; {effects.mark('survived')}")
    stream = await client.start(action)
    await gate.wait_reached()
    name = stream.operations[0].name
    watcher = client.wait(name)
    await watcher.first()
    await client.operations.CancelOperation(CancelOperationRequest(name=name), timeout=RPC_TIMEOUT_S)
    for ended in (await stream.finish(), await watcher.finish()):
        assert ended.response.status.code == CANCELLED
        assert metadata_of(ended.operations[-1]).stage == ExecutionStage.COMPLETED
    await gate.open()
    assert effects.count("survived") == 0
    assert await client.cached(action) is None


async def test_OPS_02_cancel_of_a_finished_operation_changes_nothing(client: Client) -> None:
    """OK, and the result stays."""
    finished = await client.execute(shell("echo done"))
    await client.operations.CancelOperation(CancelOperationRequest(name=finished.name), timeout=RPC_TIMEOUT_S)
    again = await client.wait(finished.name).finish()
    assert again.response == finished.response


async def test_OPS_03_cancel_of_a_merged_operation_leaves_the_others(client: Client, effects: SideEffects) -> None:
    """Two clients share an execution: one cancels and is told so at once, the other gets the result."""
    gate = effects.gate()
    action = shell(f"{effects.mark('runs')}; {gate.script}")
    first = await client.start(action)
    await gate.wait_reached()
    second = await client.start(action)
    assert first.operations[0].name != second.operations[0].name
    name = first.operations[0].name
    await client.operations.CancelOperation(CancelOperationRequest(name=name), timeout=RPC_TIMEOUT_S)
    assert (await first.finish()).response.status.code == CANCELLED
    await gate.open()
    assert (await second.finish()).result.exit_code == 0
    assert effects.count("runs") == 1


async def test_OPS_04_deleted_operation_is_unknown_but_runs_on(client: Client, effects: SideEffects) -> None:
    """Only the name goes; who watches already keeps watching."""
    gate = effects.gate()
    stream = await client.start(shell(gate.script))
    name = stream.operations[0].name
    await client.operations.DeleteOperation(DeleteOperationRequest(name=name), timeout=RPC_TIMEOUT_S)
    async with failing_rpc() as status:
        await client.wait(name).first()
    assert status.code == NOT_FOUND
    await gate.open()
    assert (await stream.finish()).result.exit_code == 0


async def test_OPS_04_list_operations_in_pages(client: Client, effects: SideEffects) -> None:
    """Those of an instance, each once, without responses; pages follow one another."""
    instance = "listed/instance"
    gate = effects.gate()
    running = await client.start(shell(gate.script), instance=instance)
    done = [await client.execute(shell(f"echo {number}"), instance=instance) for number in range(2)]
    names, token = [], ""
    while True:
        request = ListOperationsRequest(name=instance, page_size=2, page_token=token)
        page = await client.operations.ListOperations(request, timeout=RPC_TIMEOUT_S)
        names += [operation.name for operation in page.operations]
        assert len(page.operations) <= 2
        token = page.next_page_token
        if not token:
            break
    assert names == [running.operations[0].name, *(finished.name for finished in done)]
    await gate.open()
    await running.finish()


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(ListOperationsRequest(page_size=-1), id="negative-page-size"),
        pytest.param(ListOperationsRequest(page_token="x"), id="foreign-token"),
        pytest.param(ListOperationsRequest(filter="done"), id="filter"),
    ],
)
async def test_OPS_04_list_refuses_what_it_cannot_do(client: Client, request_: ListOperationsRequest) -> None:
    """Each is INVALID_ARGUMENT."""
    async with failing_rpc() as status:
        await client.operations.ListOperations(request_, timeout=RPC_TIMEOUT_S)
    assert status.code == INVALID_ARGUMENT


async def test_OPS_04_wait_operation_is_unimplemented(client: Client) -> None:
    """WaitExecution is the way to wait."""
    async with failing_rpc() as status:
        await client.operations.WaitOperation(WaitOperationRequest(name="x"), timeout=RPC_TIMEOUT_S)
    assert status.code == UNIMPLEMENTED
