"""The host worker: commands run as processes of this machine, started and ended by the spawner."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import assert_never

import structlog

from expbuild.config_workers import HostWorkerConfig
from expbuild.errors import InvalidArgument, StartupError, WorkerFailed, WorkerFull
from expbuild.platform_properties import WorkerProperties, host_properties
from expbuild.workers import verdicts
from expbuild.workers.base import DEFAULT_PATH, Owner, Run, RunResult, Usage
from expbuild.workers.identity import resolve_owner
from expbuild.workers.isolation import SELF_TEST, Level, levels_to_try
from expbuild.workers.limits import Limits
from expbuild.workers.sandbox import TMPDIR, Sandbox, refusal, without_mount_points
from expbuild.workers.seqpacket import memory_file
from expbuild.workers.spawner_client import BadWorkingDirectory, CannotExecute, Ended, Spawn, Spawner, SpawnResult
from expbuild.workers.work_dir import lock_work_dir, make_work_dir, remove_tree

_SELF_TEST_S = 60.0
log = structlog.get_logger()


class HostWorker:
    """One slot of a host worker.

    slot: counts all host slots of the server, from 0; decides which user the slot gets when none is configured.
    spawner: shared by all slots; the caller closes it, after them.
    """

    def __init__(self, name: str, config: HostWorkerConfig, slot: int, spawner: Spawner) -> None:
        self._name = name
        self._config = config
        self._slot = slot
        self._spawner = spawner
        self._properties = host_properties(config.platform)
        self._owner: Owner | None = None
        self._sandbox: Sandbox | None = None
        self._level: Level = "none"
        self._lock_fd: int | None = None

    @property
    def name(self) -> str:
        """See Worker."""
        return self._name

    @property
    def properties(self) -> WorkerProperties:
        """See Worker."""
        return self._properties

    @property
    def work_dir(self) -> Path:
        """See Worker. Its group is the action's, who can pass through but not list it."""
        return self._config.work_dir / self._name

    @property
    def owner(self) -> Owner | None:
        """See Worker. Known after `start`."""
        return self._owner

    @property
    def progress(self) -> str:
        """See Worker: there is no image."""
        return ""

    async def start(self) -> None:
        """Prepare the work directory, remove what an earlier server left in it, and prove that commands run.

        Of the levels of isolation that the configuration allows, the first that can be proven is taken. Can be called
        again, after a failure; the directory is then left as it is. Raises StartupError.
        """
        levels = levels_to_try(self._config)
        if self._lock_fd is None:
            await asyncio.to_thread(self._prepare)
        reasons = []
        for level in levels:
            try:
                self._sandbox = self._make_sandbox() if level == "namespaces" else None
                await self._prove(level)
            except StartupError as error:
                if level == levels[-1]:
                    raise
                reasons.append(f"not {level}: {error}")
            else:
                self._level = level
                log.info("worker.isolated", worker=self._name, isolation=level, reason="; ".join(reasons))
                return

    async def run(self, run: Run) -> RunResult:
        """See Worker."""
        if self._config.chroot_root is None:
            return await self._run(run, input_is_root=False)
        with without_mount_points(run.workspace / "root"):
            return await self._run(run, input_is_root=True)

    async def _run(self, run: Run, *, input_is_root: bool) -> RunResult:
        environment = self._environment(run)
        with contextlib.ExitStack() as files:
            try:
                stdout, stderr = (
                    files.enter_context(_output_file(path, self._owner)) for path in (run.stdout, run.stderr)
                )
                root = files.enter_context(_opened(run.workspace / "root", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW))
            except OSError as error:
                raise _disk_error(error) from error
            spawn = Spawn(
                arguments=run.arguments,
                environment=environment,
                root=root,
                stdout=stdout,
                stderr=stderr,
                working_directory=run.working_directory,
                timeout_s=run.timeout_s,
                owner=self._owner,
                limits=self._limits(run),
            )
            result = await (
                self._spawner.run(spawn) if self._sandbox is None else self._run_sandboxed(run, spawn, input_is_root)
            )
        return self._to_run_result(run, environment["PATH"], result)

    async def check(self) -> None:
        """See Worker: it must be able to start a process, and to write into its directory."""
        try:
            await self._prove(self._level)
        except (StartupError, OSError) as error:
            raise WorkerFailed(str(error)) from error

    async def close(self) -> None:
        """Remove the work directory. Called when no run is in progress and all workspaces are gone."""
        if self._lock_fd is not None:
            await asyncio.to_thread(remove_tree, self.work_dir)
            os.close(self._lock_fd)
            self._lock_fd = None

    async def _run_sandboxed(self, run: Run, spawn: Spawn, input_is_root: bool) -> SpawnResult:
        assert self._sandbox is not None
        wrapped = self._sandbox.wrap(run, spawn.environment, input_is_root=input_is_root)
        with memory_file("expbuild-options", wrapped.options) as options, memory_file("expbuild-report") as report:
            result = await self._spawner.run(
                dataclasses.replace(
                    spawn,
                    arguments=wrapped.arguments,
                    environment={"PATH": DEFAULT_PATH},
                    extra=(options, report),
                    spare_leader=True,
                )
            )
            match result:
                case CannotExecute() if result.reason != "too_long":
                    raise WorkerFailed(f"bubblewrap cannot be executed: {result.error}")
                case Ended() if not result.timed_out and result.signal is None:
                    return refusal(os.pread(report, 65536, 0), run.stderr) or result
                case _:
                    return result

    def _environment(self, run: Run) -> dict[str, str]:
        """The whole environment of a command: our defaults, what is whitelisted, and its own on top."""
        tmpdir = TMPDIR if self._sandbox is not None else str(run.workspace / "tmp")
        passed_on = {name: os.environ[name] for name in self._config.env_whitelist if name in os.environ}
        return {"PATH": DEFAULT_PATH, "TMPDIR": tmpdir, **passed_on, **run.environment}

    def _limits(self, run: Run) -> Limits:
        config = self._config
        return Limits(
            memory_bytes=config.memory_limit,
            cpus=config.cpu_limit,
            processes=config.max_processes,
            own_user=self._owner is not None and config.run_as_user is None,
            open_files=config.max_open_files,
            file_bytes=run.max_output_bytes,
            stream_bytes=run.max_log_bytes,
        )

    def _to_run_result(self, run: Run, path: str, result: SpawnResult) -> RunResult:
        match result:
            case Ended():
                code = 128 + result.signal if result.signal is not None else result.exit_code
                assert code is not None  # one of them is set
                return RunResult(code, result.timed_out, self._verdict(run, result, code), _usage(result))
            case CannotExecute():
                raise InvalidArgument(_why_not(run, path, result))
            case BadWorkingDirectory():
                raise InvalidArgument(
                    f"the working directory {run.working_directory!r} cannot be entered: {result.error}"
                )
            case _:
                assert_never(result)

    def _verdict(self, run: Run, result: Ended, code: int) -> str:
        """Say how the command ended when its exit code does not."""
        if result.flooded:
            return verdicts.too_much_output(result.flooded, run.max_log_bytes, exit_code=code)
        if result.timed_out:
            return verdicts.timed_out(run)
        if result.signal is None and result.exit_code == 0:
            return ""
        if result.out_of_memory and self._config.memory_limit is not None:
            return verdicts.out_of_memory(self._config.memory_limit, result.memory_peak_bytes)
        reasons = [verdicts.killed_by(result.signal, file_bytes=run.max_output_bytes)] if result.signal else []
        return "; ".join([*reasons, *filter(None, [verdicts.disk_full(run.workspace)])])

    def _prepare(self) -> None:
        self._owner = resolve_owner(self._config, self._slot)
        try:
            make_work_dir(self._config.work_dir, 0o711)
            lock_fd = lock_work_dir(self.work_dir)
            try:
                remove_tree(self.work_dir)
                self.work_dir.mkdir(0o700)
                if self._owner is not None:
                    os.chown(self.work_dir, -1, self._owner.gid)
                    self.work_dir.chmod(0o710)
            except BaseException:
                os.close(lock_fd)
                raise
        except OSError as error:
            raise StartupError(f"work_dir {self.work_dir}: {error.strerror or error}") from error
        self._lock_fd = lock_fd

    def _make_sandbox(self) -> Sandbox:
        return Sandbox(network=self._config.network, read_only_paths=self._config.read_only_paths)

    async def _prove(self, level: Level) -> None:
        """Run a command as every action will be, or raise StartupError with the reason."""
        workspace = self.work_dir / "self-test"
        secret = self._config.work_dir / f"{self._name}.lock"
        details = (level, str(workspace), str(self._config.network), str(secret))
        arguments = ("/bin/sh", "-c", SELF_TEST, "sh", *details)
        run = Run(arguments, {}, workspace, "", _SELF_TEST_S, workspace / "stdout", workspace / "stderr")
        who = f"user {self._owner.uid}" if self._owner is not None else "our own user"
        try:
            await asyncio.to_thread(_make_workspace, workspace, self._owner)
            result = await self._run(run, input_is_root=False)
            if result.exit_code != 0 or result.timed_out:
                reason = await asyncio.to_thread(run.stderr.read_text, errors="replace")
                raise StartupError(
                    f"worker {self._name}: commands run as {who} cannot use {self.work_dir}: "
                    f"{result.message or reason.strip()}"
                )
        except (InvalidArgument, WorkerFailed, WorkerFull) as error:
            raise StartupError(f"worker {self._name}: commands cannot be run as {who}: {error}") from error
        finally:
            await asyncio.to_thread(remove_tree, workspace)


def _usage(result: Ended) -> Usage:
    of_all = result.memory_peak_bytes
    return Usage(
        user_cpu_s=result.user_cpu_s,
        system_cpu_s=result.system_cpu_s,
        memory_peak_bytes=result.max_rss_bytes if of_all is None else of_all,
        memory_peak_is_of_largest=of_all is None,
    )


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _output_file(path: Path, owner: Owner | None) -> Iterator[int]:
    """Create a file for stdout or stderr. It is the command's own, so that it can open /dev/stdout."""
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND) as fd:
        if owner is not None:
            os.fchown(fd, owner.uid, owner.gid)
        yield fd


def _make_workspace(path: Path, owner: Owner | None) -> None:
    remove_tree(path)
    path.mkdir(0o711)
    for name in ("root", "tmp"):
        (path / name).mkdir(0o755)
        if owner is not None:
            os.chown(path / name, owner.uid, owner.gid)


def _disk_error(error: OSError) -> WorkerFailed | WorkerFull:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkerFull(f"no room for the output of the command: {error.strerror}")
    return WorkerFailed(f"the workspace cannot be used: {error}")


def _why_not(run: Run, path: str, result: CannotExecute) -> str:
    """Return the sentence for a program that could not be executed."""
    program = repr(run.arguments[0][:200])
    match result.reason:
        case "missing" if "/" not in program:
            return f"program {program} was not found in the PATH of the command: {path[:1000]}"
        case "missing":
            where = repr(run.working_directory) if run.working_directory else "the input root"
            return f"program {program} does not exist; the working directory is {where}"
        case "interpreter":
            return f"program {program} cannot be executed: the interpreter or loader it names does not exist"
        case "directory":
            return f"program {program} is a directory"
        case "permission":
            return f"program {program} is not executable"
        case "format":
            return f"program {program} is neither a binary of this machine nor a script with a #! line"
        case "too_long":
            return f"program {program} cannot be executed: its arguments and environment are too long for the system"
        case _:
            return f"program {program} cannot be executed: {result.error}"
