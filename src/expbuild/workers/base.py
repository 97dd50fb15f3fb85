"""The contract of a worker: one slot that runs one command at a time in a directory prepared for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from expbuild.platform_properties import WorkerProperties

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of an action whose Command sets none (some clients send no PATH and expect to find `sh`)."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The numeric user and group an action runs as."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Run:
    """One command to run.

    arguments: argv as the client sent it, not empty. An argv[0] without a slash is looked up in the command's PATH;
    one with a slash is relative to the working directory.
    environment: the Command's variables; the worker puts its own defaults below them.
    workspace: a directory of this action alone, holding `root/` (the input root, prepared), `tmp/` (its TMPDIR) and
    nothing else the command may touch.
    working_directory: relative to the input root, "" for the root itself; exists.
    timeout_s: the command is killed after this long; None means no limit.
    stdout, stderr: files the worker creates and the command writes to; outside of what the command can reach.
    max_log_bytes: a command that writes more to one of them is killed. max_output_bytes: the largest file it can write.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    workspace: Path
    working_directory: str
    timeout_s: float | None
    stdout: Path
    stderr: Path
    max_log_bytes: int = 64 << 20
    max_output_bytes: int = 32 << 30


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command used, all of its processes together; None where nobody counted.

    memory_peak_is_of_largest: the peak is that of its largest process, not of all at once.
    """

    user_cpu_s: float | None = None
    system_cpu_s: float | None = None
    memory_peak_bytes: int | None = None
    memory_peak_is_of_largest: bool = False


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a command ended. Everything it started is dead by now.

    exit_code: 0-255; 128 + N when signal N killed the command.
    timed_out: it was killed for exceeding `timeout_s`; the exit code then means nothing.
    message: one plain sentence for people when there is more to say than the exit code does; else "".
    """

    exit_code: int
    timed_out: bool = False
    message: str = ""
    usage: Usage = Usage()


class Worker(Protocol):
    """One slot. The pool gives it one run at a time."""

    @property
    def name(self) -> str:
        """Unique in the pool, stable over restarts; clients see it in the execution metadata."""

    @property
    def properties(self) -> WorkerProperties:
        """The platform properties this worker satisfies."""

    @property
    def work_dir(self) -> Path:
        """The directory under which workspaces for this worker are prepared; this worker's alone."""

    @property
    def owner(self) -> Owner | None:
        """Whom the writable parts of a workspace must belong to; None when that is the server's own user."""

    @property
    def progress(self) -> str:
        """What an image that is being pulled lacks, in words, while the worker is offline for that; else ""."""

    async def start(self) -> None:
        """Make ready to run. Raises StartupError when the worker cannot keep what its configuration promises."""

    async def run(self, run: Run) -> RunResult:
        """Run the command to its end, its deadline or our cancellation; then kill all it started.

        Raises InvalidArgument when the program does not exist or cannot be executed, WorkerFailed when the worker
        itself failed and another one may succeed. Cancelling this coroutine kills the command too.
        """

    async def check(self) -> None:
        """Prove between runs that a command could still be run. Raises WorkerFailed with the reason when not."""

    async def close(self) -> None:
        """Stop for good; nothing the worker started stays behind."""
