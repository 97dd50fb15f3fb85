"""What renews the promise that a blob stays: the stamp eviction goes by, seen on the files of the store."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from expbuild.digest import Digest
from expbuild.reapi import ActionResult, Directory, DirectoryNode, FileNode, GetTreeRequest, OutputDirectory, Tree
from tests.api.client import TIMEOUT_S, Client, message, write_requests
from tests.api.conftest import StartServer
from tests.api.test_action_cache import get, output, update

OLD_S = 1_000_000_000


@pytest.fixture
def state(start_server: StartServer, scratch: Path) -> Path:
    """The directory of the stores of a server."""
    start_server("lifetimes")
    return scratch / "lifetimes" / "state"


@pytest_asyncio.fixture
async def client(state: Path, start_server: StartServer) -> AsyncIterator[Client]:
    client = Client(start_server("lifetimes").address)
    yield client
    await client.close()


def stored_file(store: Path, digest: Digest) -> Path:
    """Return the file of a blob or of an action result."""
    (file,) = store.glob(f"**/{digest.hash}-{digest.size_bytes}")
    return file


def grow_old(*files: Path) -> None:
    for file in files:
        os.utime(file, (OLD_S, file.stat().st_mtime))


def is_renewed(file: Path) -> bool:
    return abs(file.stat().st_atime - time.time()) < 300


Use = Callable[[Client, Digest], Awaitable[object]]

USES: list[object] = [
    pytest.param(lambda c, d: c.missing(d), id="CAS-03-called-present"),
    pytest.param(lambda c, d: c.batch_read(d), id="CAS-21-read-in-a-batch"),
    pytest.param(lambda c, d: c.read(c.read_name(d)), id="BS-23-downloaded"),
    pytest.param(lambda c, d: c.write(*write_requests(c.write_name(d), b"lifetime")), id="uploaded-again"),
]


@pytest.mark.duty("CAS-03", "CAS-21", "BS-23")
@pytest.mark.parametrize("use", USES)
async def test_a_blob_that_is_used_lives_longer(state: Path, client: Client, use: Use) -> None:
    (digest,) = await client.upload(b"lifetime")
    file = stored_file(state / "cas", digest)
    grow_old(file)
    await use(client, digest)
    assert is_renewed(file)


async def test_tree_12_directories_of_a_tree_live_longer(state: Path, client: Client) -> None:
    child = Directory(files=[FileNode(name="tree-12", digest=message(client.digest(b"x")))]).SerializeToString()
    root = Directory(directories=[DirectoryNode(name="d", digest=message(client.digest(child)))]).SerializeToString()
    digests = await client.upload(root, child)
    files = [stored_file(state / "cas", digest) for digest in digests]
    grow_old(*files)
    request = GetTreeRequest(root_digest=message(digests[0]))
    async for _ in client.cas.GetTree(request, timeout=TIMEOUT_S):
        pass
    assert all(map(is_renewed, files))


async def test_ac_04_22_a_hit_renews_the_entry_and_all_it_names(state: Path, client: Client) -> None:
    """Files, streams, the tree and the files in the tree; an entry that nobody asks for stays old."""
    names = [b"ac-04 file", b"ac-04 in tree", b"ac-04 out"]
    tree = Tree(root=Directory(files=[FileNode(name="f", digest=message(client.digest(names[1])))]))
    digests = await client.upload(*names, tree.SerializeToString())
    used, unused = client.digest(b"ac-04 used"), client.digest(b"ac-04 unused")
    result = ActionResult(
        output_files=[output(client, "f", names[0])],
        output_directories=[OutputDirectory(path="d", tree_digest=message(digests[3]))],
        stdout_digest=message(digests[2]),
    )
    for action in (used, unused):
        await update(client, action, result)
    entries = [stored_file(state / "action-cache", action) for action in (used, unused)]
    blobs = [stored_file(state / "cas", digest) for digest in digests]
    grow_old(*entries, *blobs)
    assert (await get(client, used)).stdout_digest == message(digests[2])
    assert all(map(is_renewed, [entries[0], *blobs]))
    assert not is_renewed(entries[1])
