"""Outputs collected from real directories: every kind, every list, and everything hostile."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from expbuild.digest import DigestFunction
from expbuild.errors import ExpbuildError, InvalidArgument, OutputRejected
from expbuild.execution.action import MAX_DEPTH, check_command
from expbuild.execution.outputs import CollectedOutputs, OutputCollector
from expbuild.reapi import ActionResult, Command, Directory, Tree
from expbuild.storage.base import read_blob
from expbuild.storage.memory import MemoryBlobStore
from expbuild.workers.base import Owner
from expbuild.workers.work_dir import remove_tree
from tests.execution.conftest import NOBODY, unprivileged
from tests.support.actions import from_message

EMPTY_TREE = bytes.fromhex("0a00")
EMPTY_TREE_SHA256 = "102b51b9765a56a3e899f7cf0ee38e5251f9c503b357b330a49183eb7b155604"
SECRET = b"secret of the server"

Collect = Callable[..., CollectedOutputs]


@pytest.fixture
def collect(blobs: MemoryBlobStore, root: Path) -> Collect:
    """Collect outputs from the root; keywords are fields of the Command, or options of the collector."""

    def run(
        *paths: str,
        owner: Owner | None = None,
        absolute_symlinks: bool = True,
        accepts_directories: bool = False,
        **command: object,
    ) -> CollectedOutputs:
        message = Command(arguments=["true"], output_paths=paths, **command)  # type: ignore[arg-type]
        before = len(os.listdir("/proc/self/fd"))
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return OutputCollector(
                blobs,
                root_fd,
                DigestFunction.SHA256,
                check_command(message),
                owner=owner,
                absolute_symlinks=absolute_symlinks,
                accepts_directories=accepts_directories,
            ).collect()
        finally:
            os.close(root_fd)
            assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left open"

    return run


def links(result: ActionResult) -> list[dict[str, str]]:
    """Return the three lists of symlinks: the new one, files, directories."""
    lists = (result.output_symlinks, result.output_file_symlinks, result.output_directory_symlinks)
    return [{link.path: link.target for link in found} for found in lists]


def tree_of(found: CollectedOutputs, index: int = 0) -> Tree:
    """Return one output directory's Tree, having checked the promises that go with it."""
    output = found.result.output_directories[index]
    assert output.is_topologically_sorted
    data = found.blobs[from_message(output.tree_digest)]
    tree = Tree.FromString(data)
    assert tree.SerializeToString(deterministic=True) == data
    seen = set()
    wanted = {node.digest.hash for node in tree.root.directories}
    for directory in tree.children:
        digest = hashlib.sha256(directory.SerializeToString(deterministic=True)).hexdigest()
        assert digest in wanted, "a child before every parent of it"
        assert digest not in seen, "a child twice"
        seen.add(digest)
        wanted.update(node.digest.hash for node in directory.directories)
    assert wanted == seen, "a child is missing"
    for directory in (tree.root, *tree.children):
        for names in (
            [node.name for node in directory.files],
            [node.name for node in directory.directories],
            [node.name for node in directory.symlinks],
        ):
            assert names == sorted(set(names), key=str.encode)
    return tree


def make_everything(root: Path) -> None:
    """Make every kind of output."""
    (root / "file").write_text("file")
    (root / "tool").write_text("#!")
    (root / "tool").chmod(0o755)
    (root / "dir/sub").mkdir(parents=True)
    (root / "dir/inner").write_text("inner")
    (root / "empty").mkdir()
    for name, target in {
        "to-file": "file",
        "to-dir": "dir",
        "dangling": "no/where",
        "absolute": "/etc/passwd",
        "absolute-dir": "/etc",
        "loop": "loop",
        "up": "../../..",
    }.items():
        (root / name).symlink_to(target)


# ---- lists -------------------------------------------------------------------------------------------------------


async def test_OUT_03_OUT_06_output_paths(collect: Collect, root: Path, blobs: MemoryBlobStore) -> None:
    """By lstat; links in the new list and, with the same targets, in the deprecated ones."""
    make_everything(root)
    names = [path.name for path in root.iterdir()]
    found = collect(*names, "absent", "absent/below")
    result = found.result
    files = [(f.path, f.is_executable, await read_blob(blobs, from_message(f.digest))) for f in result.output_files]
    assert files == [("file", False, b"file"), ("tool", True, b"#!")]
    assert [directory.path for directory in result.output_directories] == ["dir", "empty"]
    new, to_files, to_directories = links(result)
    assert to_directories == {"to-dir": "dir", "absolute-dir": "/etc", "up": "../../.."}
    assert to_files == {"to-file": "file", "dangling": "no/where", "absolute": "/etc/passwd", "loop": "loop"}
    assert new == {**to_files, **to_directories}


def test_OUT_04_OUT_05_old_lists(collect: Collect, root: Path) -> None:
    """Each link in its own list's field, `output_symlinks` empty."""
    make_everything(root)
    result = collect(
        output_files=["file", "to-file", "dangling"], output_directories=["dir", "to-dir", "absolute-dir"]
    ).result
    assert [f.path for f in result.output_files] == ["file"]
    assert [d.path for d in result.output_directories] == ["dir"]
    assert links(result) == [
        {},
        {"to-file": "file", "dangling": "no/where"},
        {"to-dir": "dir", "absolute-dir": "/etc"},
    ]


def test_OUT_05_a_dangling_link_in_the_directory_list(collect: Collect, root: Path) -> None:
    """Stays in that list's field."""
    make_everything(root)
    assert links(collect(output_directories=["dangling"]).result) == [{}, {}, {"dangling": "no/where"}]


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        pytest.param({"output_files": ["dir"]}, "made a directory", id="OUT-04-directory"),
        pytest.param({"output_files": ["to-dir"]}, "symlink to a directory", id="OUT-04-link-to-directory"),
        pytest.param({"output_directories": ["file"]}, "made a file", id="OUT-05-file"),
        pytest.param({"output_directories": ["to-file"]}, "symlink to a file", id="OUT-05-link-to-file"),
    ],
)
def test_the_wrong_kind_is_rejected(collect: Collect, root: Path, lists: dict[str, list[str]], words: str) -> None:
    """FAILED_PRECONDITION, saying what was declared and what was found."""
    make_everything(root)
    with pytest.raises(OutputRejected, match=words):
        collect(**lists)


def test_a_directory_for_a_file_where_the_client_takes_it(collect: Collect, root: Path) -> None:
    """For Bazel's genrules."""
    make_everything(root)
    found = collect(output_files=["dir", "file"], accepts_directories=True)
    assert [d.path for d in found.result.output_directories] == ["dir"]
    assert [f.path for f in found.result.output_files] == ["file"]


def test_OUT_14_OUT_21_overlapping_requests_sorted_by_path(collect: Collect, root: Path) -> None:
    """Each is answered, whatever else is."""
    make_everything(root)
    result = collect("dir/inner", "dir/sub", "dir", "./dir/inner").result
    assert [f.path for f in result.output_files] == ["./dir/inner", "dir/inner"]
    assert [d.path for d in result.output_directories] == ["dir", "dir/sub"]


def test_OUT_22_the_whole_working_directory(collect: Collect, root: Path) -> None:
    """One directory under the path that was asked for, and no file beside it."""
    make_everything(root)
    (root / "w").mkdir()
    (root / "w/f").write_text("f")
    for path, names in (("", ["f"]), (".", ["f"]), ("..", ["file", "tool"])):
        result = collect(path, working_directory="w")
        assert [d.path for d in result.result.output_directories] == [path]
        assert [node.name for node in tree_of(result).root.files] == names
        assert not result.result.output_files


# ---- trees -------------------------------------------------------------------------------------------------------


def test_OUT_12_an_empty_directory(collect: Collect, root: Path) -> None:
    """Two bytes, not zero."""
    (root / "d").mkdir()
    found = collect("d")
    (output,) = found.result.output_directories
    assert found.blobs[from_message(output.tree_digest)] == EMPTY_TREE
    assert (output.tree_digest.hash, output.tree_digest.size_bytes) == (EMPTY_TREE_SHA256, 2)
    assert not output.HasField("root_directory_digest")


def test_OUT_09_OUT_13_a_tree_is_canonical_complete_and_sorted(collect: Collect, root: Path) -> None:
    """Names in order of their bytes, equal directories once, links as links, executable bits kept."""
    for name in ("z", "a", "ü", "Z", "a b"):
        (root / "d" / name / "same").mkdir(parents=True)
        (root / "d" / name / "same" / "f").write_text("f")
        (root / "d" / f"{name}.file").write_text(name)
    (root / "d/z.file").chmod(0o700)
    (root / "d/z/same/only").mkdir()
    (root / "d/link").symlink_to("/etc")
    tree = tree_of(collect("d"))
    assert [node.name for node in tree.root.directories] == ["Z", "a", "a b", "z", "ü"]
    assert {node.name: node.is_executable for node in tree.root.files}["z.file"]
    assert [(node.name, node.target) for node in tree.root.symlinks] == [("link", "/etc")]
    assert len(tree.children) == 5


def test_OUT_09_equal_trees_have_equal_bytes(collect: Collect, root: Path) -> None:
    """Whatever order the entries were made in, and so lie in."""
    names = [f"{name}-{i}" for i in range(60) for name in "xyz"]
    for top, order in (("a", names), ("b", reversed(names))):
        for name in order:
            (root / top / name / "in").mkdir(parents=True)
            (root / top / name / "in" / "file").write_text(name)
    first, second = collect("a", "b").result.output_directories
    assert first.tree_digest == second.tree_digest


def test_OUT_10_a_shared_directory_stands_behind_its_deepest_parent(collect: Collect, root: Path) -> None:
    """The same directory as child of the root and far below it: still parents first, and only once."""
    for path in ("shared", "b/c/d/shared", "a/shared"):
        (root / "d" / path).mkdir(parents=True)
        (root / "d" / path / "f").write_text("shared")
    assert len(tree_of(collect("d")).children) == 4


def test_OUT_11_directories_as_blobs_when_asked_for(collect: Collect, root: Path) -> None:
    """Every Directory of the tree is stored under its own digest, the root's is named."""
    make_everything(root)
    found = collect("dir", output_directory_format=Command.OutputDirectoryFormat.DIRECTORY_ONLY)
    (output,) = found.result.output_directories
    tree = tree_of(found)
    top = Directory.FromString(found.blobs[from_message(output.root_directory_digest)])
    assert top == tree.root
    assert all(found.blobs[from_message(node.digest)] == b"" for node in top.directories)


async def test_OUT_13_files_of_a_tree_are_stored(collect: Collect, root: Path, blobs: MemoryBlobStore) -> None:
    """Each one's bytes, by the digest in the tree."""
    make_everything(root)
    (node,) = tree_of(collect("dir")).root.files
    assert await read_blob(blobs, from_message(node.digest)) == b"inner"


@pytest.mark.parametrize(("depth", "accepted"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (3000, False)])
def test_R16_deep_directories(collect: Collect, root: Path, depth: int, accepted: bool) -> None:
    """Collected down to the limit, rejected beyond it."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        fd, above = os.open("d", os.O_RDONLY, dir_fd=fd), fd
        os.close(above)
    os.close(fd)
    if accepted:
        assert len(tree_of(collect("d")).children) == depth - 1
    else:
        with pytest.raises(OutputRejected, match="deeper"):
            collect("d")
    remove_tree(root)


# ---- hostile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(root: Path) -> Path:
    """A directory beside the root that holds a secret."""
    directory = root.parent / "outside"
    directory.mkdir()
    (directory / "secret").write_bytes(SECRET)
    return directory


async def test_OUT_15_a_parent_replaced_by_a_link_is_rejected_unread(
    collect: Collect, root: Path, outside: Path, blobs: MemoryBlobStore
) -> None:
    """Whether it leads out or stays inside, at any depth; the secret is not in the store."""
    (root / "inside").mkdir()
    (root / "inside/secret").write_text("harmless")
    for name, target in (("out", outside), ("in", "inside"), ("dangling", "nowhere")):
        (root / name).symlink_to(target)
    for path in ("out/secret", "in/secret", "inside/../out/secret", "dangling/x", "out/a/b/c"):
        with pytest.raises(OutputRejected, match="symlinks are not followed"):
            collect(path)
    digest = DigestFunction.SHA256.digest_of(SECRET)
    assert await blobs.find_missing([digest]) == {digest}


async def test_R5_links_at_outputs_are_returned_not_read(
    collect: Collect, root: Path, outside: Path, blobs: MemoryBlobStore
) -> None:
    """As an output, and within one."""
    (root / "d").mkdir()
    (root / "d/link").symlink_to(outside / "secret")
    (root / "d/dir").symlink_to(outside)
    (root / "link").symlink_to(outside / "secret")
    found = collect("d", "link")
    assert links(found.result)[0] == {"link": str(outside / "secret")}
    assert [node.name for node in tree_of(found).root.symlinks] == ["dir", "link"]
    digest = DigestFunction.SHA256.digest_of(SECRET)
    assert await blobs.find_missing([digest]) == {digest}


def test_a_file_where_a_parent_was(collect: Collect, root: Path) -> None:
    """Rejected, not taken for absent."""
    (root / "f").write_text("x")
    with pytest.raises(OutputRejected):
        collect("f/x")


@pytest.mark.parametrize("path", ["link", "d"])
def test_OUT_07_absolute_links_where_disallowed(collect: Collect, root: Path, path: str) -> None:
    """At an output and within one; relative ones remain fine."""
    (root / "d").mkdir()
    (root / "d/link").symlink_to("/etc/passwd")
    (root / "link").symlink_to("/etc/passwd")
    (root / "relative").symlink_to("../x")
    collect("relative", absolute_symlinks=False)
    with pytest.raises(OutputRejected, match="DISALLOWED"):
        collect(path, absolute_symlinks=False)


def _make_special(kind: str, path: Path) -> None:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case _:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))


@pytest.mark.parametrize(
    "kind",
    ["fifo", "socket", pytest.param("device", marks=pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: mknod"))],
)
def test_OUT_08_what_is_neither_file_nor_directory_nor_link(collect: Collect, root: Path, kind: str) -> None:
    """At an output INVALID_ARGUMENT, without waiting for a writer; within one, as if it were not there."""
    (root / "d").mkdir()
    _make_special(kind, root / "special")
    _make_special(kind, root / "d/special")
    with pytest.raises(InvalidArgument, match="neither a file"):
        collect("special")
    assert collect("d").result.output_directories[0].tree_digest.hash == EMPTY_TREE_SHA256


@pytest.mark.parametrize("kind", ["file", "directory", "link", "target"])
def test_OUT_20_names_that_are_not_utf_8(collect: Collect, root: Path, kind: str) -> None:
    """Rejected, naming them escaped."""
    (root / "d").mkdir()
    bad = os.fsencode(root) + b"/d/bad-\xff"
    match kind:
        case "file":
            os.close(os.open(bad, os.O_CREAT | os.O_WRONLY))
        case "directory":
            os.mkdir(bad)
        case "link":
            os.symlink(b"x", bad)
        case _:
            os.symlink(b"bad-\xff", root.joinpath("d/link"))
    with pytest.raises(OutputRejected, match=r"bad-\\xff"):
        collect("d")


def test_R17_unusual_names_are_names(collect: Collect, root: Path) -> None:
    """Newlines, escapes, quotes, blanks: all valid UTF-8."""
    names = sorted(["new\nline", "\x1b[31m", "'\"", " ", "-rf", "\u202e", "x" * 255, "é" * 127], key=str.encode)
    (root / "d").mkdir()
    for name in names:
        (root / "d" / name).write_text(name)
    assert [node.name for node in tree_of(collect("d")).root.files] == names
    assert {f.path for f in collect(*(f"d/{name}" for name in names)).result.output_files} == {
        f"d/{name}" for name in names
    }


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o222, 0o444, 0o333])
async def test_R18_what_the_action_closed_is_opened(
    collect: Collect, root: Path, blobs: MemoryBlobStore, mode: int
) -> None:
    """Files and directories without permissions are collected, as the user who owns them."""
    os.chmod(root, 0o777)
    with unprivileged():
        (root / "d/e").mkdir(parents=True)
        (root / "d/e/f").write_text("closed")
        (root / "f").write_text("alone")
        (root / "d/e/f").chmod(mode)
        (root / "f").chmod(mode)
        (root / "d/e").chmod(mode)
        (root / "d").chmod(mode)
        found = collect("f", "d/e/f", "d")
    digests = [DigestFunction.SHA256.digest_of(data) for data in (b"closed", b"alone")]
    assert await blobs.find_missing(digests) == set()
    assert {f.is_executable for f in found.result.output_files} == {bool(mode & 0o111)}


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root reads what the action could not")
@pytest.mark.parametrize("path", ["link", "d"])
def test_R10_a_hard_link_to_a_file_the_action_cannot_read(
    collect: Collect, root: Path, outside: Path, path: str
) -> None:
    """We may be root: a link that needs no right to read must not make us read."""
    owner = Owner(NOBODY, NOBODY)
    (outside / "secret").chmod(0o640)
    (root / "d").mkdir()
    for link in (root / "link", root / "d/link"):
        os.link(outside / "secret", link)
    with pytest.raises(OutputRejected, match="could not read"):
        collect(path, owner=owner)


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root has files of several users")
def test_R10_inputs_and_its_own_files_are_the_actions_to_return(collect: Collect, root: Path) -> None:
    """Files of ours that everybody may read, those of its group, and its own whatever their mode."""
    for name, uid, gid, mode in (
        ("input", 0, 0, 0o444),
        ("group", 0, NOBODY, 0o440),
        ("own", NOBODY, NOBODY, 0o000),
        ("world", 1, 1, 0o604),
    ):
        (root / name).write_text(name)
        os.chown(root / name, uid, gid)
        (root / name).chmod(mode)
    result = collect("input", "group", "own", "world", owner=Owner(NOBODY, NOBODY)).result
    assert len(result.output_files) == 4


def test_collection_stops_at_the_first_error_and_closes_everything(collect: Collect, root: Path) -> None:
    """No descriptor is left (the fixture looks), however deep the trouble lies."""
    deep = root / "d/a/b/c"
    deep.mkdir(parents=True)
    os.close(os.open(os.fsencode(deep) + b"/\xff", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(ExpbuildError):
        collect("d", "d/a", "absent")
