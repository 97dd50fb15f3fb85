"""Commands that cannot be run in any container: found before, by the daemon, or in what the container said."""

from __future__ import annotations

import posixpath
import re

from expbuild.errors import InvalidArgument
from expbuild.workers import verdicts
from expbuild.workers.base import Run

_ARGUMENTS_LIMIT_BYTES = 6 << 20  # the most the kernel ever takes, environment included; usually 2 MiB

_NOT_EXECUTED = re.compile(
    rb"(?:\[FATAL tini \(\d+\)\] exec (?P<program>.*) failed|exec (?P<path>[^\n]*)): (?P<reason>[^\n]*)\n", re.DOTALL
)
"""All that is on stderr when the container's init, or the runtime before it, had nothing to execute."""


def check_command(run: Run) -> None:
    """Raise InvalidArgument for a command no container can be given."""
    if not run.arguments[0]:
        raise InvalidArgument("the first argument, the program, is empty")
    for name in run.environment:
        if not name or "=" in name:
            raise InvalidArgument(f"not the name of an environment variable: {name[:200]!r}")
    if any("\0" in text for text in (*run.arguments, *run.environment, *run.environment.values())):
        raise InvalidArgument("an argument or a variable of the environment contains a NUL character")
    size_bytes = sum(len(text.encode()) for text in (*run.arguments, *run.environment, *run.environment.values()))
    if size_bytes > _ARGUMENTS_LIMIT_BYTES:
        raise _cannot_execute(run, "its arguments and environment are too long for the system")


def out_of_memory(limit_bytes: int | None) -> str:
    """Return the message for a command of which something was killed for want of memory."""
    return "out of memory: this machine has none left" if limit_bytes is None else verdicts.out_of_memory(limit_bytes)


def not_executed(run: Run, path: str, reason: str) -> InvalidArgument:
    """Return the error for what init, or the daemon, says about a program. path: the command's PATH."""
    program = run.arguments[0]
    if "no such file" not in reason.lower() and "not found" not in reason:
        return _cannot_execute(run, reason)
    if "/" not in program:
        return InvalidArgument(f"program {program[:200]!r} was not found in the PATH of the command: {path[:1000]}")
    where = repr(run.working_directory) if run.working_directory else "the input root"
    return InvalidArgument(
        f"program {program[:200]!r}, or an interpreter it names, does not exist; the working directory is {where}"
    )


def raise_if_not_executed(run: Run, path: str) -> None:
    """Raise InvalidArgument when a container ended because there was nothing to execute.

    Of this the daemon knows nothing. A command could imitate the report; it would only spoil its own failure.
    """
    program = run.arguments[0].encode()
    if run.stdout.stat().st_size or run.stderr.stat().st_size > len(program) + 1000:
        return
    match = _NOT_EXECUTED.fullmatch(run.stderr.read_bytes())
    if match is None:
        return
    reported = posixpath.basename(match["program"] or match["path"])
    if reported in (posixpath.basename(program), b"docker-init"):
        raise not_executed(run, path, match["reason"].decode("utf-8", "replace"))


def _cannot_execute(run: Run, reason: str) -> InvalidArgument:
    return InvalidArgument(f"program {run.arguments[0][:200]!r} cannot be executed: {reason}")
