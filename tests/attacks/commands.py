"""Table C: attacks by commands."""

from __future__ import annotations

import os
from typing import Any

from expbuild.reapi import Action, Command, Directory
from tests.attacks.attack import Attack, Outcome, Target, request, sh
from tests.support.actions import Blobs, BuiltAction, Executable, Link, Node, build_action, put

_RUN = ("/bin/sh", "-c", "echo RAN")


def _command(
    what: str, row: str, *, arguments: tuple[str, ...] = _RUN, inputs: dict[str, Node] | None = None, **fields: Any
) -> Attack:
    return request(row, what, lambda: build_action(arguments, inputs=inputs, salt=os.urandom(8), **fields))


def _timeout(seconds: int, nanos: int = 0) -> BuiltAction:
    blobs: Blobs = {}
    action = Action(
        command_digest=put(blobs, Command(arguments=_RUN)),
        input_root_digest=put(blobs, Directory()),
        salt=os.urandom(8),
    )
    action.timeout.seconds, action.timeout.nanos = seconds, nanos
    return BuiltAction(put(blobs, action), blobs)


def _program(content: bytes) -> BuiltAction:
    return build_action(("./p",), inputs={"p": Executable(content)}, salt=os.urandom(8))


async def _said_so(target: Target, outcome: Outcome) -> bool:
    return b"RAN" in outcome.stdout or (outcome.code, outcome.exit_code) == (0, 0)


async def _not_ended(target: Target, outcome: Outcome) -> bool:
    return outcome.code != 4


_PATHS = (
    ("..", "the parent"),
    ("a/../../x", "beside the root, by a detour"),
    ("../../../../etc/shadow", "/etc/shadow from below"),
    ("/etc/shadow", "/etc/shadow"),
    ("a/", "with a slash at its end"),
    ("a//b", "with an empty component"),
    ("a\0b", "with a NUL"),
)

COMMANDS = (
    *(_command(f"an output path {what}", "C1", output_paths=[path]) for path, what in _PATHS),
    *(_command(f"an output file {what}", "C1", output_files=[path]) for path, what in _PATHS[:4]),
    *(_command(f"an output directory {what}", "C1", output_directories=[path]) for path, what in _PATHS[:4]),
    _command("an output below an input file", "C2", inputs={"a": b"x"}, output_paths=["a/b"]),
    _command("300,000 output paths", "C3", output_paths=[f"{number}" for number in range(300_000)]),
    _command("a working directory /", "C4", working_directory="/"),
    _command("a working directory above the root", "C4", working_directory=".."),
    _command("a working directory that is a file", "C4", inputs={"a": b"x"}, working_directory="a"),
    _command("a working directory that is a symlink to /etc", "C4", inputs={"a": Link("/etc")}, working_directory="a"),
    _command("a variable named with =", "C5", environment={"A=B": "x"}),
    _command("a variable without a name", "C5", environment={"": "x"}),
    _command("a variable named with a NUL", "C5", environment={"A\0": "x"}),
    _command("a variable with a NUL in its value", "C5", environment={"A": "x\0y"}),
    sh(
        "C6",
        "LD_PRELOAD and its like aimed at the server's helpers",
        "cat marker 2>/dev/null && echo BREACH; true",
        inputs={"evil.py": b"open('marker', 'w').write('x')"},
        environment={
            "LD_PRELOAD": "/workspace/evil.so",
            "PYTHONSTARTUP": "evil.py",
            "PYTHONPATH": ".",
            "BASH_ENV": "evil.py",
        },
    ),
    sh("C7", "the server's own environment", 'env; [ -z "$$EXPBUILD_ATTACK_SECRET" ] || echo BREACH'),
    _command("a command without arguments", "C8", arguments=()),
    _command("an empty program name", "C8", arguments=("",)),
    _command("a program that does not exist", "C8", arguments=("no-such-program",)),
    _command("a program that is a directory", "C8", inputs={"d": {}}, arguments=("./d",)),
    _command("a program that is not executable", "C8", inputs={"p": b"#!/bin/sh\necho RAN"}, arguments=("./p",)),
    request("C8", "a damaged binary", lambda: _program(b"\x7fELF\x02\x01\x01 RAN"), _said_so),
    _command("a script without #!", "C8", inputs={"p": Executable(b"echo RAN")}, arguments=("./p",)),
    _command("a program whose interpreter is missing", "C8", inputs={"p": Executable(b"#!/no\n")}, arguments=("./p",)),
    _command("an argument of 1 MB", "C9", arguments=(*_RUN, "x" * (1 << 20))),
    request("C10", "a negative timeout", lambda: _timeout(-1)),
    request("C10", "a timeout of too many nanoseconds", lambda: _timeout(1, 2_000_000_000)),
    request("C10", "a timeout beyond the server's", lambda: _timeout(10**8)),
    request("C10", "a timeout of 10^11 seconds", lambda: _timeout(10**11)),
    sh("C11", "no timeout, and never an end", "exec sleep 100000", judge=_not_ended, timeout_s=None),
    _command("the system Plan 9", "C12", platform={"OSFamily": "Plan9"}),
    _command("a platform property nobody has", "C12", platform={"no-such-property": "1"}),
    _command("a privileged container", "C13", platform={"dockerPrivileged": "true"}),
    _command("an image of its own choice", "C13", platform={"container-image": "docker://evil/image"}),
    _command("the network of the host, by a property", "C13", platform={"dockerNetwork": "host"}),
)
