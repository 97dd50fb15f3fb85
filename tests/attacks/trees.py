"""Table T: attacks by input trees."""

from __future__ import annotations

import os
from collections.abc import Callable

from expbuild.reapi import Action, Command, DigestMessage, Directory, DirectoryNode, FileNode, NodeProperties
from tests.attacks.attack import Attack, Outcome, Target, ran, request, sh
from tests.support.actions import Blobs, BuiltAction, Executable, Link, put

_RUN = ("/bin/sh", "-c", "echo RAN")


def action_on(root: Callable[[Blobs], DigestMessage]) -> BuiltAction:
    """An action that says that it ran, on an input tree made by `root`."""
    blobs: Blobs = {}
    command = put(blobs, Command(arguments=_RUN))
    action = Action(command_digest=command, input_root_digest=root(blobs), salt=os.urandom(8))
    return BuiltAction(put(blobs, action), blobs)


def _named(name: str, kind: str, depth: int) -> Callable[[], BuiltAction]:
    def root(blobs: Blobs) -> DigestMessage:
        directory = Directory()
        if kind == "file":
            directory.files.add(name=name, digest=put(blobs, b"x"))
        elif kind == "directory":
            directory.directories.add(name=name, digest=put(blobs, Directory()))
        else:
            directory.symlinks.add(name=name, target="x")
        digest = put(blobs, directory)
        for _ in range(depth):
            digest = put(blobs, Directory(directories=[DirectoryNode(name="d", digest=digest)]))
        return digest

    return lambda: action_on(root)


def _twice(first: str, second: str) -> Callable[[], BuiltAction]:
    def root(blobs: Blobs) -> DigestMessage:
        directory = Directory()
        for kind in (first, second):
            if kind == "file":
                directory.files.add(name="a", digest=put(blobs, b"x"))
            elif kind == "directory":
                inner = Directory(files=[FileNode(name="passwd", digest=put(blobs, b"x"))])
                directory.directories.add(name="a", digest=put(blobs, inner))
            else:
                directory.symlinks.add(name="a", target="/etc")
        return put(blobs, directory)

    return lambda: action_on(root)


def _bomb(width: int, depth: int) -> Callable[[], BuiltAction]:
    """A tree of `depth` small blobs that unfolds to width ** depth directories."""

    def root(blobs: Blobs) -> DigestMessage:
        digest = put(blobs, Directory())
        for _ in range(depth):
            nodes = [DirectoryNode(name=f"{number:03}", digest=digest) for number in range(width)]
            digest = put(blobs, Directory(directories=nodes))
        return digest

    return lambda: action_on(root)


def _raw(data: bytes) -> Callable[[], BuiltAction]:
    return lambda: action_on(lambda blobs: put(blobs, data))


def _unstored(size_bytes: int) -> Callable[[], BuiltAction]:
    return lambda: action_on(lambda _: DigestMessage(hash="ab" * 32, size_bytes=size_bytes))


def _without_three() -> BuiltAction:
    built = action_on(
        lambda blobs: put(
            blobs,
            Directory(files=[FileNode(name=f"{n}", digest=put(blobs, os.urandom(20))) for n in range(100)]),
        )
    )
    files = [digest for digest in built.blobs if digest.size_bytes == 20][:3]
    return BuiltAction(built.digest, {key: data for key, data in built.blobs.items() if key not in files})


async def _names_fewer_than_three(target: Target, outcome: Outcome) -> bool:
    named = b"".join(detail.value for detail in outcome.response.status.details).count(b"blobs/")
    return outcome.code != 9 or named != 3


def _empty(what: str) -> BuiltAction:
    blobs: Blobs = {}
    if what == "Action":
        return BuiltAction(put(blobs, b""), blobs)
    action = Action(command_digest=put(blobs, b""), input_root_digest=put(blobs, Directory()), salt=os.urandom(8))
    return BuiltAction(put(blobs, action), blobs)


def _setuid_input() -> BuiltAction:
    blobs: Blobs = {}
    properties = NodeProperties()
    properties.unix_mode.value = 0o6777
    node = FileNode(name="f", digest=put(blobs, b"#!/bin/sh\n"), is_executable=True, node_properties=properties)
    script = "[ -u f ] || [ -g f ] || [ -w f ] && echo BREACH; echo done"
    action = Action(
        command_digest=put(blobs, Command(arguments=("/bin/sh", "-c", script))),
        input_root_digest=put(blobs, Directory(files=[node])),
        salt=os.urandom(8),
    )
    return BuiltAction(put(blobs, action), blobs)


async def _special_input(target: Target, outcome: Outcome) -> bool:
    return b"BREACH" in outcome.stdout or outcome.code not in (0, 3)


_NAMES = (("..", "two dots"), (".", "a dot"), ("", "nothing"), ("a/b", "a slash"), ("/", "the root"), ("a\0b", "a NUL"))

TREES = (
    *(request("T1", f"a file named {what}", _named(name, "file", 0)) for name, what in _NAMES),
    *(request("T1", f"a directory named {what}", _named(name, "directory", 0)) for name, what in _NAMES),
    *(request("T1", f"a symlink named {what}", _named(name, "symlink", 0)) for name, what in _NAMES[:4]),
    request("T1", "a file named two dots, five levels down", _named("..", "file", 5)),
    request("T2", "a name of 256 bytes", _named("n" * 256, "file", 0)),
    request("T2", "a name of 200 characters in 400 bytes", _named("é" * 200, "file", 0)),
    request("T3", "one name for two files", _twice("file", "file")),
    request("T3", "one name for a file and a symlink", _twice("file", "symlink")),
    request("T3", "one name for a directory and a symlink to /etc", _twice("directory", "symlink")),
    request("T5", "30 blobs that unfold to 2^29 directories", _bomb(2, 29)),
    request("T5", "4 blobs that unfold to 10^9 directories", _bomb(1000, 3)),
    request("T6", "a tree 5,000 directories deep", _bomb(1, 5000)),
    request("T7", "a Directory of 1 GiB", _unstored(1 << 30)),
    request("T8", "three of 100 inputs missing: all three are named", _without_three, _names_fewer_than_three),
    request("T9", "a program for a Directory", _raw(b"\x7fELF\x02\x01\x01" + bytes(57))),
    request("T9", "a Directory with rubbish behind it", _raw(Directory().SerializeToString() + b"\xff\xff\xff")),
    request("T10", "empty bytes for an Action", lambda: _empty("Action")),
    request("T10", "empty bytes for a Command", lambda: _empty("Command")),
    sh(
        "T11",
        "an output below an input symlink to the server's files",
        "true",
        inputs={"out": Link("/")},
        output_paths=["out/etc/shadow", "out/etc"],
    ),
    sh("T11", "writing through an input symlink", "echo x > link/new && echo BREACH", inputs={"link": Link("/etc")}),
    Attack("T12", "an input that asks to be setuid", lambda _: _setuid_input(), _special_input),
    sh(
        "T13",
        "one blob as a program and as data",
        "[ -x a ] || echo BREACH; [ -x b ] && echo BREACH; ./a && chmod 755 b; chmod -x a; true",
        inputs={"a": Executable(b"#!/bin/sh\nexit 0\n"), "b": b"#!/bin/sh\nexit 0\n"},
    ),
    request("T14", "an input root that is not stored", _unstored(10), ran),
)
