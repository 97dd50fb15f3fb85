"""Why actions wait, are refused or fail: each sentence of docs/troubleshooting.md, provoked on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expbuild.reapi import (
    CancelOperationRequest,
    ExecutionStage,
    RetryInfo,
)
from tests.execution_api.conftest import StartServer
from tests.execution_api.reasons import wait_for_reason
from tests.support.actions import RPC_TIMEOUT_S, Client, SideEffects, eventually, failing_rpc, shell
from tests.support.server import Config, ReServer

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
FAILED_PRECONDITION, RESOURCE_EXHAUSTED, INVALID_ARGUMENT = 9, 8, 3
MISSING_DOCKER = {"type": "docker", "count": 1, "image": "any", "docker_host": "unix:///nonexistent/docker.sock"}


def is_explained(sentence: str) -> bool:
    """Whether the page has these words."""
    return " ".join(sentence.split()) in " ".join(PAGE.read_text().split())


def one_worker(change: Callable[[Config], None] = lambda config: None) -> Callable[[Config], None]:
    def changed(config: Config) -> None:
        config["execution"]["pool"]["workers"][0]["count"] = 1
        change(config)

    return changed


def ask(server: ReServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of re-server against a running one."""
    return subprocess.run(
        [sys.executable, "-m", "expbuild", "--config", str(server.config_file), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


async def ask_json(server: ReServer, *arguments: str) -> dict[str, Any]:
    answer = await asyncio.to_thread(ask, server, *arguments, "--json")
    assert answer.returncode == 0, answer.stderr
    loaded: dict[str, Any] = json.loads(answer.stdout)
    return loaded


async def test_no_idle_worker_is_told_everywhere(start_server: StartServer, effects: SideEffects) -> None:
    """In the stream, in ListOperations, in the log, by `why` and by `status`: by whose build the slot is taken."""
    server = start_server(one_worker())
    gate = effects.gate()
    async with Client(server.address) as client:
        first = await client.start(shell(gate.script), invocation="build-one")
        await gate.wait_reached()
        action = shell("true")
        second = await client.start(action, invocation="build-two")
        waiting = second.operations[0]
        reason = await wait_for_reason(client, waiting.name, "no_idle_worker")
        assert reason.position == 1
        assert "the only matching worker is taken (build-one: 1); position 1 of 1 in the queue" in reason.text
        assert reason.waited.ToMilliseconds() >= 0

        status = await ask_json(server, "status")
        assert status["queued"] == "1"
        assert [worker["state"] for worker in status["workers"]] == ["busy"]
        assert {build["name"]: (build["running"], build["queued"]) for build in status["builds"]} == {
            "build-one": ("1", "0"),
            "build-two": ("0", "1"),
        }
        for subject in ("build-two", action.digest.hash, action.digest.hash[:12], waiting.name):
            (told,) = (await ask_json(server, "why", subject))["executions"]
            assert told["wait"]["kind"] == "no_idle_worker"
        text = await asyncio.to_thread(ask, server, "why")
        assert "waits: no_idle_worker: no idle worker" in text.stdout
        assert "runs on host-0" in text.stdout

        await gate.open()
        assert (await second.finish()).result.exit_code == 0
        assert (await first.finish()).result.exit_code == 0
        (ended,) = (await ask_json(server, "why", "build-two"))["executions"]
        assert (ended["stage"], ended["code"]) == ("COMPLETED", "OK")
    lines = [line for line in server.events("execution.waiting") if line["invocation_id"] == "build-two"]
    assert [line["reason"] for line in lines] == ["no_idle_worker"]
    assert is_explained("no_idle_worker")


async def test_a_worker_that_is_offline_keeps_its_actions_with_the_reason(start_server: StartServer) -> None:
    """It may come back, so the action waits; what cannot come back would have been refused."""
    server = start_server(
        lambda config: config["execution"]["pool"]["workers"].append(
            {**MISSING_DOCKER, "work_dir": str(Path(config["storage"]["cas"]["root_dir"]).parent / "docker")}
        )
    )
    async with Client(server.address) as client:
        stream = await client.start(shell("true", platform={"container": "docker"}))
        reason = await wait_for_reason(client, stream.operations[0].name, "worker_offline")
        assert "the only matching worker is offline" in reason.text
        assert "cannot reach the Docker daemon at unix:///nonexistent/docker.sock" in reason.text
        status = await ask_json(server, "status")
        assert [worker["state"] for worker in status["workers"]] == ["idle", "idle", "offline"]
        stream.drop()
    assert is_explained("worker_offline")
    assert is_explained("cannot reach the Docker daemon at")


async def test_memory_and_cores_are_waited_for_and_too_much_is_refused(
    start_server: StartServer, effects: SideEffects
) -> None:
    """Two actions that fit one by one, and one that never will."""

    def limited(config: Config) -> None:
        config["execution"]["pool"].update(memory_bytes=1 << 30, cpu_cores=2.0)

    server = start_server(limited)
    gate = effects.gate()
    async with Client(server.address) as client:
        first = await client.start(shell(gate.script, platform={"EstimatedMemory": "800MiB", "min-cores": "2"}))
        await gate.wait_reached()
        memory = await client.start(shell("true", platform={"min-mem": "512"}))
        cores = await client.start(shell("exit 0", platform={"resources:cpu": "500m"}))
        assert (
            "it asks for 512 MiB of memory"
            in (await wait_for_reason(client, memory.operations[0].name, "waiting_for_memory")).text
        )
        assert (
            "it asks for 0.5 cores" in (await wait_for_reason(client, cores.operations[0].name, "waiting_for_cpu")).text
        )
        for platform, words in (
            ({"EstimatedMemory": "2GiB"}, "asks for 2147483648 bytes of memory, and the whole pool has 1073741824"),
            ({"EstimatedCPU": "3"}, "asks for 3 cores, and the whole pool has 2"),
        ):
            async with failing_rpc() as refused:
                await client.execute(shell("true", platform=platform))
            assert (refused.code, len(refused.details)) == (FAILED_PRECONDITION, 0)
            assert words in refused.message
        async with failing_rpc() as malformed:
            await client.execute(shell("true", platform={"EstimatedMemory": "lots"}))
        assert malformed.code == INVALID_ARGUMENT
        assert "expected an amount of memory" in malformed.message
        await gate.open()
        for stream in (first, memory, cores):
            assert (await stream.finish()).result.exit_code == 0
    for sentence in ("waiting_for_memory", "waiting_for_cpu", "and the whole pool has", "expected an amount of memory"):
        assert is_explained(sentence)


async def test_what_can_never_run_is_refused_with_the_nearest_worker(start_server: StartServer) -> None:
    """At once, with what was asked for and the property that differs; extra properties are the configuration's."""

    def big(config: Config) -> None:
        config["execution"]["pool"]["workers"][0]["platform"] = {"Pool": "big"}

    server = start_server(big)
    async with Client(server.address) as client:
        assert (
            await client.execute(shell("true", platform={"pool": "big", "osfamily": "Linux"}))
        ).result.exit_code == 0
        async with failing_rpc() as status:
            await client.execute(shell("true", platform={"Pool": "small"}))
    assert (status.code, len(status.details)) == (FAILED_PRECONDITION, 0)
    assert "Pool=small" in status.message
    assert "The nearest is host-0" in status.message
    assert "Pool=small differs from big" in status.message
    assert is_explained("no configured worker satisfies the platform properties")


async def test_a_full_queue_is_refused_with_a_time_to_retry(start_server: StartServer, effects: SideEffects) -> None:
    """RESOURCE_EXHAUSTED with RetryInfo."""

    def tiny(config: Config) -> None:
        config["execution"]["pool"]["max_queue_size"] = 1

    server = start_server(one_worker(tiny))
    gate = effects.gate()
    async with Client(server.address) as client:
        first = await client.start(shell(gate.script))
        await gate.wait_reached()
        second = await client.start(shell("true"))
        async with failing_rpc() as status:
            await client.execute(shell("exit 3"))
        assert status.code == RESOURCE_EXHAUSTED
        assert "the queue is full: 1 actions wait already" in status.message
        retry = RetryInfo()
        assert status.details[0].Unpack(retry)
        await gate.open()
        await first.finish()
        await second.finish()
    assert is_explained("the queue is full")


async def test_who_waits_longer_than_the_queue_timeout_is_told_why(
    start_server: StartServer, effects: SideEffects
) -> None:
    """In the operation, as something to try again."""

    def impatient(config: Config) -> None:
        config["execution"]["pool"]["queue_timeout_seconds"] = 0.5

    server = start_server(one_worker(impatient))
    gate = effects.gate()
    async with Client(server.address) as client:
        first = await client.start(shell(gate.script), invocation="long-build")
        await gate.wait_reached()
        status = (await client.execute(shell("true"))).response.status
        assert status.code == RESOURCE_EXHAUSTED
        assert "waited 0.5 s for a worker" in status.message
        assert "long-build: 1" in status.message
        await gate.open()
        assert (await first.finish()).result.exit_code == 0
    assert is_explained("for a worker, as long as execution.pool.queue_timeout_seconds allows")


async def test_only_the_owner_can_open_the_admin_socket(start_server: StartServer) -> None:
    """And it goes with the server."""
    server = start_server(lambda config: None)
    path = Path(server.config["storage"]["cas"]["root_dir"]).parent / "admin.sock"
    mode = path.lstat()
    assert stat.S_ISSOCK(mode.st_mode)
    assert stat.S_IMODE(mode.st_mode) & 0o077 == 0
    assert mode.st_uid == os.geteuid() or mode.st_uid == os.stat(path.parent).st_uid
    unknown = await asyncio.to_thread(ask, server, "why", "no-such-build")
    assert unknown.returncode == 1
    assert "nothing is known of 'no-such-build'" in unknown.stdout
    server.terminate()
    assert not path.exists()
    gone = await asyncio.to_thread(ask, server, "status")
    assert gone.returncode == 1
    assert f"no server answers at {path}" in gone.stderr
    assert is_explained("no server answers at")


async def test_a_cancelled_execution_is_dead_within_two_seconds_of_the_call(
    start_server: StartServer, effects: SideEffects
) -> None:
    """The command ignores all it can."""
    server = start_server(lambda config: None)
    pid_file = effects.path("pid")
    script = f"trap '' TERM INT HUP; echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; while :; do sleep 1; done"
    async with Client(server.address) as client:
        stream = await client.start(shell(script))
        operation = await stream.until(ExecutionStage.EXECUTING)
        await eventually(pid_file.exists, "the action runs")
        pid = int(pid_file.read_text())
        await client.operations.CancelOperation(CancelOperationRequest(name=operation.name), timeout=RPC_TIMEOUT_S)
        await eventually(lambda: not Path(f"/proc/{pid}").exists(), "the action is dead")
        assert (await stream.finish()).response.status.code == 1


@pytest.mark.parametrize("sentence", ["image_pulling", "draining", "quarantined after", "execution timeout exceeded"])
def test_the_page_explains_what_other_tests_provoke(sentence: str) -> None:
    """test_docker.py, test_drain.py, tests/execution/test_worker_health.py and test_limits.py."""
    assert is_explained(sentence)
