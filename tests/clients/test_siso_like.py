"""What Siso depends on, tried by a fake of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from expbuild.reapi import ExecuteRequest, WaitExecutionRequest
from tests.clients.actions import Blobs, ClientError, Prepared, output_files, prepare, shell
from tests.clients.siso_like import SisoLike
from tests.support.server import ReServer


@pytest.fixture
async def siso(re_server: ReServer) -> AsyncIterator[SisoLike]:
    async with SisoLike(re_server.address, cut_s=0.5) as client:
        await client.start()
        yield client


async def test_action_that_outlives_its_calls_runs_once(siso: SisoLike, re_server: ReServer) -> None:
    """Its own deadline cuts the stream again and again; the execution goes on, and the first name stays good."""
    prepared = prepare(shell("sleep 2; cat in > out", ["out"]), {"in": b"siso"})
    response = await siso.run(prepared)
    assert siso.waits >= 2
    assert await siso.get(output_files(response.result)["out"]) == b"siso"
    assert [line["cached"] for line in _completed(re_server, prepared)] == [False]


async def test_streams_that_clients_drop_do_no_harm(siso: SisoLike, re_server: ReServer) -> None:
    """Forty watchers of one execution hang up after the first message, and all of them come back for the end."""
    prepared = prepare(shell("sleep 1; echo x > out", ["out"]))
    await siso.upload(prepared.blobs)
    request = ExecuteRequest(instance_name=siso.instance, action_digest=prepared.digest)
    names = set()
    for _ in range(40):
        stream = siso.execution.Execute(request, metadata=siso.metadata)
        names.add((await anext(aiter(stream))).name)
        stream.cancel()
    assert len(names) == 40
    for name in names:
        watch = siso.execution.WaitExecution(WaitExecutionRequest(name=name), metadata=siso.metadata)
        assert [operation async for operation in watch][-1].done
    assert len(_completed(re_server, prepared)) == 1


async def test_second_run_is_a_cache_hit(siso: SisoLike) -> None:
    """Nothing is uploaded again and the result comes from the cache."""
    prepared = prepare(shell("cp in out", ["out"]), {"in": b"twice"})
    assert not (await siso.run(prepared)).cached_result
    assert await siso.upload(prepared.blobs) == []
    assert (await siso.run(prepared)).cached_result


async def test_cached_result_without_outputs_is_run_again(siso: SisoLike) -> None:
    """It takes such a result for a broken one and skips the cache: the server has to obey, and to run it again."""
    prepared = prepare(shell("true", ["out"]))
    for _ in range(2):
        with pytest.raises(ClientError, match="no outputs") as raised:
            await siso.run(prepared)
        assert raised.value.response is not None
        assert not raised.value.response.cached_result


async def test_timeout_of_an_action_has_the_text_it_knows(siso: SisoLike) -> None:
    """Any other text would make it try for ever; what the action said so far comes with it."""
    prepared = prepare(shell("echo so far; sleep 60", ["out"]), timeout_s=1)
    with pytest.raises(ClientError, match=r"^execution timeout exceeded$") as raised:
        await siso.run(prepared)
    assert raised.value.response is not None
    result = raised.value.response.result
    assert (result.stdout_raw or await siso.get(result.stdout_digest)) == b"so far\n"


async def test_it_does_not_compress(siso: SisoLike) -> None:
    """It would take the compressed bytes we commit for an error, so IDENTITY is what we list first."""
    assert not siso.compresses


@pytest.mark.parametrize("size_bytes", [0, 1, 3 << 20], ids=["empty", "small", "large"])
async def test_upload_that_ends_with_an_empty_message(siso: SisoLike, size_bytes: int) -> None:
    """Any size, and again when the server has it: that answer may come early."""
    blobs = Blobs()
    digest = blobs.add(os.urandom(size_bytes))
    for _ in range(2):
        await siso.write(digest, blobs.content[digest.hash])
    assert await siso.get(digest) == blobs.content[digest.hash]


async def test_all_blobs_of_an_action_in_one_message(siso: SisoLike) -> None:
    """Siso does not split FindMissingBlobs: 30,000 inputs are one message of 2 MB."""
    blobs = Blobs()
    for number in range(30_000):
        blobs.add(b"input %d" % number)
    assert len(await siso.find_missing(blobs)) == 30_000


def _completed(re_server: ReServer, prepared: Prepared) -> list[dict[str, Any]]:
    """What the server has logged about finished executions of an action."""
    return [line for line in re_server.events("execution.completed") if prepared.digest.hash in line["action_digest"]]
