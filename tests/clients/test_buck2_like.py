"""What Buck2 depends on, tried by a fake of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from expbuild.reapi import ActionResult, Command, OutputFile, Tree
from tests.clients.actions import Blobs, blake3_256, output_files, prepare, sha256, shell
from tests.clients.buck2_like import Buck2Like
from tests.support.server import ReServer, host_pool_config


@pytest.fixture
async def buck2(re_server: ReServer) -> AsyncIterator[Buck2Like]:
    async with Buck2Like(re_server.address) as client:
        await client.start()
        yield client


async def test_command_without_path_finds_its_tools(buck2: Buck2Like) -> None:
    """Buck2 sends no PATH: `sh` and what it calls are found all the same."""
    command = Command(arguments=["sh", "-c", "cat in | sort > out"], output_paths=["out"])
    response = await buck2.run(prepare(command, {"in": b"b\na\n"}))
    assert response.result.exit_code == 0
    out = output_files(response.result)["out"]
    assert await buck2.get([out]) == {out.hash: b"a\nb\n"}


async def test_fresh_and_cached_results_have_metadata(buck2: Buck2Like) -> None:
    """Without execution metadata Buck2 fails; the fake checks each result for them."""
    prepared = prepare(shell("echo x > out", ["out"]))
    fresh, cached = await buck2.run(prepared), await buck2.run(prepared)
    assert (fresh.cached_result, cached.cached_result) == (False, True)
    assert fresh.result.execution_metadata.worker


async def test_same_path_as_file_and_as_directory(buck2: Buck2Like) -> None:
    """Its compatibility mode names every output in both old lists; what was made decides."""
    names = ["directory", "file"]
    script = "mkdir -p directory/deep; echo 1 > directory/deep/one; echo 2 > file"
    command = Command(arguments=["/bin/sh", "-c", script], output_files=names, output_directories=names)
    result = (await buck2.run(prepare(command))).result
    assert set(output_files(result)) == {"file"}
    [directory] = result.output_directories
    assert directory.path == "directory"
    tree = Tree.FromString((await buck2.get([directory.tree_digest]))[directory.tree_digest.hash])
    assert [node.name for node in tree.root.directories] == ["deep"]


async def test_result_of_a_local_run_is_echoed_with_metadata(buck2: Buck2Like) -> None:
    """The answer to UpdateActionResult is a result like any other, also when the client's own had no metadata."""
    blobs = Blobs()
    result = ActionResult(output_files=[OutputFile(path="out", digest=blobs.add(b"made here"))])
    await buck2.upload(blobs)
    await buck2.upload_result(Blobs().add(b"a local action"), result)


async def test_batches_filled_to_the_last_byte(buck2: Buck2Like) -> None:
    """It groups by data size up to exactly what is advertised; the envelope comes on top."""
    blobs = Blobs()
    for number in range(4):
        blobs.add(bytes([number]) * 1_000_000)
    await buck2.upload(blobs)
    assert await buck2.get(blobs.digests()) == blobs.content


@pytest.mark.parametrize("compresses", [True, False], ids=["zstd", "identity"])
async def test_broken_upload_starts_again_under_the_same_name(buck2: Buck2Like, *, compresses: bool) -> None:
    """No QueryWriteStatus, no new name: the second try sends everything from 0."""
    assert buck2.compresses
    buck2.compresses = compresses
    blobs = Blobs()
    digest = blobs.add(os.urandom(6 << 20))
    with pytest.raises(asyncio.CancelledError):
        await buck2.write(digest, blobs.content[digest.hash], break_off=True)
    await buck2.write(digest, blobs.content[digest.hash])
    assert await buck2.read(f"blobs/{digest.hash}/{digest.size_bytes}") == blobs.content[digest.hash]


async def test_pings_on_an_idle_connection_are_welcome(re_server: ReServer) -> None:
    """A daemon with nothing to do pings; with gRPC's default a server breaks the connection at the third ping.

    What is looked at is the connection itself, once a ping at least would have been too many.
    """
    async with Buck2Like(re_server.address, pings_ms=500) as client:
        await client.start()
        state = client.channel.get_state()
        assert state is grpc.ChannelConnectivity.READY
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.channel.wait_for_state_change(state), timeout=5)
        await client.start()


async def test_blake3_without_naming_it(scratch: Path) -> None:
    """Buck2 never says which function it uses: a server whose default is BLAKE3 reads all its digests as such."""
    config = host_pool_config(scratch / "blake3-state")
    config["capabilities"] = {"digest_functions": ["BLAKE3", "SHA256"]}
    with ReServer(scratch / "blake3", config) as server:
        async with Buck2Like(server.address) as client:
            await client.start()
            prepared = prepare(shell("cat in > out", ["out"]), {"in": b"blake3"}, hash_of=blake3_256)
            large = prepared.blobs.add(os.urandom(5 << 20))
            out = output_files((await client.run(prepared)).result)["out"]
            assert out.hash == blake3_256(b"blake3") != sha256(b"blake3")
            assert await client.get([out]) == {out.hash: b"blake3"}
            name = f"blobs/{large.hash}/{large.size_bytes}"
            assert await client.read(name) == prepared.blobs.content[large.hash]
