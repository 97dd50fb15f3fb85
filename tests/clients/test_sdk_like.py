"""What the Go SDK (reclient, Please) depends on, tried by a fake of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from expbuild.reapi import Tree
from tests.clients.actions import Blobs, output_files, platform, prepare, shell
from tests.clients.sdk_like import PLATFORM, SdkLike, symlinks
from tests.support.server import ReServer


@pytest.fixture
async def sdk(re_server: ReServer) -> AsyncIterator[SdkLike]:
    async with SdkLike(re_server.address) as client:
        await client.start()
        yield client


async def test_symlinks_are_in_the_deprecated_lists(sdk: SdkLike) -> None:
    """The SDK knows no other list; the new one says the same."""
    script = "echo 1 > file; mkdir dir; ln -s file to_file; ln -s dir to_dir; ln -s nowhere dangling"
    paths = ["dangling", "dir", "file", "to_dir", "to_file"]
    result = (await sdk.run(prepare(shell(script, paths)))).result
    expected = {"to_file": "file", "to_dir": "dir", "dangling": "nowhere"}
    assert symlinks(result) == expected
    assert {link.path: link.target for link in result.output_symlinks} == expected
    assert set(output_files(result)) == {"file"}


async def test_properties_that_reclient_adds_match(sdk: SdkLike) -> None:
    """`Linux` with a capital letter, and names that only mean something to reclient, in both platform fields."""
    response = await sdk.run(prepare(shell("echo 1 > out", ["out"], platform=platform(PLATFORM))))
    assert set(output_files(response.result)) == {"out"}


async def test_directory_by_get_tree(sdk: SdkLike) -> None:
    """A tree that was uploaded, shared subtrees and all, and one that an action made."""
    files = {f"{name}/same/file": b"shared" for name in "abc"} | {"top": b"top", "a/other": b""}
    blobs = Blobs()
    root = blobs.add_directory(files)
    await sdk.upload(blobs)
    assert await sdk.download_directory(root) == files

    command = shell("mkdir -p out/x; echo 1 > out/x/one; cp in out", ["out"])
    result = (await sdk.run(prepare(command, {"in": b"input"}))).result
    [directory] = result.output_directories
    name = f"blobs/{directory.tree_digest.hash}/{directory.tree_digest.size_bytes}"
    tree = Tree.FromString(await sdk.read(name))
    made = Blobs()
    for message in (tree.root, *tree.children):
        made.add(message.SerializeToString(deterministic=True))
    await sdk.upload(made)
    root = Blobs().add(tree.root.SerializeToString(deterministic=True))
    assert await sdk.download_directory(root) == {"x/one": b"1\n", "in": b"input"}


async def test_ten_thousand_digests_per_call_within_its_deadline(sdk: SdkLike) -> None:
    """FindMissing with 10,000 digests has 20 seconds in the SDK, which takes a slow answer for none."""
    blobs = Blobs()
    present = blobs.add(b"the one that is there")
    await sdk.upload(blobs)
    for number in range(25_000):
        blobs.add(b"absent %d" % number)
    missing = await sdk.find_missing(blobs.digests())
    assert {digest.hash for digest in missing} == set(blobs.content) - {present.hash}


async def test_compressed_batches_and_large_blobs(sdk: SdkLike) -> None:
    """Blobs of every size, the small ones compressed in batches of up to 4,000."""
    blobs = Blobs()
    for number in range(4_100):
        blobs.add(b"%d," % number * 50)
    large = blobs.add(os.urandom(5 << 20))
    await sdk.upload(blobs)
    assert await sdk.find_missing(blobs.digests()) == []
    assert await sdk.read(f"blobs/{large.hash}/{large.size_bytes}") == blobs.content[large.hash]
