"""How a server ends: what runs may finish, what waits is held and then sent away, and twice means now."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expbuild.reapi import ExecutionStage
from tests.execution_api.conftest import StartServer
from tests.execution_api.reasons import wait_for_reason
from tests.support.actions import RPC_TIMEOUT_S, Client, SideEffects, Stream, eventually, metadata_of, shell, status_of
from tests.support.server import Config

OK, UNAVAILABLE = 0, 14
LONG_S = 3600


def _patient(config: Config) -> None:
    """One worker, and a drain that only the test ends."""
    config["server"]["drain_timeout_seconds"] = LONG_S
    config["execution"]["pool"]["workers"][0]["count"] = 1


async def _code_of(stream: Stream) -> int:
    """How an execution ended, in the operation or as the status of the call."""
    try:
        return (await stream.finish()).response.status.code
    except grpc.aio.AioRpcError as error:
        return status_of(error).code


async def _health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=RPC_TIMEOUT_S)
        return int(answer.status)


async def test_what_runs_finishes_and_what_waits_is_held_until_the_end(
    start_server: StartServer, effects: SideEffects
) -> None:
    """Health says so at once; nothing new starts, though asked for; the caches answer; the running action succeeds."""
    server = start_server(_patient)
    gate = effects.gate()
    async with Client(server.address) as client:
        hit = shell("echo cached")
        await client.execute(hit)
        running = await client.start(shell(f"{gate.script}; echo done"))
        await gate.wait_reached()
        queued = await client.start(shell(effects.mark("queued")))
        assert await _health(server.address) == health_pb2.HealthCheckResponse.SERVING
        ending = asyncio.create_task(asyncio.to_thread(server.terminate, timeout_s=RPC_TIMEOUT_S))
        await eventually(lambda: bool(server.events("server.draining")), "the server drains")
        assert await _health(server.address) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert "shutting down" in (await wait_for_reason(client, queued.operations[0].name, "draining")).text
        (draining,) = server.events("server.draining")
        assert draining["running"] == 1
        new = await client.start(shell(effects.mark("new")))
        assert metadata_of(new.operations[0]).stage != ExecutionStage.COMPLETED
        assert (await client.execute(hit)).response.cached_result
        await gate.open()
        finished = await running.finish()
        assert (finished.response.status.code, finished.result.exit_code) == (OK, 0)
        assert [await _code_of(stream) for stream in (queued, new)] == [UNAVAILABLE, UNAVAILABLE]
        await ending
    assert server.events("server.drained")
    assert effects.count("queued") == effects.count("new") == 0


async def test_SIGTERM_twice_ends_at_once(start_server: StartServer, effects: SideEffects) -> None:
    """The second does not wait for the action; its client is told to come again, and the exit code is 0."""
    server = start_server(_patient)
    gate = effects.gate()
    async with Client(server.address) as client:
        running = await client.start(shell(gate.script))
        await gate.wait_reached()
        os.kill(server.pid, signal.SIGTERM)
        await eventually(lambda: bool(server.events("server.draining")), "the server drains")
        ending = asyncio.create_task(asyncio.to_thread(server.terminate, timeout_s=RPC_TIMEOUT_S))
        assert await _code_of(running) == UNAVAILABLE
        await ending
    assert server.events("server.drain_cut_short")


async def test_SIGINT_drains_too_and_the_drain_has_an_end(start_server: StartServer, effects: SideEffects) -> None:
    """After its time what still runs is ended as UNAVAILABLE."""

    def change(config: Config) -> None:
        config["server"]["drain_timeout_seconds"] = 0.5

    server = start_server(change)
    gate = effects.gate()
    async with Client(server.address) as client:
        running = await client.start(shell(gate.script))
        await gate.wait_reached()
        ending = asyncio.create_task(asyncio.to_thread(server.terminate, timeout_s=RPC_TIMEOUT_S, number=signal.SIGINT))
        assert await _code_of(running) == UNAVAILABLE
        await ending
    assert server.events("server.drain_cut_short")


async def test_nothing_to_finish_ends_without_a_drain(start_server: StartServer) -> None:
    """An idle server does not wait."""
    server = start_server(_patient)
    await asyncio.to_thread(server.terminate, timeout_s=RPC_TIMEOUT_S)
    assert not server.events("server.draining")
    assert server.events("server.stopped")
