"""What Pants depends on, tried by a fake of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from expbuild.reapi import Code, Command, ExecuteRequest, ExecuteResponse, Tree, WaitExecutionRequest
from tests.clients.actions import Blobs, output_files, platform, prepare, shell
from tests.clients.pants_like import PantsLike
from tests.support.server import ReServer


@pytest.fixture
async def pants(re_server: ReServer) -> AsyncIterator[PantsLike]:
    async with PantsLike(re_server.address) as client:
        yield client


async def test_missing_blobs_are_named_until_all_are_there(pants: PantsLike) -> None:
    """Action, then command and inputs: each answer names what is missing now, in the one form Pants understands."""
    prepared = prepare(shell("cat a/b/c > out", ["out"]), {"a/b/c": b"deep", "a/d": b"beside"})
    response = await pants.run(prepared)
    assert await pants.load(output_files(response.result)["out"]) == b"deep"
    assert pants.uploaded[0] == {prepared.digest.hash}
    assert set().union(*pants.uploaded) == set(prepared.blobs.content)
    assert sum(map(len, pants.uploaded)) == len(prepared.blobs.content)


async def test_wrapper_script_from_the_inputs_with_the_old_fields(pants: PantsLike) -> None:
    """An executable input is the command; outputs in the old lists, one inside the other, "" for everything."""
    command = Command(
        arguments=["./wrapper.sh", "hello"],
        output_files=["dir/deep/file"],
        output_directories=["", "dir"],
        platform=platform({"OSFamily": "linux"}),
    )
    script = b"#!/bin/sh\nmkdir -p dir/deep && echo $1 > dir/deep/file\n"
    result = (await pants.run(prepare(command, {"wrapper.sh": script}))).result
    assert await pants.load(output_files(result)["dir/deep/file"]) == b"hello\n"
    trees = {d.path: Tree.FromString(await pants.load(d.tree_digest)) for d in result.output_directories}
    assert set(trees) == {"", "dir"}
    assert [node.name for node in trees["dir"].root.directories] == ["deep"]
    assert [node.name for node in trees[""].root.directories] == ["dir"]


@pytest.mark.parametrize("size_bytes", [0, 10, 3 << 20], ids=["empty", "small", "large"])
async def test_blob_round_trip(pants: PantsLike, size_bytes: int) -> None:
    """Committed sizes are exact, also for a blob that is there already."""
    blobs = Blobs()
    digest = blobs.add(os.urandom(size_bytes))
    for _ in range(2):
        await pants.store(digest, blobs.content[digest.hash])
    assert await pants.load(digest) == blobs.content[digest.hash]


async def test_old_metadata_header_is_read(pants: PantsLike, re_server: ReServer) -> None:
    """The server's log knows the invocation, though Pants calls the header as the API's first version did."""
    prepared = prepare(shell("echo known > out", ["out"]))
    await pants.run(prepared)
    completed = [
        line for line in re_server.events("execution.completed") if prepared.digest.hash in line["action_digest"]
    ]
    assert completed[-1]["invocation_id"] == "an-invocation"


async def test_lost_stream_is_picked_up_under_its_name(pants: PantsLike) -> None:
    """A new stream on the same operation gets the outcome, and again after the end."""
    prepared = prepare(shell("sleep 1; echo late > out", ["out"]))
    for digest in prepared.blobs.digests():
        await pants.store(digest, prepared.blobs.content[digest.hash])
    request = ExecuteRequest(instance_name=pants.instance, action_digest=prepared.digest)
    stream = pants.execution.Execute(request, metadata=pants.metadata)
    first = await anext(aiter(stream))
    stream.cancel()
    for _ in range(2):
        wait = pants.execution.WaitExecution(WaitExecutionRequest(name=first.name), metadata=pants.metadata)
        operations = [operation async for operation in wait]
        assert {operation.name for operation in operations} == {first.name}
        assert operations[-1].done


async def test_cancelled_client_stops_the_action(pants: PantsLike) -> None:
    """Ctrl-C in Pants is CancelOperation: the action ends, and another watcher of the operation is told so at once."""
    running = asyncio.create_task(pants.run(prepare(shell("sleep 600; echo never > out", ["out"]))))
    await asyncio.wait_for(pants.executing.wait(), timeout=10)
    watch = pants.execution.WaitExecution(WaitExecutionRequest(name=pants.operation_name), timeout=30)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    last = [operation async for operation in watch][-1]
    assert last.done
    response = ExecuteResponse()
    last.response.Unpack(response)
    assert Code.CANCELLED in (last.error.code, response.status.code)
