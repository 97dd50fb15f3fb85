"""What every kind of worker is tested as: a registry of kinds, and a bench to run commands on.

A new kind adds one entry to `WORKER_KINDS`; `test_contract.py` runs on all of them. Commands use `/bin/sh` and the
usual small tools only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from expbuild.config_workers import DockerWorkerConfig, HostWorkerConfig
from expbuild.execution.input_root import create_workspace
from expbuild.workers.base import Run, RunResult, Worker
from expbuild.workers.docker import DockerWorker
from expbuild.workers.docker_daemon import LABEL
from expbuild.workers.host import HostWorker
from expbuild.workers.spawner_client import Spawner
from tests.support.docker import DockerDaemon

DAEMON = """
(setsid sh -c 'trap "" TERM HUP INT; : > ready; while :; do sleep 100; done' &) &
while [ ! -e ready ]; do :; done
"""
"""Leaves a daemon behind that has left our session and parent, and ignores what asks it to end."""

OpenWorker = Callable[[Path, pytest.FixtureRequest], AbstractAsyncContextManager[Worker]]
"""Start a worker that works in the given directory, and close it in the end; fixtures it needs come by request."""


@dataclass(frozen=True)
class Ran:
    """A command that was run: the worker's result, what it wrote, and its input root as it left it."""

    result: RunResult
    stdout: bytes
    stderr: bytes
    root: Path

    @property
    def exit_code(self) -> int:
        return self.result.exit_code


@dataclass(frozen=True)
class Input:
    """A file of the input root."""

    content: bytes = b""
    executable: bool = False


@dataclass
class Bench:
    """Runs commands on a started worker, each in a workspace of its own. `mark` is in the environment of all."""

    worker: Worker
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    runs: int = 0

    async def run(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, Input] | None = None,
        working_directory: str = "",
        timeout_s: float | None = 60.0,
    ) -> Ran:
        run = self.prepare(*arguments, env=env, files=files, working_directory=working_directory, timeout_s=timeout_s)
        result = await self.worker.run(run)
        return Ran(result, run.stdout.read_bytes(), run.stderr.read_bytes(), run.workspace / "root")

    async def sh(self, script: str, *arguments: str, **options: object) -> Ran:
        """Run a shell script."""
        return await self.run("/bin/sh", "-c", script, "sh", *arguments, **options)  # type: ignore[arg-type]

    def prepare(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, Input] | None = None,
        working_directory: str = "",
        timeout_s: float | None = 60.0,
    ) -> Run:
        """Make a workspace as the runner of actions does, and describe the run in it."""
        self.runs += 1
        workspace = self.worker.work_dir / f"run-{self.runs}"
        create_workspace(workspace, self.worker.owner)
        root = workspace / "root"
        for name, file in (files or {}).items():
            self._directories(root, Path(name).parent)
            (root / name).write_bytes(file.content)
            (root / name).chmod(0o555 if file.executable else 0o444)
        self._directories(root, Path(working_directory))
        return Run(
            arguments=arguments,
            environment={"EXPBUILD_TEST_MARK": self.mark, **(env or {})},
            workspace=workspace,
            working_directory=working_directory,
            timeout_s=timeout_s,
            stdout=workspace / "stdout",
            stderr=workspace / "stderr",
            max_log_bytes=1 << 30,
        )

    def _directories(self, root: Path, path: Path) -> None:
        for parent in (*reversed(path.parents), path):
            if not (root / parent).exists():
                (root / parent).mkdir()
                if self.worker.owner is not None:
                    os.chown(root / parent, self.worker.owner.uid, self.worker.owner.gid)

    def has_made(self, run: Run, name: str) -> bool:
        """Whether a running command has made a file in its input root, wherever the worker has put that meanwhile."""
        roots = (run.workspace / "root", *self.worker.work_dir.glob("container-*/root"))
        return any((root / name).exists() for root in roots)

    def survivors(self) -> list[str]:
        """Return the command lines of all living processes that a command of ours started."""
        return processes_with(f"EXPBUILD_TEST_MARK={self.mark}")


async def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for a state of files or other processes; they send no event."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def processes_with(variable: str) -> list[str]:
    """Return the command lines of the living processes that have `NAME=value` in their environment."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if variable.encode() in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    command = Path("/proc", name, "cmdline").read_bytes()
                    if command:  # what is dead and not reaped has none
                        found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


@contextlib.asynccontextmanager
async def open_host_worker(work_dir: Path, **config: object) -> AsyncIterator[HostWorker]:
    """Start a host worker with a spawner of its own; `config` are fields of HostWorkerConfig.

    Without namespaces, unless they are asked for.
    """
    spawner = Spawner()
    if not config.get("use_chroot"):
        config.setdefault("isolation", "uid" if os.geteuid() == 0 else "none")
    worker = HostWorker("host-0", HostWorkerConfig.model_validate({"work_dir": work_dir, **config}), 0, spawner)
    try:
        await worker.start()
        yield worker
    finally:
        await worker.close()
        await spawner.close()


@contextlib.asynccontextmanager
async def open_docker_worker(work_dir: Path, host: str, image: str, **config: object) -> AsyncIterator[DockerWorker]:
    """Start a Docker worker; `config` are fields of DockerWorkerConfig. It leaves no container behind."""
    values = {"work_dir": work_dir, "docker_host": host, "image": image, **config}
    worker = DockerWorker("docker-0", DockerWorkerConfig.model_validate(values))
    try:
        await worker.start()
        yield worker
    finally:
        await worker.close()
        assert containers_of(worker, host) == []


def containers_of(worker: DockerWorker, host: str) -> list[str]:
    """Return the ids of the containers the worker has, dead ones too."""
    label = f"label={LABEL}={worker.work_dir}"
    return DockerDaemon(host).run("ps", "--all", "--quiet", "--filter", label).split()


def _host(work_dir: Path, _: pytest.FixtureRequest) -> AbstractAsyncContextManager[Worker]:
    return open_host_worker(work_dir)


def _host_chroot(work_dir: Path, _: pytest.FixtureRequest) -> AbstractAsyncContextManager[Worker]:
    return open_host_worker(work_dir, use_chroot=True)


def _docker(work_dir: Path, request: pytest.FixtureRequest) -> AbstractAsyncContextManager[Worker]:
    daemon: DockerDaemon = request.getfixturevalue("docker")
    return open_docker_worker(work_dir, daemon.host, request.getfixturevalue("busybox_without_path"))


def _docker_warm(work_dir: Path, request: pytest.FixtureRequest) -> AbstractAsyncContextManager[Worker]:
    daemon: DockerDaemon = request.getfixturevalue("docker")
    image = request.getfixturevalue("busybox_without_path")
    return open_docker_worker(work_dir, daemon.host, image, user="1000:1000")


WORKER_KINDS = [
    pytest.param(_host, id="host"),
    pytest.param(_host_chroot, id="host-chroot"),
    pytest.param(_docker, id="docker", marks=pytest.mark.docker),
    pytest.param(_docker_warm, id="docker-warm", marks=pytest.mark.docker),
]
"""How to open each kind of worker; `pytest.param(opener, id=..., marks=...)`."""
