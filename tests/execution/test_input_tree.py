"""Input trees: loaded, checked and counted before the disk is touched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import InvalidArgument, MissingBlobs
from expbuild.execution.action import MAX_DEPTH
from expbuild.execution.input_tree import InputTree, load_input_tree
from expbuild.reapi import DigestMessage, Directory, DirectoryNode, FileNode, SymlinkNode
from expbuild.storage.base import write_blob
from expbuild.storage.memory import MemoryBlobStore
from tests.support.actions import Blobs, Link, Node, from_message, put, put_tree

EMPTY = put({}, b"")


async def load(blobs: Blobs, root: DigestMessage, *, absolute_symlinks: bool = True) -> InputTree:
    """Store blobs, then load a tree."""
    store = MemoryBlobStore()
    for digest, data in blobs.items():
        await write_blob(store, digest, data)
    return await load_input_tree(store, from_message(root), absolute_symlinks=absolute_symlinks)


async def load_directory(directory: Directory, *, at_depth: int = 0) -> InputTree:
    blobs: Blobs = {}
    digest = put(blobs, directory)
    for _ in range(at_depth):
        digest = put(blobs, Directory(directories=[DirectoryNode(name="d", digest=digest)]))
    return await load(blobs, digest)


def file(name: str) -> FileNode:
    return FileNode(name=name, digest=EMPTY)


def directory(name: str) -> DirectoryNode:
    return DirectoryNode(name=name, digest=EMPTY)


def link(name: str, target: str = "x") -> SymlinkNode:
    return SymlinkNode(name=name, target=target)


async def test_a_tree_is_what_was_sent() -> None:
    """Each distinct directory once; paths are found by their names, and symlinks are not followed."""
    twin: Mapping[str, Node] = {"x": b"same", "y": Link("x")}
    blobs: Blobs = {}
    tree = await load(blobs, put_tree(blobs, {"a": twin, "b": {"c": twin}, "l": Link("a"), "f": b""}))
    assert len(tree.directories) == 3
    assert tree.directory_at(("a",)) == tree.directory_at(("b", "c"))
    found = tree.directory_at(("a",))
    assert found is not None
    assert [(f.name, f.executable) for f in found.files] == [("x", False)]
    assert found.symlinks == {"y": "x"}
    for path in (("l",), ("f",), ("a", "x"), ("none",)):
        assert tree.directory_at(path) is None


async def test_T10_the_empty_root_needs_no_blob() -> None:
    """Zero bytes are a Directory without anything."""
    tree = await load({}, EMPTY)
    assert tree.directory_at(()) == tree.directories[tree.root]


async def test_names_in_any_order_are_fine() -> None:
    """Unsorted nodes are accepted, whatever they are called."""
    names = ["z", "a", "ü", "a b", "-", "...", "x" * 255, "new\nline"]
    tree = await load_directory(Directory(files=[file(name) for name in names]))
    assert [f.name for f in tree.directories[tree.root].files] == names


BAD_NAMES = ["", ".", "..", "/", "a/b", "/etc/x", "../x", "a\0b", "x" * 256, "é" * 128]


@pytest.mark.parametrize("at_depth", [0, 5])
@pytest.mark.parametrize("name", BAD_NAMES)
async def test_INP_01_names_that_are_none(name: str, at_depth: int) -> None:
    """In each of the three lists, at any depth."""
    for bad in (
        Directory(files=[file(name)]),
        Directory(directories=[directory(name)]),
        Directory(symlinks=[link(name)]),
    ):
        with pytest.raises(InvalidArgument):
            await load_directory(bad, at_depth=at_depth)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(Directory(files=[file("a"), file("a")]), id="files"),
        pytest.param(Directory(directories=[directory("a"), directory("a")]), id="directories"),
        pytest.param(Directory(symlinks=[link("a"), link("a", "y")]), id="symlinks"),
        pytest.param(Directory(files=[file("a")], directories=[directory("a")]), id="file-and-directory"),
        pytest.param(Directory(files=[file("a")], symlinks=[link("a")]), id="file-and-symlink"),
        pytest.param(
            Directory(directories=[directory("d")], symlinks=[link("d", "/tmp/x")]), id="INP-09-directory-and-symlink"
        ),
    ],
)
async def test_INP_02_names_are_unique_across_the_lists(bad: Directory) -> None:
    """Else one of them would be created through the other."""
    with pytest.raises(InvalidArgument, match="two nodes named"):
        await load_directory(bad)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(Directory(files=[FileNode(name="f")]), id="file-without-digest"),
        pytest.param(Directory(directories=[DirectoryNode(name="d")]), id="directory-without-digest"),
        pytest.param(Directory(files=[FileNode(name="f", digest=DigestMessage(hash="zz"))]), id="malformed-digest"),
        pytest.param(Directory(symlinks=[SymlinkNode(name="l")]), id="link-without-target"),
        pytest.param(Directory(symlinks=[link("l", "a\0b")]), id="link-with-NUL"),
    ],
)
async def test_incomplete_nodes(bad: Directory) -> None:
    """An unset digest is never the empty blob."""
    with pytest.raises(InvalidArgument):
        await load_directory(bad)


async def test_T9_a_blob_that_is_no_directory() -> None:
    """INVALID_ARGUMENT, naming it."""
    blobs: Blobs = {}
    elf = put(blobs, b"\x7fELF\x02\x01\x01" + bytes(range(256)))
    with pytest.raises(InvalidArgument, match=f"{elf.hash}.* Directory"):
        await load(blobs, put(blobs, Directory(directories=[DirectoryNode(name="d", digest=elf)])))


@pytest.mark.parametrize("target", ["../..", "dangling", "/etc/passwd", "a//b/", "ü"])
async def test_INP_07_INP_08_symlink_targets_are_kept_as_they_are(target: str) -> None:
    """Relative ones always; absolute ones when the server allows them."""
    blobs: Blobs = {}
    root = put_tree(blobs, {"l": Link(target)})
    tree = await load(blobs, root)
    assert tree.directories[tree.root].symlinks == {"l": target}
    if target.startswith("/"):
        with pytest.raises(InvalidArgument, match="DISALLOWED"):
            await load(blobs, root, absolute_symlinks=False)
    else:
        await load(blobs, root, absolute_symlinks=False)


async def test_EXE_04_everything_missing_is_named_at_once() -> None:
    """Files and directories anywhere in the tree, each once."""
    blobs: Blobs = {}
    lost: Blobs = {}
    gone = [from_message(put(lost, f"file {i}".encode())) for i in range(3)]
    gone.append(from_message(put(lost, Directory(files=[file("x")]))))
    node = [
        FileNode(name=str(i), digest=DigestMessage(hash=d.hash, size_bytes=d.size_bytes)) for i, d in enumerate(gone)
    ]
    lost_directory = DirectoryNode(name="d", digest=DigestMessage(hash=gone[3].hash, size_bytes=gone[3].size_bytes))
    deep = put(blobs, Directory(files=[node[1], node[2], FileNode(name="here", digest=put(blobs, b"here"))]))
    root = Directory(files=[node[0], node[1]], directories=[lost_directory, DirectoryNode(name="e", digest=deep)])
    with pytest.raises(MissingBlobs) as caught:
        await load(blobs, put(blobs, root))
    assert sorted(map(str, caught.value.digests)) == sorted(map(str, gone))


async def test_EXE_03_a_missing_root() -> None:
    """Named like any other."""
    digest = put({}, b"gone")
    with pytest.raises(MissingBlobs) as caught:
        await load({}, digest)
    assert caught.value.digests == (from_message(digest),)


@pytest.mark.parametrize("width", [2, 10])
async def test_T5_a_bomb_of_small_blobs_is_counted_not_unfolded(width: int) -> None:
    """Thirty blobs describe 2^29 directories; that is known within a second, and the disk was never touched."""
    blobs: Blobs = {}
    digest = put(blobs, Directory(files=[file("f")]))
    for _ in range(29):
        digest = put(blobs, Directory(directories=[DirectoryNode(name=f"{i}", digest=digest) for i in range(width)]))
    started = time.monotonic()
    with pytest.raises(InvalidArgument, match="expands to more than"):
        await load(blobs, digest)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("depth", [MAX_DEPTH, 10_000])
async def test_T6_a_tree_too_deep(depth: int) -> None:
    """Refused, without recursion of ours."""
    with pytest.raises(InvalidArgument, match="deeper"):
        await load_directory(Directory(), at_depth=depth)


async def test_INP_14_the_deepest_tree() -> None:
    """As deep as allowed is fine."""
    tree = await load_directory(Directory(files=[file("f")]), at_depth=MAX_DEPTH - 1)
    assert len(tree.directories) == MAX_DEPTH


async def test_T7_a_directory_too_large_to_look_into_is_refused_by_its_digest() -> None:
    """Nothing is read."""
    huge = Digest("a" * 64, 64 << 20, DigestFunction.SHA256)
    with pytest.raises(InvalidArgument, match="larger than"):
        await load_input_tree(MemoryBlobStore(), huge, absolute_symlinks=True)


async def test_a_large_tree_leaves_the_loop_free() -> None:
    """Thousands of directories, and one with thousands of files: others get their turn all the while."""
    blobs: Blobs = {}
    many = {f"d{i}": {f"f{j}": f"{i}/{j}".encode() for j in range(10)} for i in range(3000)}
    wide = {f"f{i}": b"" for i in range(20_000)}
    root = put_tree(blobs, {"many": many, "wide": wide})
    store = MemoryBlobStore()
    for digest, data in blobs.items():
        await write_blob(store, digest, data)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    tree = await load_input_tree(store, from_message(root), absolute_symlinks=True)
    task.cancel()
    assert len(tree.directories) == 3003
    assert turns > 10
