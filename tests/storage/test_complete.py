"""CompleteActionCache: a hit names only blobs that are in the CAS (conformance AC-02 to AC-05)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection

import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.reapi import (
    ActionResult,
    DigestMessage,
    Directory,
    DirectoryNode,
    FileNode,
    OutputDirectory,
    OutputFile,
    Tree,
)
from expbuild.storage.base import ActionCache, ActionKey, BlobStore, write_blob
from expbuild.storage.complete import MAX_TREE_BYTES, CompleteActionCache
from expbuild.storage.memory import MemoryActionCache, MemoryBlobStore
from tests.storage.conftest import FUNCTIONS


class RecordingBlobStore(MemoryBlobStore):
    """Remembers what was asked for: with a real store each question renews the blob's stamp."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[Digest] = set()

    async def find_missing(self, digests: Collection[Digest], *, certain: bool = False) -> set[Digest]:
        self.asked |= set(digests)
        return await super().find_missing(digests, certain=certain)

    def read(self, digest: Digest, *, offset: int = 0, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        self.asked.add(digest)
        return super().read(digest, offset=offset, limit=limit)


def named(data: bytes, function: DigestFunction = DigestFunction.SHA256) -> DigestMessage:
    digest = function.digest_of(data)
    return DigestMessage(hash=digest.hash, size_bytes=digest.size_bytes)


async def put_blobs(blobs: BlobStore, *datas: bytes, function: DigestFunction = DigestFunction.SHA256) -> None:
    for data in datas:
        await write_blob(blobs, function.digest_of(data), data)


async def outcome(
    cache: ActionCache, result: ActionResult, function: DigestFunction = DigestFunction.SHA256
) -> ActionResult | None:
    """Put a result and look it up."""
    key = ActionKey("", function.digest_of(b"action"))
    await cache.put(key, result)
    return await cache.get(key)


@pytest.fixture
def cache(blobs: BlobStore) -> CompleteActionCache:
    return CompleteActionCache(MemoryActionCache(), blobs)


def everything(function: DigestFunction) -> tuple[ActionResult, dict[str, bytes]]:
    """Return a result that refers to each kind of blob, and those blobs by what they are."""

    def name(data: bytes) -> DigestMessage:
        return named(data, function)

    blobs = {kind: kind.encode() for kind in ("file", "stdout", "stderr", "tree file", "deep tree file", "root file")}
    blobs |= {"deep file": b"deep file", "sub file": b"sub file"}
    leaf = Directory(files=[FileNode(name="f", digest=name(blobs["deep tree file"]))])
    top = Directory(
        files=[FileNode(name="f", digest=name(blobs["tree file"]))],
        directories=[DirectoryNode(name="d", digest=name(leaf.SerializeToString()))],
    )
    blobs["tree"] = Tree(root=top, children=[leaf]).SerializeToString()
    deep = Directory(files=[FileNode(name="f", digest=name(blobs["deep file"]))])
    blobs["deep directory"] = deep.SerializeToString()
    sub = Directory(
        files=[FileNode(name="f", digest=name(blobs["sub file"]))],
        directories=[DirectoryNode(name="d", digest=name(blobs["deep directory"]))],
    )
    blobs["sub directory"] = sub.SerializeToString()
    root = Directory(
        files=[FileNode(name="f", digest=name(blobs["root file"]))],
        directories=[
            DirectoryNode(name="a", digest=name(blobs["sub directory"])),
            DirectoryNode(name="b", digest=name(blobs["sub directory"])),
        ],
    )
    blobs["root directory"] = root.SerializeToString()
    result = ActionResult(
        output_files=[OutputFile(path="f", digest=name(blobs["file"]))],
        output_directories=[
            OutputDirectory(path="tree", tree_digest=name(blobs["tree"])),
            OutputDirectory(path="root", root_directory_digest=name(blobs["root directory"])),
        ],
        stdout_digest=name(blobs["stdout"]),
        stderr_digest=name(blobs["stderr"]),
    )
    return result, blobs


@pytest.mark.parametrize("function", FUNCTIONS)
async def test_ac_02_result_is_a_hit_when_everything_is_there(
    blobs: BlobStore, cache: ActionCache, function: DigestFunction
) -> None:
    result, parts = everything(function)
    await put_blobs(blobs, *parts.values(), function=function)
    assert await outcome(cache, result, function) == result


@pytest.mark.parametrize("kind", everything(DigestFunction.SHA256)[1])
async def test_ac_02_any_missing_blob_makes_it_a_miss(blobs: BlobStore, cache: ActionCache, kind: str) -> None:
    result, parts = everything(DigestFunction.SHA256)
    missing = parts.pop(kind)
    await put_blobs(blobs, *parts.values())
    assert await outcome(cache, result) is None
    await put_blobs(blobs, missing)
    assert await outcome(cache, result) == result


async def test_ac_04_hit_renews_every_blob_it_names() -> None:
    blobs = RecordingBlobStore()
    result, parts = everything(DigestFunction.SHA256)
    await put_blobs(blobs, *parts.values())
    await outcome(CompleteActionCache(MemoryActionCache(), blobs), result)
    assert blobs.asked == {DigestFunction.SHA256.digest_of(part) for part in parts.values()}


async def test_ac_03_directories_inside_a_tree_need_not_be_blobs(blobs: BlobStore, cache: ActionCache) -> None:
    leaf = Directory()
    leaf.symlinks.add(name="l", target="t")
    top = Directory(directories=[DirectoryNode(name="d", digest=named(leaf.SerializeToString()))])
    tree = Tree(root=top, children=[leaf]).SerializeToString()
    await put_blobs(blobs, tree)
    result = ActionResult(output_directories=[OutputDirectory(path="d", tree_digest=named(tree))])
    assert await outcome(cache, result) == result


@pytest.mark.parametrize("field", ["tree_digest", "root_directory_digest"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xff", id="garbage"),
        pytest.param(b"\x0a\x05ab", id="truncated"),
        pytest.param(
            Tree(root=Directory(files=[FileNode(name="f", digest=DigestMessage(hash="short"))])).SerializeToString(),
            id="malformed-digest",
        ),
    ],
)
async def test_ac_05_unreadable_tree_or_directory_is_a_miss(
    blobs: BlobStore, cache: ActionCache, data: bytes, field: str
) -> None:
    if field == "root_directory_digest" and data.startswith(b"\x0a\x0b"):
        data = Directory(files=[FileNode(name="f", digest=DigestMessage(hash="short"))]).SerializeToString()
    await put_blobs(blobs, data)
    directory = OutputDirectory(path="d")
    getattr(directory, field).CopyFrom(named(data))
    assert await outcome(cache, ActionResult(output_directories=[directory])) is None


async def test_ac_05_tree_beyond_all_measure_is_a_miss_unread() -> None:
    blobs = RecordingBlobStore()
    digest = DigestMessage(hash="a" * 64, size_bytes=MAX_TREE_BYTES + 1)
    result = ActionResult(output_directories=[OutputDirectory(path="d", tree_digest=digest)])
    assert await outcome(CompleteActionCache(MemoryActionCache(), blobs), result) is None
    assert blobs.asked == set()


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(ActionResult(output_files=[OutputFile(path="f")]), id="no-digest"),
        pytest.param(ActionResult(stdout_digest=DigestMessage(hash="x", size_bytes=1)), id="malformed"),
        pytest.param(
            ActionResult(output_files=[OutputFile(path="f", digest=named(b"x", DigestFunction.SHA1))]),
            id="DIG-11-other-function",
        ),
    ],
)
async def test_result_with_a_digest_no_blob_can_have_is_a_miss(cache: ActionCache, result: ActionResult) -> None:
    assert await outcome(cache, result) is None


async def test_tree_with_deep_and_shared_directories_is_walked_once_each() -> None:
    """40 levels of two names for the same child, and 3000 levels one below the other."""
    blobs = RecordingBlobStore()
    shared = Directory(files=[FileNode(name="f", digest=named(b"leaf"))])
    for _ in range(40):
        data = shared.SerializeToString()
        await put_blobs(blobs, data)
        shared = Directory(directories=[DirectoryNode(name=name, digest=named(data)) for name in "ab"])
    for _ in range(3000):
        data = shared.SerializeToString()
        await put_blobs(blobs, data)
        shared = Directory(directories=[DirectoryNode(name="d", digest=named(data))])
    await put_blobs(blobs, b"leaf", shared.SerializeToString())
    directory = OutputDirectory(path="d", root_directory_digest=named(shared.SerializeToString()))
    result = ActionResult(output_directories=[directory])
    assert await outcome(CompleteActionCache(MemoryActionCache(), blobs), result) == result
    assert len(blobs.asked) == 3042
