"""Queue, priorities and the times that end things: on servers with one worker and short times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from expbuild.reapi import ExecutionStage, RetryInfo, Status
from tests.support.actions import Client, SideEffects, eventually, failing_rpc, metadata_of, shell, status_of
from tests.support.files import scratch_directory
from tests.support.processes import read_stat
from tests.support.server import ReServer, host_pool_config

NOT_FOUND, RESOURCE_EXHAUSTED = 5, 8
QUEUE_SIZE = 3
RESULT_TTL_S = 1.0
GRACE_S = 0.3


@pytest.fixture(scope="module")
def small_server() -> Iterator[ReServer]:
    """One worker, a short queue, short times."""
    with scratch_directory("expbuild-execution-") as directory:
        config = host_pool_config(directory / "state", workers=1)
        config["execution"]["pool"].update(
            max_queue_size=QUEUE_SIZE,
            default_task_timeout_seconds=0.5,
            result_ttl_seconds=RESULT_TTL_S,
            abandoned_grace_seconds=GRACE_S,
        )
        with ReServer(directory / "server", config) as server:
            yield server


@pytest.fixture
async def small(small_server: ReServer) -> AsyncIterator[Client]:
    async with Client(small_server.address) as client:
        yield client


async def test_CMD_action_without_a_timeout_gets_the_default(small: Client) -> None:
    """`default_task_timeout_seconds` applies where the action names none."""
    response = (await small.execute(shell("echo out; exec sleep 1000"))).response
    assert response.status == Status(code=4, message="execution timeout exceeded")
    assert await small.stdout(response.result) == b"out\n"


@pytest.mark.duty("GEN-02", "GEN-03", "GEN-05")
async def test_EXE_08_a_full_queue_is_resource_exhausted_with_retry_info(small: Client, effects: SideEffects) -> None:
    """What waits, waits; one more is told to come back; afterwards there is room again."""
    gate = effects.gate()
    running = await small.start(shell(gate.script, timeout_s=60))
    await gate.wait_reached()
    waiting = [await small.start(shell("true")) for _ in range(QUEUE_SIZE)]
    late = shell("true")
    async with failing_rpc() as status:
        await small.execute(late)
    assert status.code == RESOURCE_EXHAUSTED
    assert "execution.pool.max_queue_size" in status.message
    (detail,) = status.details
    assert detail.type_url == "type.googleapis.com/google.rpc.RetryInfo"
    retry = RetryInfo()
    assert detail.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() > 0
    await gate.open()
    for stream in [running, *waiting]:
        assert (await stream.finish()).result.exit_code == 0
    assert (await small.execute(late)).result.exit_code == 0


async def test_a_burst_as_large_as_workers_and_queue_is_taken(small: Client) -> None:
    """An idle worker counts: nothing is refused that would not have to wait."""
    actions = [shell("true") for _ in range(QUEUE_SIZE + 1)]
    for action in actions:
        await small.upload(action.blobs)
    for stream in [small.call(action) for action in actions]:
        assert (await stream.finish()).result.exit_code == 0


async def test_EXE_43_lower_priority_numbers_run_first_then_first_come(small: Client, effects: SideEffects) -> None:
    """With one worker the order of the runs is the order of the queue."""
    gate, order = effects.gate(), effects.path("order")
    order.touch()
    order.chmod(0o666)
    streams = [await small.start(shell(gate.script, timeout_s=60))]
    await gate.wait_reached()
    for name, priority in (("normal", 0), ("late", 100_000), ("urgent", -5)):
        stream = await small.start(shell(f"echo {name} >> {order}"), priority=priority)
        streams.append(stream)
    await gate.open()
    await asyncio.gather(*(stream.finish() for stream in streams))
    assert order.read_text().split() == ["urgent", "normal", "late"]


async def test_EXE_47_a_finished_operation_expires(small: Client) -> None:
    """It is there at first, and NOT_FOUND when its time is over."""
    name = (await small.execute(shell("true"))).name
    assert (await small.wait(name).finish()).result.exit_code == 0

    async def is_gone() -> bool:
        try:
            await small.wait(name).finish()
        except grpc.aio.AioRpcError as error:
            return status_of(error).code == NOT_FOUND
        return False

    await eventually(is_gone, "the operation has expired")


async def test_EXE_27_an_abandoned_execution_is_ended_after_the_grace(
    small: Client, small_server: ReServer, effects: SideEffects
) -> None:
    """Its processes die, the worker is free again, and nobody joins what is being ended."""
    pid_file = effects.path("pid")
    action = shell(f"echo $$ > {pid_file}; exec sleep 1000", timeout_s=60)
    stream = await small.start(action)
    await eventually(lambda: pid_file.exists() and pid_file.read_text(), "the action runs")
    pid = int(pid_file.read_text())
    ended = len(_abandoned(small_server))
    stream.drop()
    await eventually(lambda: (stat := read_stat(pid)) is None or not stat.is_alive(), "the action is dead")
    assert (await small.execute(shell("true"))).result.exit_code == 0
    assert len(_abandoned(small_server)) == ended + 1


async def test_EXE_27_a_queued_execution_is_abandoned_too(small: Client, effects: SideEffects) -> None:
    """It leaves the queue without having run, and its place in it to others."""
    gate = effects.gate()
    running = await small.start(shell(gate.script, timeout_s=60))
    await gate.wait_reached()
    names = []
    for _ in range(QUEUE_SIZE):
        stream = await small.start(shell(effects.mark("ran")))
        names.append(stream.operations[0].name)
        stream.drop()

    streams = [running]

    async def has_room() -> bool:
        try:
            streams.append(await small.start(shell("true")))
        except grpc.aio.AioRpcError as error:
            if status_of(error).code != RESOURCE_EXHAUSTED:
                raise
            return False
        return True

    for _ in range(QUEUE_SIZE):
        await eventually(has_room, "the abandoned have left the queue")
    await gate.open()
    for stream in streams:
        assert (await stream.finish()).result.exit_code == 0
    assert effects.count("ran") == 0


async def test_EXE_27_coming_back_within_the_grace_keeps_it_alive(
    small: Client, small_server: ReServer, effects: SideEffects
) -> None:
    """The timer stops with the first watcher that returns."""
    gate = effects.gate()
    stream = await small.start(shell(gate.script, timeout_s=60))
    name = stream.operations[0].name
    await gate.wait_reached()
    stream.drop()
    again = small.wait(name)
    assert metadata_of(await again.first()).stage == ExecutionStage.EXECUTING
    # The grace of one abandoned later runs out later; when that one is ended, ours would have been.
    ended = len(_abandoned(small_server))
    (await small.start(shell("true"))).drop()
    await eventually(lambda: len(_abandoned(small_server)) > ended, "the later one is ended")
    await gate.open()
    assert (await again.finish()).result.exit_code == 0


def _abandoned(server: ReServer) -> list[object]:
    return [line for line in server.events("execution.completed") if line["code"] == "ABORTED"]
