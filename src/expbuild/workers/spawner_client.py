"""The server's side of the spawner: start it, keep it alive, run commands through it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from expbuild.errors import StartupError, WorkerFailed
from expbuild.workers import spawner as program
from expbuild.workers.base import Owner
from expbuild.workers.limits import Limits
from expbuild.workers.seqpacket import memory_file, receive, send_fds
from expbuild.workers.spawner_reaper import KILL, PATIENCE_S

log = structlog.get_logger()

CANCEL_GRACE_S = 1.0
"""What a cancelled command is given between SIGTERM and SIGKILL."""
_ANSWER_S = 30.0
"""How long the spawner may take for what takes milliseconds, on a machine that is very busy."""
_CONFIRM_S = 5.0
"""How long a cancelled run waits for the word that all is dead."""
_BOOTSTRAP = """
import os, sys, types
where = sys.argv.pop(1)
for name, path in (("expbuild", os.path.dirname(where)), ("expbuild.workers", where)):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [path]
from expbuild.workers.spawner import main
main()
"""
"""Makes the modules of the spawner importable without running what our packages import themselves."""


@dataclass(frozen=True, slots=True)
class Spawn:
    """One command for the spawner.

    environment: the whole of it, with a PATH. root, stdout, stderr, extra: open descriptors; the caller keeps and
    closes them; the extra ones are 3, 4, ... in the command. working_directory: relative to `root`, no component of
    it a symbolic link. owner: whom to run as; None for our own user. kill_grace_s: between SIGTERM and SIGKILL at the
    deadline. spare_leader: SIGTERM goes to the process group without its leader, a wrapper.
    limits: what it may use up.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    root: int
    stdout: int
    stderr: int
    working_directory: str = ""
    timeout_s: float | None = None
    owner: Owner | None = None
    kill_grace_s: float = 2.0
    extra: tuple[int, ...] = ()
    spare_leader: bool = False
    limits: Limits = field(default_factory=Limits)

    def to_spec(self) -> bytes:
        """Return what the reaper reads."""
        return json.dumps(
            {
                "argv": self.arguments,
                "env": dict(self.environment),
                "cwd": [part for part in self.working_directory.split("/") if part],
                "uid": self.owner and self.owner.uid,
                "gid": self.owner and self.owner.gid,
                "timeout_s": self.timeout_s,
                "kill_grace_s": self.kill_grace_s,
                "cancel_grace_s": CANCEL_GRACE_S,
                "spare_leader": self.spare_leader,
                "limits": dataclasses.asdict(self.limits),
            }
        ).encode()


@dataclass(frozen=True, slots=True)
class Ended:
    """The command ran and is dead, with all it started. One of `exit_code` and `signal` is set.

    The resources are those of all its processes together, `max_rss_bytes` that of the largest one (never less than
    the few MiB of the fork it began as); `memory_peak_bytes` is that of all at once, None where nobody counted.
    flooded: "stdout" or "stderr" when it was killed for writing too much there. out_of_memory: a process was killed
    because the limit was reached. limited_by: the controllers of its control group.
    """

    exit_code: int | None
    signal: int | None
    timed_out: bool
    wall_s: float
    user_cpu_s: float
    system_cpu_s: float
    max_rss_bytes: int
    flooded: str
    out_of_memory: bool
    memory_peak_bytes: int | None
    limited_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CannotExecute:
    """The program could not be executed.

    reason: missing, interpreter (missing), directory, permission, format, too_long, invalid or other.
    error: the words of the system.
    """

    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class BadWorkingDirectory:
    """The working directory could not be entered; `error` says why."""

    error: str


SpawnResult = Ended | CannotExecute | BadWorkingDirectory


class _NeverStartedError(Exception):
    """The spawner died with the request unread; it can be sent again."""


class Spawner:
    """The spawner process; serves any number of runs at once. Started again when it has died."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._socket: socket.socket | None = None
        self._sending = asyncio.Lock()
        self._controls: set[socket.socket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process id of the spawner; None while there is none."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process; otherwise the first run does. Raises StartupError."""
        async with self._sending:
            try:
                await self._connected()
            except (OSError, WorkerFailed) as error:
                raise StartupError(f"the spawner cannot be started: {error}") from error

    async def run(self, spawn: Spawn) -> SpawnResult:
        """Run a command to its end, its deadline or our cancellation; all it started is dead then.

        Raises WorkerFailed when the run was lost. When cancelled, returns to the caller once the death of the
        command is confirmed, or after a few seconds without an answer.
        """
        for _ in range(2):
            with contextlib.suppress(_NeverStartedError):
                return await self._run_once(spawn)
        raise WorkerFailed("the spawner died twice before it started the command")

    async def close(self) -> None:
        """End the process; kills what still runs, and waits for that."""
        self._closed = True
        for control in self._controls:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_WR)  # the reaper reads it as our death
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CONFIRM_S + PATIENCE_S):
                await self._idle.wait()
                if self._process is not None:
                    await self._process.wait()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self._process = None

    async def _run_once(self, spawn: Spawn) -> SpawnResult:
        with contextlib.ExitStack() as stack:
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(control)
            control.setblocking(False)
            self._controls.add(control)
            self._idle.clear()
            stack.callback(self._forget, control)
            try:
                with theirs, memory_file("expbuild-spec", spawn.to_spec()) as spec:
                    await self._send([spec, theirs.fileno(), spawn.stdout, spawn.stderr, spawn.root, *spawn.extra])
                return await self._follow(control, spawn)
            except asyncio.CancelledError:
                await _kill(control)
                raise
            except OSError as error:
                raise WorkerFailed(f"the spawner cannot be reached: {error}") from error

    def _forget(self, control: socket.socket) -> None:
        self._controls.discard(control)
        if not self._controls:
            self._idle.set()

    async def _follow(self, control: socket.socket, spawn: Spawn) -> SpawnResult:
        """Read what the reaper tells: that it has started, then how it ended."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                message = await receive(control)
        except TimeoutError as error:
            self._kill_process()  # somebody stopped it; running commands do not depend on it
            raise WorkerFailed(f"the spawner did not answer for {_ANSWER_S:g} s") from error
        if message is None and not self._closed:
            raise _NeverStartedError
        if message is not None and message["kind"] == "started":
            limit_s = None if spawn.timeout_s is None else spawn.timeout_s + spawn.kill_grace_s + _ANSWER_S
            try:
                async with asyncio.timeout(limit_s):
                    message = await receive(control)
            except TimeoutError as error:
                raise WorkerFailed("the process that watches the command did not report its deadline") from error
        if message is None or self._closed:
            raise WorkerFailed("the spawner was closed" if self._closed else "the process above the command was killed")
        return _to_result(message)

    async def _send(self, fds: list[int]) -> None:
        async with self._sending:
            for _ in range(2):
                sock = await self._connected()
                try:
                    await send_fds(sock, program.RUN, fds)
                except (BrokenPipeError, ConnectionResetError):
                    await self._drop()
                else:
                    return
        raise WorkerFailed("the spawner dies as soon as it is started")

    async def _connected(self) -> socket.socket:
        """Return the socket to a living spawner, as far as one can know."""
        if self._closed:
            raise WorkerFailed("the spawner was closed")
        if self._socket is not None and self._process is not None and self._process.returncode is None:
            return self._socket
        lost = self._process
        await self._drop()
        sock = await self._launch()
        if lost is not None:
            log.warning("spawner.restarted", exit_code=lost.returncode, pid=self.pid)
        return sock

    async def _launch(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(Path(program.__file__).parent)),
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        self._socket = ours
        return ours

    async def _drop(self) -> None:
        """Part from a spawner that has died, or hangs."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._kill_process()
        if self._process is not None:
            await self._process.wait()

    def _kill_process(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _to_result(message: dict[str, Any]) -> SpawnResult:
    match message.pop("kind"):
        case "ended":
            return Ended(**{**message, "limited_by": tuple(message["limited_by"])})
        case "cannot_exec":
            return CannotExecute(**message)
        case "working_directory":
            return BadWorkingDirectory(**message)
        case "survivors":
            raise WorkerFailed("processes of the command could not be killed")
        case _:
            raise WorkerFailed(f"the command could not be started: {message.get('error')}")


async def _kill(control: socket.socket) -> None:
    """Have the command killed; wait until it is, whatever happens to us, but not for ever."""
    with contextlib.suppress(OSError):
        control.send(KILL)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _CONFIRM_S
    end = asyncio.ensure_future(_read_to_end(control))
    while not end.done() and (left_s := deadline - loop.time()) > 0:
        with contextlib.suppress(asyncio.CancelledError):  # we are being cancelled already: our caller raises
            await asyncio.wait({end}, timeout=left_s)
    if not end.done():
        end.cancel()
        log.warning("spawner.unconfirmed", timeout_s=_CONFIRM_S)


async def _read_to_end(control: socket.socket) -> None:
    while await receive(control) is not None:
        pass
