"""Disks that fill up, files that are damaged or vanish, and what clients are told then."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from expbuild.digest import Digest
from expbuild.reapi import GetCapabilitiesRequest, ReadRequest, UpdateActionResultRequest
from tests.api.client import TIMEOUT_S, Client, code_of, message
from tests.api.conftest import StartServer, cache_config
from tests.api.test_cas import Entry, codes
from tests.support.files import scratch_directory, small_disk
from tests.support.server import ReServer

LARGE = random.Random(22).randbytes(8_000_000)
SMALL = LARGE[:1000]


@pytest.fixture
def state(start_server: StartServer, scratch: Path) -> Path:
    """The directory of the stores of a server."""
    start_server("faults")
    return scratch / "faults" / "state"


@pytest_asyncio.fixture
async def client(state: Path, start_server: StartServer) -> AsyncIterator[Client]:
    client = Client(start_server("faults").address)
    yield client
    await client.close()


async def _stored(state: Path, client: Client, data: bytes) -> tuple[Digest, Path]:
    digest = client.digest(data)
    await client.write_blob(data)
    (file,) = state.glob(f"cas/**/{digest.hash}-{digest.size_bytes}")
    return digest, file


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_cas_04_22_a_blob_found_cut_short_is_absent_until_it_is_uploaded_again(
    state: Path, client: Client, data: bytes
) -> None:
    """To look-ups, reads and downloads alike: a blob that one call calls present and another cannot read is a loop."""
    digest, file = await _stored(state, client, data)
    file.chmod(0o600)
    with file.open("r+b") as damaged:
        damaged.truncate(digest.size_bytes - 1)
    assert await client.missing(digest) == {digest}
    if data is SMALL:
        assert [entry.status.code for entry in (await client.batch_read(digest)).responses] == [5]
    assert await code_of(client.read(client.read_name(digest))) == "NOT_FOUND"
    assert await client.write_blob(data) == len(data)
    assert await client.missing(digest) == set()
    assert await client.read(client.read_name(digest)) == data


async def test_cas_26_bs_23_a_blob_that_vanishes_while_it_is_sent_arrives_whole(state: Path, client: Client) -> None:
    digest, file = await _stored(state, client, LARGE)
    call = client.bytestream.Read(ReadRequest(resource_name=client.read_name(digest)), timeout=TIMEOUT_S)
    messages = aiter(call)
    parts = [(await anext(messages)).data]
    file.unlink()
    parts += [part.data async for part in messages]
    assert b"".join(parts) == LARGE
    assert await client.missing(digest) == {digest}, "and is not promised to anybody from then on"


async def test_bs_22_a_blob_that_shrinks_while_it_is_sent_never_ends_well(state: Path, client: Client) -> None:
    """The reader is slow, so most of the blob is still on the disk when it is cut."""
    digest, file = await _stored(state, client, LARGE * 8)
    call = client.bytestream.Read(ReadRequest(resource_name=client.read_name(digest)), timeout=TIMEOUT_S)
    messages = aiter(call)
    await anext(messages)
    file.chmod(0o600)
    with file.open("r+b") as damaged:
        damaged.truncate(0)

    async def rest() -> list[bytes]:
        return [part.data async for part in messages]

    assert await code_of(rest()) in ("DATA_LOSS", "ABORTED", "UNAVAILABLE", "INTERNAL")


async def test_bs_21_a_download_that_broke_off_goes_on_at_the_next_byte(state: Path, client: Client) -> None:
    digest, _ = await _stored(state, client, LARGE)
    call = client.bytestream.Read(ReadRequest(resource_name=client.read_name(digest)), timeout=TIMEOUT_S)
    received: bytes = (await call.read()).data
    call.cancel()
    rest = await client.read(client.read_name(digest), offset=len(received))
    assert 0 < len(received) < len(LARGE)
    assert received + rest == LARGE


async def test_cap_20_capabilities_need_no_disk(start_server: StartServer, scratch: Path) -> None:
    """They are every client's first call: whatever state the store is in, they are answered."""
    server = start_server("no-disk")
    client = Client(server.address)
    (scratch / "no-disk/state/cas").rename(scratch / "no-disk/state/elsewhere")
    for _ in range(100):
        answer = await client.capabilities.GetCapabilities(GetCapabilitiesRequest(), timeout=TIMEOUT_S)
        assert answer.cache_capabilities.max_batch_total_size_bytes == 4_000_000
    await client.close()
    (scratch / "no-disk/state/elsewhere").rename(scratch / "no-disk/state/cas")


@pytest.fixture(scope="module")
def full_server() -> Iterator[ReServer]:
    """A cache whose disk has room for 2 MiB."""
    with scratch_directory("expbuild-full-") as directory, small_disk(directory / "disk", "2m") as disk:
        config = cache_config(directory, capabilities={"max_batch_total_size_bytes": 4_000_000})
        config["storage"]["cas"]["root_dir"] = str(disk / "cas")
        config["storage"]["action_cache"]["root_dir"] = str(disk / "action-cache")
        with ReServer(directory / "server", config) as server:
            yield server


@pytest.mark.duty("GEN-19", "CAS-15", "BS-43")
async def test_a_full_disk_is_resource_exhausted_and_nothing_is_promised(full_server: ReServer) -> None:
    """Entry by entry in a batch, and for an upload; what fits is still taken, and what is there served."""
    client = Client(full_server.address)
    fits, too_much = SMALL, LARGE[:3_500_000]
    response = await client.update(*(Entry(digest=message(client.digest(b)), data=b) for b in (too_much, fits)))
    assert codes(response) == ["RESOURCE_EXHAUSTED", "OK"]
    assert await code_of(client.write_blob(LARGE)) == "RESOURCE_EXHAUSTED"
    absent = {client.digest(too_much), client.digest(LARGE)}
    assert await client.missing(client.digest(fits), *absent) == absent
    assert await client.read(client.read_name(client.digest(fits))) == fits
    request = UpdateActionResultRequest(action_digest=message(client.digest(b"full")))
    request.action_result.stdout_raw = too_much[:3_000_000]
    assert await code_of(client.action_cache.UpdateActionResult(request, timeout=TIMEOUT_S)) == "RESOURCE_EXHAUSTED"
    await client.close()


async def test_cas_24_a_batch_of_thousands_is_read_while_others_are_answered(state: Path, client: Client) -> None:
    """A call may name ten thousand blobs; it does not open ten thousand files, nor hold up a small question."""
    blobs = [b"cas-24 %d" % i for i in range(5000)]
    digests = await client.upload(*blobs)
    reading = asyncio.ensure_future(client.batch_read(*digests))
    assert await client.missing(digests[0]) == set()
    assert [entry.data for entry in (await reading).responses] == blobs
