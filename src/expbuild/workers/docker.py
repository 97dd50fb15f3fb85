"""The Docker worker: each action in a container of its own, made for it and removed with everything in it.

The container sees the workspace at /workspace and /tmp, the configured volumes, and nothing else of this machine; its
rights are a closed list (`_host_config`) that no configuration and no image can widen. What goes wrong with the daemon
is `WorkerFailed`, never a result of the action: the worker is then offline with a reason until `start` succeeds again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import posixpath
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import structlog
from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerError
from aiodocker.stream import Message, Stream

from expbuild.config_workers import DockerWorkerConfig
from expbuild.errors import InvalidArgument, StartupError, WorkerFailed, WorkerFull
from expbuild.platform_properties import WorkerProperties, docker_properties
from expbuild.workers.base import DEFAULT_PATH, Owner, Run, RunResult
from expbuild.workers.docker_daemon import Daemon, to_the_end
from expbuild.workers.docker_image import Image, resolve_image
from expbuild.workers.docker_program import check_command, not_executed, raise_if_not_executed
from expbuild.workers.work_dir import lock_work_dir, make_work_dir, remove_tree

WORKSPACE = "/workspace"
"""Where a container sees the input root: the same for every action, so that paths in outputs do not differ."""

TMPDIR = "/tmp"
"""Where a container sees the temporary directory of its action."""

_DEFAULT_HOST = "unix:///var/run/docker.sock"
_PIDS_LIMIT = 4096
_CPU_PERIOD_US = 100_000
_KILL_GRACE_S = 30.0
_WRITE_BATCH_BYTES = 1 << 20
_PROBE = "/.expbuild-no-such-program"

_KILLED = 128 + signal.SIGKILL

log = structlog.get_logger()


class DockerWorker:
    """One slot that runs each action in a fresh container of the configured image.

    `start` raises WorkerFailed while the daemon cannot be reached or has not got the image; `offline_reason` says why
    ("" when ready), and calling `start` again is how the worker comes back. So it is after a `run` that raised
    WorkerFailed. The caller logs it.
    """

    def __init__(
        self,
        name: str,
        config: DockerWorkerConfig,
        *,
        api_timeout_s: float = 60.0,
        pull_timeout_s: float = 1800.0,
        heartbeat_s: float = 15.0,
    ) -> None:
        """Prepare a worker; nothing is touched before `start`.

        api_timeout_s bounds each call of the daemon, pull_timeout_s the pull of the image; every heartbeat_s a
        running action makes sure that the daemon still answers.
        """
        self.name = name
        self.properties: WorkerProperties = docker_properties(config.image, config.platform)
        self.work_dir: Path = config.work_dir / name
        self.offline_reason = "not started yet"
        self.progress = ""
        self._config = config
        self._daemon = Daemon(
            config.docker_host or os.environ.get("DOCKER_HOST") or _DEFAULT_HOST, str(self.work_dir), api_timeout_s
        )
        self._api_timeout_s = api_timeout_s
        self._pull_timeout_s = pull_timeout_s
        self._heartbeat_s = heartbeat_s
        self._image: Image | None = None
        self._use_init = True
        self._lock_fd: int | None = None
        self._is_wiped = False

    @property
    def owner(self) -> Owner | None:
        """Whom containers run as; None when that is the server's own user, and until `start` has succeeded."""
        if self._image is None:
            return None
        return None if self._image.uid == os.geteuid() else Owner(self._image.uid, self._image.gid)

    async def start(self) -> None:
        """Connect to the daemon, remove what an earlier process left, get the image and try a container.

        Safe to call again at any time between runs. Raises WorkerFailed with the reason when the worker stays
        offline, StartupError when trying again cannot help.
        """
        try:
            self._image = await self._make_ready()
        except WorkerFailed as error:
            self.offline_reason = str(error)
            raise
        self.offline_reason = ""
        log.info("image.ready", worker=self.name, image=self._config.image, image_id=self._image.id)

    async def run(self, run: Run) -> RunResult:
        """Run the command in a container of its own. (Worker.run)"""
        check_command(run)
        try:
            if self._image is None:
                raise WorkerFailed(self.offline_reason)
            if self._daemon.has_leftovers:  # nothing runs beside what could not be removed
                await self._daemon.remove_leftovers()
            return await self._run(run, self._image)
        except WorkerFailed as error:
            self.offline_reason = str(error)
            raise

    async def check(self) -> None:
        """See Worker: the daemon must answer."""
        await self._check_daemon()

    async def close(self) -> None:
        """Remove what may be left and disconnect. Takes no longer than the daemon's time limit."""
        with suppress(WorkerFailed):
            await self._daemon.close()
        if self._lock_fd is not None:
            await asyncio.to_thread(remove_tree, self.work_dir)
            os.close(self._lock_fd)
            self._lock_fd = None

    # ---- getting ready ---------------------------------------------------------------------------------------

    async def _make_ready(self) -> Image:
        for volume in self._config.volumes:
            if str(volume.container_path) in (WORKSPACE, TMPDIR):
                raise StartupError(f"worker {self.name}: volumes: {volume.container_path} belongs to the action")
        if self._lock_fd is None:
            self._lock_fd = await asyncio.to_thread(self._lock)
        try:
            await self._daemon.connect()
        except ValueError as error:
            raise StartupError(
                f"worker {self.name}: not the address of a Docker daemon: {self._daemon.host}"
            ) from error
        await self._check_daemon()
        if count := await self._daemon.remove_leftovers():
            log.warning("worker.leftovers_removed", worker=self.name, containers=count)
        if not self._is_wiped:  # now that nothing is at work in it any more
            await asyncio.to_thread(self._wipe)
            self._is_wiped = True
        self.progress = f"the image {self._config.image} is being looked up, and pulled where it is missing"
        try:
            image = await resolve_image(self._daemon, self._config, self._image, self._pull_timeout_s)
        finally:
            self.progress = ""
        await self._try_container(image)
        return image

    def _lock(self) -> int:
        try:
            make_work_dir(self._config.work_dir, 0o711)
            return lock_work_dir(self.work_dir)
        except OSError as error:
            raise StartupError(f"work_dir {self.work_dir}: {error.strerror or error}") from error

    def _wipe(self) -> None:
        try:
            remove_tree(self.work_dir)
            self.work_dir.mkdir(0o700)
        except OSError as error:
            raise StartupError(f"work_dir {self.work_dir}: {error.strerror or error}") from error

    async def _check_daemon(self) -> None:
        """Raise WorkerFailed unless the daemon answers and can keep the configured limits."""
        async with self._daemon.call("describe itself"):
            info = await self._daemon.client.system.info()
        if info.get("OSType", "linux") != "linux":
            raise WorkerFailed(f"the Docker daemon runs {info['OSType']} containers, not linux")
        if self._config.memory_limit is not None and not info.get("MemoryLimit", True):
            raise WorkerFailed("the kernel under the Docker daemon cannot limit memory (memory_limit)")
        if self._config.cpu_limit is not None and not info.get("CpuCfsQuota", True):
            raise WorkerFailed("the kernel under the Docker daemon cannot limit processor time (cpu_limit)")

    async def _try_container(self, image: Image) -> None:
        """Start a container for a program that no image has, and see that exactly this is reported.

        So limits, mounts, user, network and runtime are known to work, whatever programs the image contains, and
        whether the daemon has an init whose words we understand; without one we do without (a command that is
        process 1 is deaf to signals without a handler: it can neither abort() nor kill itself).
        """
        workspace = self.work_dir / "self-test"
        run = Run((_PROBE,), {}, workspace, "", self._api_timeout_s, workspace / "stdout", workspace / "stderr")
        try:
            await asyncio.to_thread(_make_workspace, workspace)
            for use_init in (True, False):
                self._use_init = use_init
                try:
                    result = await self._run(run, image)
                except InvalidArgument:
                    return
                except WorkerFailed as error:
                    if not use_init or "docker-init" not in str(error):
                        raise
                    log.warning("worker.without_init", worker=self.name, reason=str(error))
                else:
                    log.warning("worker.without_init", worker=self.name, exit_code=result.exit_code)
            raise WorkerFailed("the Docker daemon does not report programs that do not exist")
        finally:
            await asyncio.to_thread(remove_tree, workspace)

    # ---- one run ---------------------------------------------------------------------------------------------

    async def _run(self, run: Run, image: Image) -> RunResult:
        try:
            container = await self._daemon.create(self._container_config(run, image))
            return await self._run_in(container, run, image)
        finally:
            await self._daemon.remove_created()

    async def _run_in(self, container: DockerContainer, run: Run, image: Image) -> RunResult:
        expired = asyncio.Event()
        failure: Exception | None = None
        async with self._attached(container) as stream:
            await self._start_container(container, run, image)
            try:
                async with asyncio.TaskGroup() as tasks:
                    guards = [tasks.create_task(self._watch(container))]
                    if run.timeout_s is not None:
                        guards.append(tasks.create_task(self._kill_after(run.timeout_s, container, expired)))
                    await self._copy_output(stream, run)
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
        if expired.is_set():
            return RunResult(state["ExitCode"], timed_out=True, message=f"timed out after {run.timeout_s:g} s")
        if state["OOMKilled"]:
            return RunResult(state["ExitCode"], message=self._out_of_memory())
        if state["ExitCode"] == _KILLED and await self._daemon.has_killed(container, state):
            raise WorkerFailed("the container was killed from outside, or the Docker daemon is shutting down")
        if state["ExitCode"] in (1, 126, 127):
            await asyncio.to_thread(raise_if_not_executed, run, self._environment(run, image)["PATH"])
        return RunResult(state["ExitCode"])

    def _out_of_memory(self) -> str:
        limit = self._config.memory_limit
        return "out of memory" if limit is None else f"out of memory: the limit is {limit} bytes"

    async def _start_container(self, container: DockerContainer, run: Run, image: Image) -> None:
        async with self._daemon.call("start the container"):
            try:
                await container.start()
            except DockerError as error:
                if not self._use_init and 'exec: "' in error.message:
                    reason = error.message.rpartition('": ')[2].removesuffix(": unknown")
                    raise not_executed(run, self._environment(run, image)["PATH"], reason) from error
                raise

    async def _kill_after(self, timeout_s: float, container: DockerContainer, expired: asyncio.Event) -> None:
        """Kill the container at the deadline; raise WorkerFailed if it does not die of it."""
        await asyncio.sleep(timeout_s)
        expired.set()
        async with self._daemon.call("kill the container"):
            try:
                await container.kill()
            except DockerError as error:
                if error.status not in (404, 409):  # it has ended at the same moment
                    raise
        await asyncio.sleep(_KILL_GRACE_S)
        raise WorkerFailed(f"a container is still there {_KILL_GRACE_S:g} s after it was killed")

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

    async def _copy_output(self, stream: Stream, run: Run) -> None:
        """Write stdout and stderr to their files until both have ended, holding at most about a MiB.

        They end with the container: its process 1 takes every other one along, so nothing in the background can
        keep them open.
        """
        batch: list[Message] = []
        size_bytes = 0
        async with self._daemon.call_within(None, "deliver the output"):  # _watch is its bound
            while (message := await stream.read_out()) is not None:
                batch.append(message)
                size_bytes += len(message.data)
                if size_bytes >= _WRITE_BATCH_BYTES:
                    await to_the_end(asyncio.to_thread(_append_output, run, batch))
                    batch, size_bytes = [], 0
        await to_the_end(asyncio.to_thread(_append_output, run, batch))

    def _environment(self, run: Run, image: Image) -> dict[str, str]:
        """What we set; the image's own variables lie below."""
        return {"PATH": image.path or DEFAULT_PATH, "TMPDIR": TMPDIR, **run.environment}

    def _container_config(self, run: Run, image: Image) -> dict[str, Any]:
        return {
            "Image": image.id,
            "Entrypoint": list(run.arguments),  # not Cmd: the image's own entry point would come before it
            "Cmd": [],
            "Env": [f"{name}={value}" for name, value in self._environment(run, image).items()],
            "WorkingDir": posixpath.join(WORKSPACE, run.working_directory),
            "StopSignal": "SIGKILL",  # whoever ends it early leaves no result that could pass for one
            "User": f"{image.uid}:{image.gid}",
            # Constant, as it is part of the environment. Without a network only "localhost" resolves.
            "Hostname": "localhost" if self._config.network_mode == "none" else "expbuild",
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": self._host_config(run.workspace),
        }

    def _host_config(self, workspace: Path) -> dict[str, Any]:
        config = self._config
        mounts = [
            _bind(workspace / "root", WORKSPACE, read_only=False),
            _bind(workspace / "tmp", TMPDIR, read_only=False),
            *(_bind(v.host_path, str(v.container_path), read_only=v.read_only) for v in config.volumes),
        ]
        limits: dict[str, Any] = {"PidsLimit": _PIDS_LIMIT}
        if config.memory_limit is not None:
            limits |= {"Memory": config.memory_limit, "MemorySwap": config.memory_limit}
        if config.cpu_limit is not None:  # not NanoCpus: it is refused on machines with fewer cores
            limits |= {"CpuPeriod": _CPU_PERIOD_US, "CpuQuota": round(config.cpu_limit * _CPU_PERIOD_US)}
        return {
            "AutoRemove": False,  # the state has to be read before it goes
            "CapDrop": ["ALL"],
            "Init": self._use_init,
            "IpcMode": "private",
            "LogConfig": {"Type": "none"},
            "Mounts": mounts,
            "NetworkMode": config.network_mode,
            "Privileged": False,
            "RestartPolicy": {"Name": "no"},
            "SecurityOpt": ["no-new-privileges"],
            **limits,
        }


def _make_workspace(path: Path) -> None:
    remove_tree(path)
    path.mkdir(0o711)
    for name in ("root", "tmp"):
        (path / name).mkdir(0o755)


def _append_output(run: Run, messages: Sequence[Message]) -> None:
    try:
        with open(run.stdout, "ab") as stdout, open(run.stderr, "ab") as stderr:
            for message in messages:
                (stdout if message.stream == 1 else stderr).write(message.data)
    except OSError as error:
        failure = WorkerFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else WorkerFailed
        raise failure(f"cannot write the output of the command: {error.strerror}") from error


def _bind(source: Path, target: str, *, read_only: bool) -> dict[str, Any]:
    """Return a mount. (Unlike an entry of `Binds` it may contain colons, and its source is never created.)"""
    return {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": read_only}
