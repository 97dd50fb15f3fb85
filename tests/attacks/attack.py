"""What an attack is: an action, and how to tell whether it did what it should not be able to do."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, Literal

from expbuild.reapi import ExecuteResponse
from tests.support.actions import BuiltAction, Client, Node, build_action

Level = Literal["uid", "namespaces", "user"]
"""What is attacked: a server started as root with `isolation = "uid"`, the same with "namespaces", and a server started
by an ordinary user with "namespaces"."""

LEVELS: tuple[Level, ...] = ("uid", "namespaces", "user")
CANARY = b"canary-6f1d2c"
"""Is in files and variables that only the server can read."""
BREACH = b"BREACH"
"""What an attack prints when it got through."""


@dataclass(frozen=True)
class Target:
    """What attacks aim at. `names` are what scripts can say: $SECRET, $PORT, ..."""

    client: Client
    level: Level
    state: Path
    names: Mapping[str, str]


@dataclass
class Outcome:
    """How an attacking action ended. code: of the RPC or in the response, 0 for OK. seen: every byte it got out."""

    code: int = 0
    text: str = ""
    response: ExecuteResponse = field(default_factory=ExecuteResponse)
    stdout: bytes = b""
    seen: bytes = b""
    wall_s: float = 0.0

    @property
    def exit_code(self) -> int:
        return self.response.result.exit_code

    def __str__(self) -> str:
        words = (self.code, self.text, self.response.message, self.exit_code, self.seen[:300], round(self.wall_s, 1))
        return str(words)


Judge = Callable[[Target, Outcome], Awaitable[bool]]
"""Says whether the attack succeeded."""


async def printed(target: Target, outcome: Outcome) -> bool:
    """The action says so, or got hold of what only the server can read."""
    return BREACH in outcome.stdout or CANARY in outcome.seen


async def ran(target: Target, outcome: Outcome) -> bool:
    """The command ran at all, or the request was refused with a code that blames somebody else (INTERNAL, UNKNOWN)."""
    return outcome.code not in (3, 5, 9) or b"RAN" in outcome.stdout


@dataclass(frozen=True)
class Attack:
    """One row of the table. row: the number in the threat tables. admitted: where it succeeds by design."""

    row: str
    what: str
    build: Callable[[Target], BuiltAction]
    judge: Judge = printed
    admitted: frozenset[Level] = frozenset()

    @property
    def id(self) -> str:
        return f"{self.row} {self.what}"


def sh(
    row: str,
    what: str,
    script: str,
    *,
    judge: Judge = printed,
    admitted: tuple[Level, ...] = (),
    inputs: Mapping[str, Node] | None = None,
    timeout_s: float | None = 60,
    **command: Any,
) -> Attack:
    """An attack by a shell script, in which $NAMES of the target are filled in ($$ is a single one)."""

    environment: Mapping[str, str] = command.pop("environment", {})

    def build(target: Target) -> BuiltAction:
        return build_action(
            ("/bin/sh", "-c", Template(script).substitute(target.names)),
            inputs=inputs,
            environment={name: Template(value).substitute(target.names) for name, value in environment.items()},
            timeout_s=timeout_s,
            salt=os.urandom(8),
            **command,
        )

    return Attack(row, what, build, judge, frozenset(admitted))


def py(row: str, what: str, script: str, **options: Any) -> Attack:
    """An attack in Python: `attempt()` is defined by the script; when it raises nothing, it got through."""
    indented = "\n    ".join(script.strip().splitlines())
    text = (
        f"import ctypes, os, socket, sys\ndef attempt():\n    {indented}\n"
        "try:\n    attempt()\nexcept Exception as error:\n    print(error)\nelse:\n    print('BREACH')\n"
    )
    return sh(row, what, 'exec /usr/bin/python3 -c "$$CODE"', environment={"CODE": text}, **options)


def request(row: str, what: str, build: Callable[[], BuiltAction], judge: Judge = ran) -> Attack:
    """An attack by the request itself, which is to be refused before anything runs."""
    return Attack(row, what, lambda _: build(), judge)
