"""The Docker worker: actions in containers, in a warm one that runs many or a fresh one for each.

A container sees the workspace at /workspace and /tmp, the configured volumes, and nothing else of this machine; its
rights are a closed list (`docker_container`) that no configuration and no image can widen. What goes wrong with the
daemon is `WorkerFailed`, never a result of the action: the worker is then offline with a reason until `start` succeeds
again.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import structlog

from expbuild.config_workers import DockerWorkerConfig
from expbuild.errors import InvalidArgument, StartupError, WorkerFailed
from expbuild.platform_properties import WorkerProperties, docker_properties
from expbuild.workers import verdicts
from expbuild.workers.base import Owner, Run, RunResult
from expbuild.workers.docker_container import RESERVED
from expbuild.workers.docker_daemon import Daemon, to_the_end
from expbuild.workers.docker_dropper import can_drop
from expbuild.workers.docker_fresh import FreshContainers
from expbuild.workers.docker_image import Image, resolve_image
from expbuild.workers.docker_program import check_command
from expbuild.workers.docker_warm import NotReusable, WarmContainer
from expbuild.workers.work_dir import lock_work_dir, make_work_dir, remove_tree

_DEFAULT_HOST = "unix:///var/run/docker.sock"
_PROBE = "/.expbuild-no-such-program"

log = structlog.get_logger()


class DockerWorker:
    """One slot that runs actions in containers of the configured image.

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
        self._fresh = FreshContainers(self._daemon, config, heartbeat_s)
        self._warm: WarmContainer | None = None
        self._not_reusable: dict[str, str] = {}  # by the id of the image: why its containers cannot be kept
        self._containers = 0
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
        """Run the command in a container. (Worker.run)"""
        check_command(run)
        try:
            if self._image is None:
                raise WorkerFailed(self.offline_reason)
            if self._daemon.has_leftovers:  # nothing runs beside what could not be removed
                await self._daemon.remove_leftovers()
                await self._discard_warm()
            result = await self._run(run, self._image)
        except WorkerFailed as error:
            self.offline_reason = str(error)
            raise
        if result.exit_code and not result.message and (said := verdicts.disk_full(run.workspace)):
            return replace(result, message=said)
        return result

    async def check(self) -> None:
        """See Worker: the daemon must answer."""
        await self._check_daemon()

    async def close(self) -> None:
        """Remove what may be left and disconnect. Takes no longer than the daemon's time limit."""
        with suppress(WorkerFailed):
            await self._discard_warm()
        with suppress(WorkerFailed):
            await self._daemon.close()
        if self._lock_fd is not None:
            await asyncio.to_thread(remove_tree, self.work_dir)
            os.close(self._lock_fd)
            self._lock_fd = None

    # ---- getting ready ---------------------------------------------------------------------------------------

    async def _make_ready(self) -> Image:
        for volume in self._config.volumes:
            if str(volume.container_path) in RESERVED:
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
        await self._discard_warm()
        if not self._is_wiped:  # now that nothing is at work in it any more
            await asyncio.to_thread(self._wipe)
            self._is_wiped = True
        self.progress = f"the image {self._config.image} is being looked up, and pulled where it is missing"
        try:
            image = await resolve_image(self._daemon, self._config, self._image, self._pull_timeout_s)
        finally:
            self.progress = ""
        await self._try_container(image)
        await self._warm_container(image)
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
                self._fresh.use_init = use_init
                try:
                    result = await self._fresh.run(run, image)
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
        warm = await self._warm_container(image)
        if warm is None:
            return await self._fresh.run(run, image)
        return await warm.run(run)

    async def _warm_container(self, image: Image) -> WarmContainer | None:
        """Return a container that runs commands one after the other; None where that cannot be."""
        warm = self._warm
        if warm is not None:
            await warm.settled()
            is_spent = warm.has_ended or warm.runs >= self._config.actions_per_container
            if not (warm.doubt or is_spent) and warm.image == image:
                return warm
            if warm.doubt or warm.has_ended:
                log.info("container.renewed", worker=self.name, reason=warm.doubt or "it ended", runs=warm.runs)
            await self._discard_warm()
        if not self._config.reuse or self._cannot_reuse(image):
            return None
        self._containers += 1
        warm = self._warm = WarmContainer(
            self._daemon,
            self._config,
            image,
            self.work_dir / f"container-{self._containers}",
            use_init=self._fresh.use_init,
            ready_timeout_s=self._api_timeout_s,
            heartbeat_s=self._heartbeat_s,
        )
        try:
            await warm.open()
        except NotReusable as error:
            self._not_reusable[image.id] = str(error)
            log.warning("image.not_reusable", worker=self.name, image_id=image.id, reason=str(error))
        except BaseException:
            await self._discard_warm()
            raise
        else:
            return warm
        await self._discard_warm()
        return None

    def _cannot_reuse(self, image: Image) -> bool:
        if image.uid == 0:
            reason = "commands run as root, who could tamper with what starts the next one; set user to another"
        elif not can_drop():
            reason = "there is no agent for this processor"
        else:
            return image.id in self._not_reusable
        if image.id not in self._not_reusable:
            self._not_reusable[image.id] = reason
            log.warning("image.not_reusable", worker=self.name, image_id=image.id, reason=reason)
        return True

    async def _discard_warm(self) -> None:
        warm, self._warm = self._warm, None
        if warm is not None:
            await to_the_end(warm.close())


def _make_workspace(path: Path) -> None:
    remove_tree(path)
    path.mkdir(0o711)
    for name in ("root", "tmp"):
        (path / name).mkdir(0o755)
