"""The loop that executes actions inside a warm container, and what is said to it and by it.

The agent is a shell script and runs as root with three capabilities: to become the action's user (`docker_dropper`) and
to kill what that user leaves. The action's user is never root, so nothing it runs can touch the agent or its pipes.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass

from expbuild.errors import InvalidArgument
from expbuild.workers.base import Run
from expbuild.workers.docker_dropper import COMPLAINT
from expbuild.workers.docker_program import not_executed

AGENT_DIR = "/.expbuild"
"""Where a container sees, read-only, the agent's files: command, drop, stdout, stderr."""

CAPABILITIES = ("KILL", "SETGID", "SETUID")
"""What the agent needs, and all it has. No other process of the container has any."""

NAME = "expbuild-agent"

_NOT_FOUND = f"{NAME}: not found"

# `kill -1` spares its caller and process 1. It fails when nobody is left to be killed; the dead count until they are
# reaped, which is done by process 1: the init, or this shell whenever it waits for a child.
_SCRIPT = """
home=/
if [ -r /etc/passwd ]; then
  while IFS=: read -r name password id group comment directory shell; do
    if [ "$id" = "@UID@" ]; then home=${directory:-/}; break; fi
  done </etc/passwd
fi
for env in /usr/bin/env /bin/env; do [ ! -x $env ] || break; done  # a shell may have one built in, and not say where
[ "$("$env" -i NAME=value @DIR@/drop "$env" env)" = NAME=value ] || exit
set --
[ -r /sys/fs/cgroup/memory.events ] && events=/sys/fs/cgroup/memory.events
[ -r /sys/fs/cgroup/memory/memory.oom_control ] && events=/sys/fs/cgroup/memory/memory.oom_control
oom_kills() {
  kills=0
  [ -z "$events" ] || while read -r key value; do [ "$key" != oom_kill ] || kills=$value; done <$events
}
leftovers() {
  for file in /dev/shm/* /dev/shm/.[!.]* /dev/shm/..?* /dev/mqueue/* /dev/mqueue/.[!.]*; do
    if [ -e "$file" ] || [ -L "$file" ]; then return 0; fi
  done
  for table in /proc/sysvipc/shm /proc/sysvipc/sem /proc/sysvipc/msg; do
    [ -r $table ] && { read -r line; read -r line; } <$table && return 0
  done
  return 1
}
echo ready
while read -r number; do
  oom_kills; before=$kills
  (. @DIR@/command) </dev/null >@DIR@/stdout 2>@DIR@/stderr
  code=$?
  while kill -KILL -1 2>/dev/null; do @REAP@; done
  oom_kills
  if leftovers; then left=1; else left=0; fi
  echo "$number $code $((kills - before)) $left"
done
"""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the agent says after a command: everything the command started is dead.

    oom_kills: how many processes the kernel killed for want of memory meanwhile. has_leftovers: whether there is shared
    memory, a queue or a semaphore that outlives processes.
    """

    number: int
    exit_code: int
    oom_kills: int
    has_leftovers: bool

    @classmethod
    def parse(cls, line: bytes) -> Reply | None:
        """Return the reply in a line of the agent's; None when it is not one."""
        fields = line.split()
        if len(fields) != 4 or not all(re.fullmatch(rb"-?\d+", field) for field in fields):
            return None
        number, exit_code, oom_kills, left = map(int, fields)
        return cls(number, exit_code, oom_kills, left != 0)


def agent_command(uid: int, *, has_init: bool) -> list[str]:
    """Return the agent as a command. uid: the user of the actions. has_init: whether process 1 is an init."""
    reap = ":" if has_init else "(:)"
    script = _SCRIPT.replace("@UID@", str(uid)).replace("@DIR@", AGENT_DIR).replace("@REAP@", reap)
    return ["/bin/sh", "-c", script, NAME]


def command_script(run: Run, environment: Mapping[str, str], workspace: str) -> bytes:
    """Return the script by which the agent executes one command.

    environment: all of the command's variables; HOME is the user's unless it is among them. The shell's own would not
    do: it may keep only variables whose names it could have itself, and adds some.
    """
    path = environment.get("PATH", "")
    lines = [f"cd -- {_quoted(posixpath.join(workspace, run.working_directory))} || exit", "program="]
    program = run.arguments[0]
    if "/" in program:
        lines.append(f"program={_quoted(program)}")
    else:
        files = " ".join(_quoted(f"{directory or '.'}/{program}") for directory in path.split(":"))
        lines += [
            f'for file in {files}; do if [ -f "$file" ] && [ -x "$file" ]; then program=$file; break; fi; done',
            f'[ -n "$program" ] || {{ echo "{_NOT_FOUND}" >&2; exit 127; }}',
        ]
    variables = " ".join(_quoted(f"{name}={value}") for name, value in environment.items())
    arguments = " ".join(map(_quoted, run.arguments))
    lines.append(f'exec "$env" -i "HOME=$home" {variables} {AGENT_DIR}/drop "$program" {arguments}')
    return ("\n".join(lines) + "\n").encode()


def raise_if_agent_complained(run: Run, exit_code: int, path: str) -> None:
    """Raise InvalidArgument when there was nothing to execute. path: the command's PATH.

    A command could imitate the words; it would only spoil its own failure.
    """
    if exit_code not in (126, 127) or run.stdout.stat().st_size or run.stderr.stat().st_size > 1000:
        return
    said = run.stderr.read_bytes()
    if said == f"{_NOT_FOUND}\n".encode():
        raise not_executed(run, path, os.strerror(errno.ENOENT))
    if said.startswith(COMPLAINT) and len(said) == len(COMPLAINT) + 1:
        raise not_executed(run, path, os.strerror(said[-1]))
    if re.match(rb"(%s|%s/command): .*too long\n" % (NAME.encode(), AGENT_DIR.encode()), said):
        raise InvalidArgument(f"program {run.arguments[0][:200]!r} cannot be executed: {os.strerror(errno.E2BIG)}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
