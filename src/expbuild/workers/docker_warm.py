"""A warm container: it runs one command after the other, and is thrown away at the first doubt.

Between two commands everything the first one started is killed, its files are moved out, and what it may have left is
looked for: files outside /workspace and /tmp, shared memory, semaphores, message queues. Any of these, a timeout, a
cancellation, or processes killed for want of memory end the container.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from aiodocker.containers import DockerContainer
from aiodocker.stream import Stream

from expbuild.config_workers import DockerWorkerConfig
from expbuild.errors import WorkerFailed
from expbuild.workers import verdicts
from expbuild.workers.base import Run, RunResult
from expbuild.workers.docker_agent import Reply, agent_command, command_script, raise_if_agent_complained
from expbuild.workers.docker_container import WORKSPACE, environment, hostname, warm_container
from expbuild.workers.docker_daemon import Daemon, to_the_end
from expbuild.workers.docker_dropper import dropper
from expbuild.workers.docker_image import Image
from expbuild.workers.docker_output import OutputPipe
from expbuild.workers.docker_program import out_of_memory
from expbuild.workers.work_dir import remove_tree

_KILLED = 128 + 9
_MAX_LINE_BYTES = 4096

log = structlog.get_logger()


class NotReusable(Exception):
    """The agent does not work in containers of this image, for example because there is no shell."""


class WarmContainer:
    """One container of an image, from `open` to `close`; one command at a time.

    directory: its own, beside the workspaces, so that moving files between them costs nothing.
    """

    def __init__(
        self,
        daemon: Daemon,
        config: DockerWorkerConfig,
        image: Image,
        directory: Path,
        *,
        use_init: bool,
        ready_timeout_s: float,
        heartbeat_s: float,
    ) -> None:
        self.image = image
        self.runs = 0
        self.doubt = ""
        """Why no command may be run in it any more; "" when one may."""
        self.has_ended = False
        """Whether the agent is known to be gone, and the container with it."""
        self._daemon = daemon
        self._config = config
        self._directory = directory
        self._use_init = use_init
        self._ready_timeout_s = ready_timeout_s
        self._heartbeat_s = heartbeat_s
        self._container: DockerContainer | None = None
        self._stream: Stream | None = None
        self._pipes: tuple[OutputPipe, ...] = ()
        self._listening: asyncio.Task[None] | None = None
        self._line: asyncio.Future[bytes] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._original: frozenset[str] = frozenset()

    async def open(self) -> None:
        """Start the container and its agent. Raises NotReusable, WorkerFailed; `close` is due in any case."""
        await asyncio.to_thread(self._make_directory)
        agent = agent_command(self.image.uid, has_init=self._use_init)
        settings = warm_container(self._config, self.image, self._directory, agent, use_init=self._use_init)
        container = self._container = await self._daemon.create(settings)
        self._stream = container.attach(stdin=True, stdout=True, stderr=True)
        async with self._daemon.call("attach to the container"):
            await self._stream.__aenter__()
        line = self._expect_line()
        self._listening = asyncio.create_task(self._listen(self._stream))
        try:
            async with self._daemon.call("start the container"):
                await container.start()
            async with asyncio.timeout(self._ready_timeout_s):
                is_ready = await line == b"ready"
        except WorkerFailed as error:
            if "/bin/sh" not in str(error):
                raise
            is_ready = False
        except TimeoutError as error:
            raise WorkerFailed(f"a container was not ready within {self._ready_timeout_s:g} s") from error
        if not is_ready:
            raise NotReusable("its containers cannot run the agent: that takes /bin/sh and env")
        self._original = await self._daemon.changes(container)

    async def run(self, run: Run) -> RunResult:
        """Run a command. (Worker.run) Only after `settled`, and when there is no `doubt`."""
        self.runs += 1
        self.doubt = "a command is running in it"
        is_over = False
        try:
            await to_the_end(asyncio.to_thread(self._enter, run))
            result, self.doubt = await self._execute(run)
            is_over = True
        finally:
            await to_the_end(self._leave(run, is_over))
        self._settling = asyncio.create_task(self._settle())
        await asyncio.to_thread(raise_if_agent_complained, run, result.exit_code, environment(run, self.image)["PATH"])
        return result

    async def settled(self) -> None:
        """Wait until it is known whether the last command left anything behind."""
        if self._settling is not None:
            await asyncio.wait([self._settling])
            self._settling = None

    async def close(self) -> None:
        """Remove the container and its directory."""
        await self.settled()
        if self._stream is not None:
            await self._stream.close()
        if self._container is not None and not await self._daemon.remove(self._container):
            return  # what runs there may still write to the directory
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])
        for pipe in self._pipes:
            pipe.close()
        self._pipes = ()
        await asyncio.to_thread(remove_tree, self._directory)

    # ---- one run ---------------------------------------------------------------------------------------------

    async def _execute(self, run: Run) -> tuple[RunResult, str]:
        """Return the result, and what is doubtful about the container after it."""
        assert self._stream is not None
        flooded: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        for pipe, target in zip(self._pipes, (run.stdout, run.stderr), strict=True):
            pipe.start(target, run.max_log_bytes, partial(_set, flooded, target.name))
        line = self._expect_line()
        async with self._daemon.call("pass on a command"):
            with suppress(AssertionError, RuntimeError):  # aiodocker's words for a lost connection: `line` will tell
                await self._stream.write_in(b"%d\n" % self.runs)
        watching = asyncio.create_task(self._watch())
        try:
            any_of: list[asyncio.Future[Any]] = [line, flooded, watching]
            await asyncio.wait(any_of, timeout=run.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if flooded.done():
                said = verdicts.too_much_output(flooded.result(), run.max_log_bytes, exit_code=_KILLED)
                return RunResult(_KILLED, message=said), "too much output"
            if watching.done():
                watching.result()
            if not line.done():
                return RunResult(_KILLED, timed_out=True, message=verdicts.timed_out(run)), "timeout"
        finally:
            watching.cancel()
        return await self._result(line.result())

    async def _result(self, line: bytes) -> tuple[RunResult, str]:
        reply = Reply.parse(line)
        if reply is None or reply.number != self.runs:
            await self._raise_unless_out_of_memory()
            return RunResult(_KILLED, message=out_of_memory(self._config.memory_limit)), "it ended"
        if reply.oom_kills:
            return RunResult(reply.exit_code, message=out_of_memory(self._config.memory_limit)), "out of memory"
        return RunResult(reply.exit_code), "shared memory was left in it" if reply.has_leftovers else ""

    async def _raise_unless_out_of_memory(self) -> None:
        """Raise WorkerFailed when the agent's end has any other reason than that there was no memory left for it."""
        assert self._container is not None
        async with self._daemon.call("inspect the container"):
            state = (await self._container.show())["State"]
        if not state["OOMKilled"]:
            raise WorkerFailed("the container ended under its command: it was stopped from outside, or its agent died")

    async def _watch(self) -> None:
        """Raise WorkerFailed when the daemon stops answering, or the container is not running."""
        assert self._container is not None
        while True:
            await asyncio.sleep(self._heartbeat_s)
            async with self._daemon.call("inspect the container"):
                state = (await self._container.show())["State"]
            if not state["Running"] and not state["OOMKilled"]:
                raise WorkerFailed("the container ended under its command")

    async def _leave(self, run: Run, is_over: bool) -> None:
        """See that everything is dead, then give the files back to the workspace."""
        if self.doubt:
            assert self._container is not None
            is_dead = await self._daemon.remove(self._container)
            if not is_dead and is_over:
                raise WorkerFailed("a container could not be removed; what its command started may still be running")
        for pipe in self._pipes:
            pipe.finish()
        await asyncio.to_thread(_move_children, self._directory / "root", run.workspace / "root")

    async def _settle(self) -> None:
        """Make the container as good as new, or say what is doubtful about it."""
        if self.doubt:
            return
        assert self._container is not None
        try:
            await asyncio.to_thread(self._empty)
            if found := await self._daemon.changes(self._container) - self._original:
                self.doubt = f"{min(found)} was changed"
        except (WorkerFailed, OSError) as error:
            self.doubt = str(error)

    # ---- the agent's words -----------------------------------------------------------------------------------

    def _expect_line(self) -> asyncio.Future[bytes]:
        self._line = asyncio.get_running_loop().create_future()
        if self.has_ended:
            self._say(b"")
        return self._line

    async def _listen(self, stream: Stream) -> None:
        """Hand each line of the agent to who expects it; b"" when there will be no more."""
        received = b""
        with suppress(Exception):  # however the connection ends: that is all there is to know
            while (message := await stream.read_out()) is not None:
                if message.stream != 1:
                    continue
                received += message.data
                *lines, received = received.split(b"\n")
                received = received[:_MAX_LINE_BYTES]
                for line in lines:
                    self._say(line)
        self.has_ended = True
        self._say(b"")

    def _say(self, line: bytes) -> None:
        if self._line is not None and not self._line.done():
            self._line.set_result(line)

    # ---- files -----------------------------------------------------------------------------------------------

    def _make_directory(self) -> None:
        remove_tree(self._directory)
        self._directory.mkdir(0o711)
        for name in ("root", "tmp", "agent"):
            (self._directory / name).mkdir(0o755)
        agent = self._directory / "agent"
        (agent / "drop").write_bytes(dropper(self.image.uid, self.image.gid))
        (agent / "drop").chmod(0o555)
        self._pipes = (OutputPipe(agent / "stdout"), OutputPipe(agent / "stderr"))
        self._empty()

    def _empty(self) -> None:
        """Empty /tmp and reset what a command can do to the two directories themselves."""
        tmp = self._directory / "tmp"
        for entry in list(os.scandir(tmp)):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))
            else:
                os.unlink(entry.path)
        for name in ("root", "tmp"):
            directory = self._directory / name
            for attribute in os.listxattr(directory):  # a default ACL, for example
                os.removexattr(directory, attribute)
            directory.chmod(0o755)
            os.chown(directory, self.image.uid, self.image.gid)

    def _enter(self, run: Run) -> None:
        variables = {"HOSTNAME": hostname(self._config), **self.image.variables, **environment(run, self.image)}
        script = self._directory / "agent" / "command"
        script.unlink(missing_ok=True)
        script.write_bytes(command_script(run, variables, WORKSPACE))
        script.chmod(0o444)
        _move_children(run.workspace / "root", self._directory / "root")


def _set(future: asyncio.Future[str], value: str) -> None:
    if not future.done():
        future.set_result(value)


def _move_children(source: Path, target: Path) -> None:
    """Move everything in one directory to another of the same file system; nothing is at work in either."""
    for name in os.listdir(source):
        os.rename(source / name, target / name)
