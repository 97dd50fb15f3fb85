"""GetTree (conformance TREE-*)."""

from __future__ import annotations

import grpc
import pytest

from expbuild.digest import Digest
from expbuild.reapi import Directory, DirectoryNode, FileNode, GetTreeRequest, GetTreeResponse
from tests.api.client import TIMEOUT_S, Client, Refusal, code_of, message, refusal


def directory(client: Client, *children: Directory, files: int = 0, pad: str = "") -> Directory:
    """Return a directory with these children, named in order, and some files."""
    nodes = [
        DirectoryNode(name=f"d{index}", digest=message(client.digest(child.SerializeToString())))
        for index, child in enumerate(children)
    ]
    leaf = message(client.digest(b"leaf"))
    return Directory(directories=nodes, files=[FileNode(name=f"f{i}{pad}", digest=leaf) for i in range(files)])


async def stored(client: Client, *directories: Directory) -> Digest:
    """Upload directories and return the digest of the first."""
    digests = await client.upload(*(d.SerializeToString() for d in directories))
    return digests[0]


async def pages(client: Client, root: Digest | None, page_size: int = 0, page_token: str = "") -> list[GetTreeResponse]:
    request = GetTreeRequest(
        root_digest=None if root is None else message(root),
        page_size=page_size,
        page_token=page_token,
        digest_function=client.function.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
    )
    return [page async for page in client.cas.GetTree(request, timeout=TIMEOUT_S)]


async def tree(client: Client, root: Digest) -> list[Directory]:
    return [d for page in await pages(client, root) for d in page.directories]


async def test_tree_03_directories_come_breadth_first_from_the_root(client: Client) -> None:
    leaf_a, leaf_b, leaf_c = (directory(client, files=n) for n in (1, 2, 3))
    left, right = directory(client, leaf_a, leaf_b), directory(client, leaf_c)
    root = directory(client, left, right)
    everything = [root, left, right, leaf_a, leaf_b, leaf_c]
    assert await tree(client, await stored(client, *everything)) == everything


async def test_tree_01_absent_root_is_not_found(client: Client) -> None:
    absent = client.digest(b"tree-01")
    assert await refusal(pages(client, absent)) == Refusal(
        grpc.StatusCode.NOT_FOUND, f"blob {absent} is not in the CAS"
    )


async def test_tree_02_11_missing_and_unreadable_descendants_are_left_out(client: Client) -> None:
    present, absent = directory(client, files=4), directory(client, files=5)
    garbage = b"\xff not a directory"
    root = directory(client, present, absent)
    root.directories.add(name="z", digest=message(client.digest(garbage)))
    await client.upload(garbage)
    assert await tree(client, await stored(client, root, present)) == [root, present]


async def test_tree_08_shared_children_are_sent_once(client: Client) -> None:
    """40 levels, each with two names for the next: 2^40 paths, 41 directories."""
    levels = [directory(client, files=1)]
    for _ in range(40):
        levels.append(directory(client, levels[-1], levels[-1]))
    levels.reverse()
    assert await tree(client, await stored(client, *levels)) == levels


async def test_tree_12_deep_trees_are_no_problem(client: Client) -> None:
    levels = [directory(client)]
    for _ in range(1500):
        levels.append(directory(client, levels[-1]))
    levels.reverse()
    digest = await stored(client, levels[0], *levels[1:-1])
    assert len(await tree(client, digest)) == 1501, "the empty directory at the end needs no upload"


async def test_tree_10_empty_root_is_one_empty_directory(client: Client) -> None:
    assert await tree(client, client.digest(b"")) == [Directory()]


async def test_tree_04_05_all_pages_come_in_one_call(client: Client) -> None:
    leaves = [directory(client, files=n) for n in range(1, 8)]
    root = directory(client, *leaves)
    answer = await pages(client, await stored(client, root, *leaves), page_size=3)
    assert [len(page.directories) for page in answer] == [3, 3, 2]
    assert [bool(page.next_page_token) for page in answer] == [True, True, False]
    assert [d for page in answer for d in page.directories] == [root, *leaves]


@pytest.mark.parametrize("page_size", [1, 3, 8, 100, 2**31 - 1])
async def test_tree_06_token_resumes_where_its_page_ended(client: Client, page_size: int) -> None:
    leaves = [directory(client, files=n) for n in range(1, 8)]
    root = directory(client, *leaves)
    digest = await stored(client, root, *leaves)
    first, *rest = await pages(client, digest, page_size)
    if first.next_page_token:
        assert await pages(client, digest, page_size, first.next_page_token) == rest
    else:
        assert rest == []


@pytest.mark.parametrize("page_size", [1, 2, 5])
async def test_tree_07_tokens_are_positions_where_subdirectories_are_equal(client: Client, page_size: int) -> None:
    """The same directory under several names, at several depths: a token that named it would not say where we are."""
    leaf = directory(client, files=7)
    middle = [directory(client, leaf, files=n) for n in range(3)]
    root = directory(client, *middle, leaf, leaf)
    digest = await stored(client, root, *middle, leaf)
    whole = [d for page in await pages(client, digest) for d in page.directories]
    assert len(whole) == 5
    collected: list[Directory] = []
    token = ""
    while True:
        page = (await pages(client, digest, page_size, token))[0]
        collected += page.directories
        token = page.next_page_token
        if not token:
            break
    assert collected == whole


@pytest.mark.parametrize("token", ["nonsense", "-1", "8", "999999", "1" * 100, "1.5", "\u0661", " 1", "\x00"])
async def test_tree_06_unknown_token_is_invalid(client: Client, token: str) -> None:
    leaves = [directory(client, files=n) for n in range(1, 8)]
    digest = await stored(client, directory(client, *leaves), *leaves)
    assert await code_of(pages(client, digest, page_token=token)) == "INVALID_ARGUMENT"


async def test_tree_05_negative_page_size_is_invalid(client: Client) -> None:
    answer = await refusal(pages(client, client.digest(b""), page_size=-1))
    assert answer == Refusal(grpc.StatusCode.INVALID_ARGUMENT, "page_size -1 is negative")


async def test_tree_09_no_message_exceeds_4_mib(client: Client) -> None:
    """About 10 MB of directories, to a client that receives up to 4 MiB at once."""
    leaves = [directory(client, files=3000 + n, pad="x" * 50) for n in range(25)]
    root = directory(client, *leaves)
    for start in range(0, len(leaves), 5):
        await stored(client, *leaves[start : start + 5])
    answer = await pages(client, await stored(client, root))
    assert [d for page in answer for d in page.directories] == [root, *leaves]
    assert len(answer) > 2
    assert max(page.ByteSize() for page in answer) < 4 << 20


async def test_tree_11_root_that_is_no_directory_is_invalid(client: Client) -> None:
    (digest,) = await client.upload(b"\xff garbage root")
    assert await refusal(pages(client, digest)) == Refusal(
        grpc.StatusCode.INVALID_ARGUMENT, f"blob {digest} is not a valid Directory message"
    )


async def test_tree_11_huge_blob_as_root_is_refused_unread(client: Client) -> None:
    data = b"\x00" * 5_000_000
    await client.write_blob(data)
    assert await code_of(pages(client, client.digest(data))) == "INVALID_ARGUMENT"


async def test_gen_14_unset_root_digest_is_invalid(client: Client) -> None:
    assert await refusal(pages(client, None)) == Refusal(
        grpc.StatusCode.INVALID_ARGUMENT, "GetTreeRequest.root_digest is not set"
    )
