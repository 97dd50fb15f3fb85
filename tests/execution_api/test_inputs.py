"""Input trees that are refused (conformance INP-*): checked before anything touches the disk."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from expbuild.reapi import Action, Command, DigestMessage, Directory, DirectoryNode, FileNode, SymlinkNode
from tests.support.actions import Blobs, BuiltAction, Client, Link, SideEffects, put, put_tree, shell

INVALID_ARGUMENT = 3

MakeRoot = Callable[[Blobs], DigestMessage]


def _file(name: str) -> MakeRoot:
    return lambda blobs: put(blobs, Directory(files=[FileNode(name=name, digest=put(blobs, b"x"))]))


def _directory(name: str) -> MakeRoot:
    return lambda blobs: put(blobs, Directory(directories=[DirectoryNode(name=name, digest=put_tree(blobs, {}))]))


def _symlink(name: str, target: str = "x") -> MakeRoot:
    return lambda blobs: put(blobs, Directory(symlinks=[SymlinkNode(name=name, target=target)]))


def _twice(blobs: Blobs) -> DigestMessage:
    return put(blobs, Directory(files=[FileNode(name="n", digest=put(blobs, b"x"))] * 2))


def _file_and_directory(blobs: Blobs) -> DigestMessage:
    file = FileNode(name="n", digest=put(blobs, b"x"))
    return put(blobs, Directory(files=[file], directories=[DirectoryNode(name="n", digest=put_tree(blobs, {}))]))


def _symlink_and_directory(blobs: Blobs) -> DigestMessage:
    link = SymlinkNode(name="n", target="/tmp")
    return put(blobs, Directory(symlinks=[link], directories=[DirectoryNode(name="n", digest=put_tree(blobs, {}))]))


def _not_utf_8(blobs: Blobs) -> DigestMessage:
    good = Directory(symlinks=[SymlinkNode(name="name", target="t")]).SerializeToString()
    return put(blobs, good.replace(b"name", b"\xff\xfe\xfd\xfc"))


def _deep(blobs: Blobs) -> DigestMessage:
    digest = put_tree(blobs, {})
    for _ in range(600):
        digest = put(blobs, Directory(directories=[DirectoryNode(name="d", digest=digest)]))
    return digest


def _bomb(blobs: Blobs) -> DigestMessage:
    """40 levels of two names for the next: 2^40 directories in 41 blobs."""
    digest = put_tree(blobs, {})
    for _ in range(40):
        digest = put(blobs, Directory(directories=[DirectoryNode(name=n, digest=digest) for n in "ab"]))
    return digest


@pytest.mark.parametrize(
    "make_root",
    [
        pytest.param(_file(""), id="INP-01-empty-name"),
        pytest.param(_file("."), id="INP-01-dot"),
        pytest.param(_file(".."), id="INP-01-dots"),
        pytest.param(_file("a/b"), id="INP-01-slash"),
        pytest.param(_file("/etc/x"), id="INP-01-absolute"),
        pytest.param(_file("a\0b"), id="INP-01-NUL"),
        pytest.param(_file("x" * 256), id="INP-01-too-long"),
        pytest.param(_directory(".."), id="INP-01-directory-dots"),
        pytest.param(_directory("../../tmp"), id="INP-09-directory-outside"),
        pytest.param(_symlink("../escape"), id="INP-09-symlink-outside"),
        pytest.param(_symlink("l", ""), id="INP-07-no-target"),
        pytest.param(_twice, id="INP-02-file-twice"),
        pytest.param(_file_and_directory, id="INP-02-file-and-directory"),
        pytest.param(_symlink_and_directory, id="INP-09-symlink-and-directory"),
        pytest.param(_not_utf_8, id="INP-04-not-utf-8"),
        pytest.param(_deep, id="INP-14-600-levels"),
        pytest.param(_bomb, id="INP-14-two-to-the-40"),
    ],
)
async def test_an_input_tree_that_cannot_be_is_refused(client: Client, make_root: MakeRoot) -> None:
    """INVALID_ARGUMENT in the operation, at once, and without an invitation to upload anything."""
    blobs: Blobs = {}
    root = make_root(blobs)
    command = put(blobs, Command(arguments=["true"]))
    action = Action(command_digest=command, input_root_digest=root, salt=os.urandom(8))
    status = (await client.execute(BuiltAction(put(blobs, action), blobs))).response.status
    assert status.code == INVALID_ARGUMENT
    assert not status.details
    assert len(status.message) < 2000


async def test_INP_09_INP_12_outputs_below_a_link_do_not_leave_the_root(client: Client, effects: SideEffects) -> None:
    """A link of the inputs leads out, and a parent of an output lies behind it: nothing is made there."""
    effects.path("target").mkdir(mode=0o777)
    action = shell("true", inputs={"out": Link(str(effects.path("target")))}, output_paths=["out/made/by/us"])
    response = (await client.execute(action)).response
    assert list(effects.path("target").iterdir()) == []
    assert not response.result.output_files
    assert response.status.code in (INVALID_ARGUMENT, 9)
