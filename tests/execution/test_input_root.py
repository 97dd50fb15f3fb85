"""Input roots on a real disk, and what takes them away again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expbuild.digest import DigestFunction
from expbuild.errors import BlobNotFound, InvalidArgument
from expbuild.execution.action import Components
from expbuild.execution.input_root import create_workspace, materialize
from expbuild.execution.input_tree import load_input_tree
from expbuild.storage.base import BlobStore, Sharing, write_blob
from expbuild.storage.files import MTIME_NS
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.memory import MemoryBlobStore
from expbuild.workers.base import Owner
from expbuild.workers.work_dir import remove_tree
from tests.execution.conftest import NOBODY, unprivileged
from tests.support.actions import Blobs, Executable, Link, Node, from_message, put_tree

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root can give files away")


@pytest.fixture
def disk_blobs(root: Path) -> Iterator[FilesystemBlobStore]:
    """A store on the disk of the input root, so that its files can be linked there."""
    with ThreadPoolExecutor(1) as executor:
        yield FilesystemBlobStore(root.parent / "cas", [DigestFunction.SHA256], executor)


async def prepare(
    store: BlobStore,
    root: Path,
    tree: Mapping[str, Node],
    *,
    outputs: tuple[str, ...] = (),
    owner: Owner | None = None,
    sharing: Sharing = Sharing.COPY,
) -> None:
    """Store a tree and put it on disk, with the parents `outputs`."""
    blobs: Blobs = {}
    digest = from_message(put_tree(blobs, tree))
    for key, data in blobs.items():
        await write_blob(store, key, data)
    loaded = await load_input_tree(store, digest, absolute_symlinks=True)
    parents: list[Components] = [tuple(path.split("/")) for path in outputs]
    materialize(loaded, store, root, output_parents=parents, owner=owner, sharing=sharing)


def listing(root: Path) -> dict[str, str]:
    """Return every path below `root` with what it is."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            if path.is_symlink():
                kind = f"-> {os.readlink(path)}"
            elif path.is_dir():
                kind = "directory"
            else:
                kind = f"{path.stat().st_mode & 0o7777:o} {path.read_text()}"
            found[str(path.relative_to(root))] = kind
    return found


TREE: Mapping[str, Node] = {
    "a": {"x": b"same", "deep": {"er": {}}},
    "b": {"x": b"same"},
    "empty": b"",
    "run": Executable(b"#!"),
    "run-empty": Executable(b""),
    "up": Link("../.."),
    "dangling": Link("no/where"),
    "absolute": Link("/etc"),
}
ON_DISK = {
    "a": "directory",
    "a/x": "444 same",
    "a/deep": "directory",
    "a/deep/er": "directory",
    "b": "directory",
    "b/x": "444 same",
    "empty": "444 ",
    "run": "555 #!",
    "run-empty": "555 ",
    "up": "-> ../..",
    "dangling": "-> no/where",
    "absolute": "-> /etc",
}


@pytest.mark.parametrize("sharing", Sharing)
async def test_INP_05_INP_06_INP_07_a_tree_on_disk(
    disk_blobs: FilesystemBlobStore, root: Path, sharing: Sharing
) -> None:
    """Every kind of node; files read-only, directories writable, and the same mtime every time."""
    await prepare(disk_blobs, root, TREE, sharing=sharing)
    assert listing(root) == ON_DISK
    assert {os.lstat(root / name).st_mtime_ns for name in ("a/x", "run", "empty")} == {MTIME_NS}
    assert (root / "a").stat().st_mode & 0o777 == 0o755


async def test_a_tree_from_memory(blobs: MemoryBlobStore, root: Path) -> None:
    """The memory store places files too."""
    await prepare(blobs, root, TREE)
    assert listing(root) == ON_DISK


async def test_linked_files_share_an_inode_and_copies_do_not(disk_blobs: FilesystemBlobStore, root: Path) -> None:
    """Links: one inode for each content and mode. Copies and empty files: each its own."""
    tree: Mapping[str, Node] = {"a": b"content", "b": b"content", "x": Executable(b"content"), "e": b"", "f": b""}
    (root / "linked").mkdir()
    (root / "copied").mkdir()
    await prepare(disk_blobs, root / "linked", tree, sharing=Sharing.LINK)
    await prepare(disk_blobs, root / "copied", tree, sharing=Sharing.COPY)
    inodes = {path.relative_to(root).as_posix(): path.stat().st_ino for path in root.glob("*/*")}
    assert inodes["linked/a"] == inodes["linked/b"] != inodes["linked/x"]
    own = [inodes[name] for name in inodes if name.startswith("copied/") or name in ("linked/e", "linked/f")]
    assert len(set(own)) == len(own) == 7
    assert inodes["linked/a"] not in own


@needs_root
@pytest.mark.parametrize("sharing", Sharing)
async def test_directories_belong_to_the_action_and_files_to_us(
    disk_blobs: FilesystemBlobStore, root: Path, sharing: Sharing
) -> None:
    """It can create and delete everywhere, and change nothing it was given."""
    workspace = root / "workspace"
    owner = Owner(NOBODY, NOBODY)
    create_workspace(workspace, owner)
    await prepare(
        disk_blobs, workspace / "root", {"d": {"f": b"x"}}, outputs=("d/out", "o/p"), owner=owner, sharing=sharing
    )
    for name in ("root", "tmp", "root/d", "root/d/out", "root/o", "root/o/p"):
        seen = (workspace / name).stat()
        assert (seen.st_uid, seen.st_gid) == (NOBODY, NOBODY), name
    assert workspace.stat().st_uid == 0
    assert workspace.stat().st_mode & 0o777 == 0o711
    assert (workspace / "root/d/f").stat().st_uid == 0
    with unprivileged():
        (workspace / "root/d/new").write_text("new")
        with pytest.raises(PermissionError):
            (workspace / "root/d/f").write_text("poison")
        with pytest.raises(PermissionError):
            (workspace / "root/d/f").chmod(0o777)


@pytest.mark.parametrize(
    ("tree", "outputs", "expected"),
    [
        pytest.param({}, ("a/b/c",), {"a", "a/b", "a/b/c"}, id="INP-11-created"),
        pytest.param({"a": {}}, ("a/b", "a"), {"a", "a/b"}, id="partly-there"),
        pytest.param({"l": Link("target")}, ("l/x",), {"l"}, id="INP-12-dangling-link-left-alone"),
        pytest.param({"l": Link("d"), "d": {}}, ("l/x/y",), {"l", "d"}, id="INP-12-link-not-followed"),
    ],
)
async def test_parents_of_outputs(
    blobs: MemoryBlobStore, root: Path, tree: Mapping[str, Node], outputs: tuple[str, ...], expected: set[str]
) -> None:
    """They exist before the command runs, unless a symlink stands in the way."""
    await prepare(blobs, root, tree, outputs=outputs)
    assert set(listing(root)) == expected


async def test_INP_12_an_output_parent_does_not_lead_out(blobs: MemoryBlobStore, root: Path) -> None:
    """Nothing is created behind a link out of the root."""
    outside = root.parent / "outside"
    outside.mkdir()
    await prepare(blobs, root, {"l": Link(str(outside))}, outputs=("l/x",))
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("output", ["f", "f/x", "d/f/x/y"])
async def test_INP_12_an_input_file_in_the_way_of_an_output(blobs: MemoryBlobStore, root: Path, output: str) -> None:
    """INVALID_ARGUMENT, naming the file."""
    with pytest.raises(InvalidArgument, match=r"'(d/)?f', which is a file"):
        await prepare(blobs, root, {"f": b"", "d": {"f": b""}}, outputs=(output,))


async def test_a_blob_that_vanished_meanwhile(root: Path) -> None:
    """Named, so that the client can be told."""
    full, emptied = MemoryBlobStore(), MemoryBlobStore()
    blobs: Blobs = {}
    digest = from_message(put_tree(blobs, {"f": b"gone"}))
    for key, data in blobs.items():
        await write_blob(full, key, data)
    tree = await load_input_tree(full, digest, absolute_symlinks=True)
    with pytest.raises(BlobNotFound) as caught:
        materialize(tree, emptied, root, output_parents=[], owner=None, sharing=Sharing.COPY)
    assert caught.value.digest == DigestFunction.SHA256.digest_of(b"gone")


async def test_no_descriptor_is_left_open(blobs: MemoryBlobStore, root: Path) -> None:
    """Neither when it works nor when it does not."""
    before = len(os.listdir("/proc/self/fd"))
    (root / "good").mkdir()
    (root / "bad").mkdir()
    await prepare(blobs, root / "good", TREE, outputs=("a/b/c", "up/x"))
    with pytest.raises(InvalidArgument):
        await prepare(blobs, root / "bad", TREE, outputs=("a/deep/er/x", "a/x/y"))
    assert len(os.listdir("/proc/self/fd")) == before


# ---- taking away -------------------------------------------------------------------------------------------------


def _nest(top: Path, depth: int) -> None:
    """Make directories below one another, deeper than any path can name."""
    fd = os.open(top, os.O_RDONLY)
    for level in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(os.open(f"file-{level}", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
        os.close(fd)
        fd = below
    os.close(fd)


def test_R16_remove_a_tree_3000_levels_deep(root: Path) -> None:
    """No recursion, no path, constant depth."""
    _nest(root, 3000)
    remove_tree(root)
    assert not root.exists()


def test_remove_everything_an_action_can_leave(root: Path) -> None:
    """Read-only and closed directories, links that lead out, sockets, pipes, names that are no text."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    os.chmod(root, 0o777)
    with unprivileged():
        (root / "closed" / "inner" / "deep").mkdir(parents=True)
        (root / "closed" / "inner" / "file").write_text("x")
        (root / "link").symlink_to(outside)
        (root / "closed" / "link").symlink_to(outside)
        os.mkfifo(root / "fifo")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(root / "socket"))
        os.mkdir(os.fsencode(root) + b"/\xff\xfe")
        for mode, name in ((0, "closed/inner/deep"), (0, "closed/inner"), (0o555, "closed")):
            os.chmod(root / name, mode)
    if os.geteuid() == 0:
        os.chown(root, NOBODY, NOBODY)
    parent_mode = root.parent.stat().st_mode
    os.chmod(root.parent, 0o777)
    with unprivileged():
        remove_tree(root)
    os.chmod(root.parent, parent_mode)
    assert not root.exists()
    assert (outside / "kept").read_text() == "kept"


def test_remove_a_wide_tree(root: Path) -> None:
    """Many directories on each of many levels."""
    for i in range(20):
        for j in range(20):
            (root / f"{i}" / f"{j}" / "x").mkdir(parents=True)
            (root / f"{i}" / f"{j}" / "f").write_text("x")
    remove_tree(root)
    assert not root.exists()


def test_remove_what_is_not_there(root: Path) -> None:
    """Is fine."""
    remove_tree(root / "missing")


def test_remove_does_not_follow_a_link_in_place_of_the_directory(root: Path) -> None:
    """Whatever it leads to stays."""
    (root / "kept").write_text("kept")
    link = root.parent / "link"
    link.symlink_to(root)
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        remove_tree(link)
    assert (root / "kept").exists()
