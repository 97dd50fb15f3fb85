"""Servers as a whole: how they end, what they are without execution or disk, and the example configuration."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import tomli

from expbuild.reapi import ExecutionStage, GetCapabilitiesRequest
from tests.execution_api.conftest import StartServer
from tests.support.actions import (
    RPC_TIMEOUT_S,
    Client,
    Link,
    SideEffects,
    eventually,
    failing_rpc,
    metadata_of,
    shell,
    status_of,
)
from tests.support.processes import read_stat
from tests.support.server import Config, ReServer, host_pool_config, to_toml

pytestmark = pytest.mark.one_transport

UNIMPLEMENTED, UNAVAILABLE = 12, 14
EXAMPLE = Path(__file__).parents[2] / "examples" / "expbuild-server-pool.toml"


def _is_alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.is_alive()


@pytest.mark.duty("GEN-19", "GEN-20", "EXE-16")
async def test_SIGTERM_during_an_execution_ends_it_and_the_server(
    start_server: StartServer, effects: SideEffects
) -> None:
    """The stream ends as UNAVAILABLE, in the operation or as the RPC's status; exit code 0; no process survives."""
    server = start_server(lambda config: None)
    pid_file = effects.path("pid")
    script = f"(trap '' TERM; sleep 1000) & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    async with Client(server.address) as client:
        stream = await client.start(shell(script))
        queued = [await client.start(shell("sleep 1000")) for _ in range(3)]
        await eventually(pid_file.exists, "the action runs")
        ending = asyncio.create_task(asyncio.to_thread(server.terminate))
        for each in [stream, *queued]:
            try:
                status = (await each.finish()).response.status
            except grpc.aio.AioRpcError as error:
                status = status_of(error)
            assert status.code == UNAVAILABLE
        await ending  # checks the exit code, and that no process is left
    assert not _is_alive(int(pid_file.read_text()))


@pytest.mark.duty("EXE-48")
async def test_kill_9_of_the_server_leaves_no_action_running(start_server: StartServer, effects: SideEffects) -> None:
    """Nobody is there to end the actions, and they end all the same; a new server starts on what is left."""
    server = start_server(lambda config: None)
    pid_file = effects.path("pid")
    script = f"(trap '' TERM; setsid sleep 1000) & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    async with Client(server.address) as client:
        stream = await client.start(shell(script))
        await eventually(pid_file.exists, "the action runs")
        name = stream.operations[0].name
        work_dir = Path(server.config["execution"]["pool"]["workers"][0]["work_dir"])
        workspaces = [path for path in work_dir.glob("host-*/*") if path.is_dir()]
        assert workspaces, "the action has a workspace"
        os.kill(server.pid, signal.SIGKILL)
        pid = int(pid_file.read_text())
        await eventually(lambda: not _is_alive(pid), "the action is dead")
    server.kill()
    server.start()
    assert not any(path.exists() for path in workspaces), "a workspace of the killed server is left"
    async with Client(server.address) as client:
        assert (await client.execute(shell("true"))).result.exit_code == 0
        async with failing_rpc() as status:  # EXE-48
            await client.wait(name).finish()
        assert status.code == 5


async def test_memory_stores_serve_execution_too(start_server: StartServer, effects: SideEffects) -> None:
    """Inputs, outputs and the cache, without a file of ours on disk."""

    def change(config: Config) -> None:
        config["storage"] = {"cas": {"backend": "memory"}, "action_cache": {"backend": "memory"}}

    server = start_server(change)
    action = shell(
        f"{effects.mark('ran')}; cp in out; mkdir d; cp in d", inputs={"in": b"content"}, output_paths=["out", "d"]
    )
    async with Client(server.address) as client:
        first, second = await client.execute(action), await client.execute(action)
        assert await client.read(first.result.output_files[0].digest) == b"content"
        assert second.response.cached_result
        assert second.result == first.result
    assert effects.count("ran") == 1


@pytest.mark.duty("CAP-01")
async def test_EXE_08_a_cache_only_server_does_not_execute(start_server: StartServer) -> None:
    """Execute is UNIMPLEMENTED, and the capabilities do not promise it."""
    server = start_server(lambda config: config.update(capabilities={"exec_enabled": False}))
    async with Client(server.address) as client:
        capabilities = await client.capabilities.GetCapabilities(GetCapabilitiesRequest(), timeout=RPC_TIMEOUT_S)
        assert not capabilities.HasField("execution_capabilities")
        assert capabilities.HasField("cache_capabilities")
        for call in (client.call(shell("true")), client.wait("operations/x")):
            async with failing_rpc() as status:
                await call.finish()
            assert status.code == UNIMPLEMENTED


async def test_INP_08_OUT_07_absolute_symlinks_can_be_disallowed(start_server: StartServer) -> None:
    """As the capabilities say: neither in inputs nor in outputs."""

    def change(config: Config) -> None:
        config["capabilities"] = {"symlink_absolute_path_strategy": "DISALLOWED"}

    async with Client(start_server(change).address) as client:
        given = shell("true", inputs={"x": Link("/etc/passwd")})
        assert (await client.execute(given)).response.status.code == 3
        for script in ("ln -s /etc/passwd x", "mkdir x; ln -s /etc/passwd x/y"):
            assert (await client.execute(shell(script, output_paths=["x"]))).response.status.code == 9
        assert (await client.execute(shell("ln -s y x", output_paths=["x"]))).result.exit_code == 0


def _example_config(root: Path) -> Config:
    """Return the example with its paths below `root` and a port of its own; the rest as a reader finds it."""
    config: Config = tomli.loads(EXAMPLE.read_text())
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        config["server"]["address"] = f"0.0.0.0:{probe.getsockname()[1]}"
    config["storage"]["cas"]["root_dir"] = str(root / "cas")
    config["storage"]["action_cache"]["root_dir"] = str(root / "cache")
    host, docker = config["execution"]["pool"]["workers"]
    host["work_dir"] = str(root / "host")
    docker["work_dir"] = str(root / "docker")
    docker["volumes"][0]["host_path"] = str(root)
    if os.geteuid() != 0:
        del host["run_as_user"], host["run_as_group"]
    return config


async def test_the_example_configuration_starts_and_tells_its_story(scratch: Path) -> None:
    """In order: configuration, storage, pool, workers, warning, address. Without a daemon the hosts serve alone."""
    nowhere = {"DOCKER_HOST": f"unix://{scratch}/no-daemon.sock"}
    with ReServer(scratch / "server", _example_config(scratch / "state"), env=nowhere) as server:
        lines = [line for line in server.log_lines() if line["event"] != "server.started"]
        story = list(dict.fromkeys(line["event"] for line in lines))
        expected = [
            "config.loaded",
            "storage.initialised",
            "pool.created",
            "server.exposed",
            "server.listening",
        ]
        assert [event for event in story if event in expected] == expected
        # Workers start all at once, each in its own time, before the server listens.
        workers = slice(story.index("pool.created") + 1, story.index("server.exposed"))
        assert set(story[workers]) == {"worker.isolated", "worker.registered", "worker.offline"}
        assert sorted(line["worker"] for line in server.events("worker.registered")) == [f"host-{i}" for i in range(4)]
        assert sorted(line["worker"] for line in server.events("worker.offline")) == ["docker-0", "docker-1"]
        (pool,) = server.events("pool.created")
        assert (pool["workers"], pool["host"], pool["docker"]) == (6, 4, 2)
        (exposed,) = server.events("server.exposed")
        assert exposed["level"] == "warning"
        port = server.address.rpartition(":")[2]
        async with Client(f"127.0.0.1:{port}") as client:
            assert (await client.execute(shell("id -u"))).result.exit_code == 0
            # A worker that exists but is offline keeps its actions waiting; it is not "impossible".
            stream = await client.start(shell("true", platform={"container": "docker"}))
            assert metadata_of(stream.operations[0]).stage != ExecutionStage.COMPLETED
            stream.drop()


def _without_user(config: Config, root: Path) -> str:
    config["execution"]["pool"]["workers"][0]["run_as_user"] = "no-such-user"
    return "run_as_user" if os.geteuid() == 0 else "root"


def _with_root_dir_that_is_a_file(config: Config, root: Path) -> str:
    (root / "file").touch()
    config["storage"]["cas"]["root_dir"] = str(root / "file")
    return "storage.cas.root_dir"


def _with_foreign_address(config: Config, root: Path) -> str:
    config["server"]["address"] = "192.0.2.1:8980"
    return "server.address"


@pytest.mark.parametrize("spoil", [_without_user, _with_root_dir_that_is_a_file, _with_foreign_address])
def test_a_server_that_cannot_start_says_why_in_one_line(scratch: Path, spoil: Callable[[Config, Path], str]) -> None:
    """Exit code 1, no traceback, and the name of what has to be changed."""
    config = host_pool_config(scratch / "state")
    named = spoil(config, scratch)
    file = scratch / "expbuild.toml"
    file.write_text(to_toml(config))
    command = [sys.executable, "-m", "expbuild", "--config", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("re-server: ")
    assert named in last
