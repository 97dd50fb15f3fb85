"""A fresh container for one command: made for it, and removed with everything in it."""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerError
from aiodocker.stream import Message, Stream

from expbuild.config_workers import DockerWorkerConfig
from expbuild.errors import WorkerFailed, WorkerFull
from expbuild.workers import verdicts
from expbuild.workers.base import Run, RunResult
from expbuild.workers.docker_container import environment, fresh_container
from expbuild.workers.docker_daemon import Daemon, to_the_end
from expbuild.workers.docker_image import Image
from expbuild.workers.docker_program import not_executed, out_of_memory, raise_if_not_executed

_KILL_GRACE_S = 30.0
_WRITE_BATCH_BYTES = 1 << 20
_KILLED = 128 + signal.SIGKILL


class FreshContainers:
    """Runs commands, each in a container of its own.

    use_init: whether process 1 is the daemon's init; without one the command is process 1 itself, and deaf to signals
    without a handler: it can neither abort() nor kill itself.
    """

    def __init__(self, daemon: Daemon, config: DockerWorkerConfig, heartbeat_s: float) -> None:
        self.use_init = True
        self._daemon = daemon
        self._config = config
        self._heartbeat_s = heartbeat_s

    async def run(self, run: Run, image: Image) -> RunResult:
        """Run the command. (Worker.run)"""
        container = await self._daemon.create(fresh_container(self._config, image, run, use_init=self.use_init))
        try:
            return await self._run_in(container, run, image)
        finally:
            await self._daemon.remove(container)

    async def _run_in(self, container: DockerContainer, run: Run, image: Image) -> RunResult:
        expired = asyncio.Event()
        failure: Exception | None = None
        flooded = ""
        async with self._attached(container) as stream:
            await self._start(container, run, image)
            try:
                async with asyncio.TaskGroup() as tasks:
                    guards = [tasks.create_task(self._watch(container))]
                    if run.timeout_s is not None:
                        guards.append(tasks.create_task(self._kill_after(run.timeout_s, container, expired)))
                    flooded = await self._copy_output(stream, run, lambda: tasks.create_task(self._kill(container)))
                    async with self._daemon.call_within(None, "wait for the container"):  # _watch is its bound
                        await container.wait()
                    for guard in guards:
                        guard.cancel()
            except ExceptionGroup as group:
                failure = group.exceptions[0]
        if failure is not None:
            raise failure  # the others were its echo
        async with self._daemon.call("inspect the container"):
            state = (await container.show())["State"]
        if flooded:
            code = _KILLED
            return RunResult(code, message=verdicts.too_much_output(flooded, run.max_log_bytes, exit_code=code))
        if expired.is_set():
            return RunResult(state["ExitCode"], timed_out=True, message=verdicts.timed_out(run))
        if state["OOMKilled"]:
            return RunResult(state["ExitCode"], message=out_of_memory(self._config.memory_limit))
        if state["ExitCode"] == _KILLED and await self._daemon.has_killed(container, state):
            raise WorkerFailed("the container was killed from outside, or the Docker daemon is shutting down")
        if state["ExitCode"] in (1, 126, 127):
            await asyncio.to_thread(raise_if_not_executed, run, environment(run, image)["PATH"])
        return RunResult(state["ExitCode"])

    async def _start(self, container: DockerContainer, run: Run, image: Image) -> None:
        async with self._daemon.call("start the container"):
            try:
                await container.start()
            except DockerError as error:
                if not self.use_init and 'exec: "' in error.message:
                    reason = error.message.rpartition('": ')[2].removesuffix(": unknown")
                    raise not_executed(run, environment(run, image)["PATH"], reason) from error
                raise

    async def _kill_after(self, timeout_s: float, container: DockerContainer, expired: asyncio.Event) -> None:
        """Kill the container at the deadline; raise WorkerFailed if it does not die of it."""
        await asyncio.sleep(timeout_s)
        expired.set()
        await self._kill(container)
        await asyncio.sleep(_KILL_GRACE_S)
        raise WorkerFailed(f"a container is still there {_KILL_GRACE_S:g} s after it was killed")

    async def _kill(self, container: DockerContainer) -> None:
        async with self._daemon.call("kill the container"):
            try:
                await container.kill()
            except DockerError as error:
                if error.status not in (404, 409):  # it has ended at the same moment
                    raise

    async def _watch(self, container: DockerContainer) -> None:
        """Raise WorkerFailed when the daemon stops answering, loses the container or does not tell us of its end."""
        has_ended = False
        while True:
            await asyncio.sleep(self._heartbeat_s)
            async with self._daemon.call("inspect the container"):
                is_running = (await container.show())["State"]["Running"]
            if has_ended:
                raise WorkerFailed("the Docker daemon did not deliver all the output of a container that has ended")
            has_ended = not is_running

    @asynccontextmanager
    async def _attached(self, container: DockerContainer) -> AsyncIterator[Stream]:
        """Connect to stdout and stderr; do so before the start, or the first lines are lost."""
        stream = container.attach(stdout=True, stderr=True)
        try:
            async with self._daemon.call("attach to the container"):
                await stream.__aenter__()
            yield stream
        finally:
            await stream.close()

    async def _copy_output(self, stream: Stream, run: Run, kill: Callable[[], object]) -> str:
        """Write stdout and stderr to their files until both have ended, holding at most about a MiB.

        They end with the container: its process 1 takes every other one along, so nothing in the background can
        keep them open. Calls `kill` when one of them exceeds its limit, and returns which one: "" is neither.
        """
        batch: list[Message] = []
        size_bytes = 0
        room_bytes = {1: run.max_log_bytes + 1, 2: run.max_log_bytes + 1}
        flooded = ""
        async with self._daemon.call_within(None, "deliver the output"):  # _watch is its bound
            while (message := await stream.read_out()) is not None:
                data = message.data[: room_bytes[message.stream]]
                room_bytes[message.stream] -= len(data)
                if not room_bytes[message.stream] and not flooded:
                    flooded = "stdout" if message.stream == 1 else "stderr"
                    kill()  # and go on reading: the daemon reports no end before all output is delivered
                batch.append(Message(message.stream, data))
                size_bytes += len(data)
                if size_bytes >= _WRITE_BATCH_BYTES:
                    await to_the_end(asyncio.to_thread(_append_output, run, batch))
                    batch, size_bytes = [], 0
        await to_the_end(asyncio.to_thread(_append_output, run, batch))
        return flooded


def _append_output(run: Run, messages: Sequence[Message]) -> None:
    try:
        with open(run.stdout, "ab") as stdout, open(run.stderr, "ab") as stderr:
            for message in messages:
                (stdout if message.stream == 1 else stderr).write(message.data)
    except OSError as error:
        failure = WorkerFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else WorkerFailed
        raise failure(f"cannot write the output of the command: {error.strerror}") from error
