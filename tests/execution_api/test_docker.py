"""Execution through Docker workers: alone, and beside host workers in one pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.execution_api.reasons import wait_for_reason
from tests.support.actions import Client, Executable, SideEffects, shell, to_message
from tests.support.docker import busybox_image, docker_daemon
from tests.support.files import scratch_directory
from tests.support.server import ReServer, host_pool_config

pytestmark = pytest.mark.docker

IN_CONTAINER = {"container": "docker"}


@pytest.fixture(scope="module")
def mixed_server() -> Iterator[tuple[ReServer, str]]:
    """A server with one host worker and two Docker workers; and the image of these."""
    with docker_daemon() as daemon, scratch_directory("expbuild-execution-") as directory:
        image = busybox_image(daemon.host)
        config = host_pool_config(directory / "state", workers=1)
        config["execution"]["pool"]["workers"].append(
            {
                "type": "docker",
                "count": 2,
                "image": image,
                "user": "1000:1000",
                "docker_host": daemon.host,
                "work_dir": str(directory / "state" / "docker"),
            }
        )
        with ReServer(directory / "server", config) as server:
            yield server, image


@pytest.fixture
async def mixed(mixed_server: tuple[ReServer, str]) -> AsyncIterator[Client]:
    async with Client(mixed_server[0].address) as client:
        yield client


async def test_an_action_runs_in_a_container(mixed: Client) -> None:
    """Inputs, environment, working directory, outputs and exit code are those of any worker; the image is its own."""
    action = shell(
        'id -u; pwd; echo "$A"; ./tool > out; mkdir -p d/e; cp ../in d/e; chmod +x d/e/in; cat /etc/hostname; exit 3',
        inputs={"w": {"tool": Executable(b"#!/bin/sh\necho made by a tool\n")}, "in": b"input"},
        environment={"A": "b c"},
        working_directory="w",
        output_paths=["out", "d"],
        platform=IN_CONTAINER,
    )
    result = (await mixed.execute(action)).result
    assert result.exit_code == 3
    assert result.execution_metadata.worker in ("docker-0", "docker-1")
    assert (await mixed.stdout(result)).startswith(b"1000\n/workspace/w\nb c\n")
    assert await mixed.read(result.output_files[0].digest) == b"made by a tool\n"
    assert [directory.path for directory in result.output_directories] == ["d"]


async def test_a_timeout_in_a_container_returns_what_there_is(mixed: Client) -> None:
    """The same status, and the output so far."""
    action = shell("echo out; sleep 1000", platform=IN_CONTAINER, timeout_s=0.5)
    response = (await mixed.execute(action)).response
    assert (response.status.code, response.status.message) == (4, "execution timeout exceeded")
    assert await mixed.stdout(response.result) == b"out\n"
    assert await mixed.cached(action) is None


async def test_INP_10_inputs_cannot_be_poisoned_from_a_container(mixed: Client) -> None:
    """Blobs stay what they are."""
    action = shell("chmod 777 f; echo x >> f; echo x > f; true", inputs={"f": b"original"}, platform=IN_CONTAINER)
    assert (await mixed.execute(action)).result.exit_code == 0
    for digest, data in action.blobs.items():
        assert await mixed.read(to_message(digest)) == data
    again = shell("cat f", inputs={"f": b"original"}, platform=IN_CONTAINER)
    assert await mixed.stdout((await mixed.execute(again)).result) == b"original"


async def test_the_platform_decides_between_host_and_container(
    mixed_server: tuple[ReServer, str], mixed: Client, effects: SideEffects
) -> None:
    """What names the container or its image runs there; what names nothing takes the first kind that is free."""
    _, image = mixed_server
    for platform, kind in (
        ({"container-image": f"docker://{image}"}, "docker"),
        ({"container": "docker", "OSFamily": "Linux"}, "docker"),
        ({}, "host"),
        ({"OSFamily": "linux"}, "host"),
    ):
        result = (await mixed.execute(shell("true", platform=platform))).result
        assert result.execution_metadata.worker.startswith(kind), platform
    gate = effects.gate()
    busy = await mixed.start(shell(gate.script))
    await gate.wait_reached()
    result = (await mixed.execute(shell("true"))).result
    assert result.execution_metadata.worker.startswith("docker")
    await gate.open()
    assert (await busy.finish()).result.execution_metadata.worker == "host-0"


async def test_an_action_waits_for_the_image_that_is_being_pulled(mixed_server: tuple[ReServer, str]) -> None:
    """From a registry that takes the call and never answers; who waits is told so."""
    (docker,) = (w for w in mixed_server[0].config["execution"]["pool"]["workers"] if w["type"] == "docker")
    calls: list[asyncio.StreamWriter] = []

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(writer)
        await reader.read()

    registry = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    port = registry.sockets[0].getsockname()[1]
    with scratch_directory("expbuild-execution-") as directory:
        config = host_pool_config(directory / "state", workers=1)
        image = f"127.0.0.1:{port}/slow:1"
        work_dir = str(directory / "state" / "docker")
        config["execution"]["pool"]["workers"].append({**docker, "count": 1, "image": image, "work_dir": work_dir})
        server = ReServer(directory / "server", config)
        try:
            await asyncio.to_thread(server.start)
            async with Client(server.address) as client:
                stream = await client.start(shell("true", platform=IN_CONTAINER))
                reason = await wait_for_reason(client, stream.operations[0].name, "image_pulling")
                assert f"docker-0: the image {image} is being looked up, and pulled" in reason.text
                stream.drop()
        finally:
            await asyncio.to_thread(server.kill)
            for writer in calls:
                writer.close()
            registry.close()
