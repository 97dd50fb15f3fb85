"""Running one action on one worker: input root, command, outputs, result, cache entry."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import ActionTimedOut, BlobNotFound, ExpbuildError, MissingBlobs, WorkerFailed, WorkerFull
from expbuild.execution.action import ActionSpec
from expbuild.execution.execution import Execution, Outcome, Timeline
from expbuild.execution.input_root import create_workspace, materialize
from expbuild.execution.input_tree import InputTree
from expbuild.execution.missing import describe_missing
from expbuild.execution.outputs import CollectedOutputs, OutputCollector
from expbuild.execution.usage import Traffic, attach_usage
from expbuild.reapi import ActionResult
from expbuild.storage.base import ActionCache, ActionKey, BlobStore, Sharing, write_blob
from expbuild.workers.base import Owner, Run, RunResult, Worker
from expbuild.workers.limits import cut_stream
from expbuild.workers.work_dir import OPEN_DIRECTORY, remove_tree

log = structlog.get_logger()
T = TypeVar("T")

_BLOBS_AT_ONCE = 64
"""So many small blobs are written on the event loop before others get their turn."""


@dataclass(frozen=True, slots=True)
class OutputLimits:
    """The most an action may write: to stdout and to stderr, and to all its outputs together."""

    max_log_bytes: int = 64 << 20
    max_output_bytes: int = 32 << 30


class ActionRunner:
    """Runs actions, one call each.

    executor: runs what blocks: preparing, collecting and deleting workspaces.
    background: owns the deletion of workspaces, which nobody waits for.
    absolute_symlinks: whether symlinks in outputs may have absolute targets.
    limits: how much output an action may make.
    """

    def __init__(
        self,
        blobs: BlobStore,
        action_cache: ActionCache,
        executor: Executor,
        background: asyncio.TaskGroup,
        *,
        absolute_symlinks: bool,
        limits: OutputLimits = OutputLimits(),
    ) -> None:
        self._blobs = blobs
        self._action_cache = action_cache
        self._executor = executor
        self._background = background
        self._absolute_symlinks = absolute_symlinks
        self._limits = limits

    async def run(self, execution: Execution, worker: Worker) -> Outcome:
        """Run the execution's action; its outputs, then its cache entry are stored before this returns.

        Raises MissingBlobs for inputs evicted meanwhile, InvalidArgument for an action that cannot be run as it
        stands, WorkerFailed or WorkerFull when not the action is to blame. Whatever happens, nothing is left behind.
        """
        spec, tree = execution.spec, execution.tree
        assert spec is not None  # only prepared executions reach a worker
        assert tree is not None
        # Of an earlier attempt nothing must be left that this one has not reached yet.
        times = execution.timeline = Timeline(queued=execution.timeline.queued)
        now = execution.clock.now_ns
        workspace = worker.work_dir / f"{execution.id}-{execution.attempts}"
        times.worker_start = times.input_fetch_start = now()
        try:
            inputs = await self._prepare(workspace, spec, tree, worker.owner)
            times.input_fetch_completed = times.execution_start = now()
            ran = await worker.run(self._run_of(spec, workspace))
            times.execution_completed = times.output_upload_start = now()
            found, error = await self._collect(workspace, execution, spec, worker.owner, ran)
            times.output_upload_completed = times.worker_completed = now()
        finally:
            self._background.create_task(self._remove(workspace), name=f"remove {workspace.name}")
        result = found.result
        result.execution_metadata.CopyFrom(times.metadata(worker.name))
        attach_usage(result, times, ran.usage, inputs, found.traffic)
        if error is None and result.exit_code == 0 and not spec.do_not_cache:
            await self._cache(execution, result)
        message = "; ".join(filter(None, [ran.message, found.complaint]))
        return Outcome(error=error, result=result, message=message)

    async def _prepare(self, workspace: Path, spec: ActionSpec, tree: InputTree, owner: Owner | None) -> Traffic:
        sharing = Sharing.LINK if owner is not None and owner.uid not in (0, os.geteuid()) else Sharing.COPY
        parents = {output.location[:-1] for output in spec.command.outputs if output.location}
        root = workspace / "root"

        def prepare() -> Traffic:
            create_workspace(workspace, owner)
            return materialize(tree, self._blobs, root, output_parents=sorted(parents), owner=owner, sharing=sharing)

        with _worker_errors("prepare the input root"):
            try:
                return await self._in_thread(prepare)
            except BlobNotFound as error:
                raise MissingBlobs([error.digest]) from error

    async def _collect(
        self, workspace: Path, execution: Execution, spec: ActionSpec, owner: Owner | None, ran: RunResult
    ) -> tuple[CollectedOutputs, ExpbuildError | None]:
        """Return what was found, with all its blobs stored, and what is wrong with it."""
        function = spec.digest.function
        error: ExpbuildError | None = ActionTimedOut() if ran.timed_out else None
        with _worker_errors("collect the outputs"):
            stdout, stderr = await self._in_thread(self._store_streams, workspace, function)
            try:
                found = await self._in_thread(self._collect_outputs, workspace / "root", execution, spec, owner)
            except ExpbuildError as rejected:
                error = error or rejected
                found = CollectedOutputs()
        for count, (digest, data) in enumerate(found.blobs.items()):
            await write_blob(self._blobs, digest, data)
            if count % _BLOBS_AT_ONCE == _BLOBS_AT_ONCE - 1:
                await asyncio.sleep(0)
        result = found.result
        result.exit_code = ran.exit_code
        for target, digest in ((result.stdout_digest, stdout), (result.stderr_digest, stderr)):
            target.hash, target.size_bytes = digest.hash, digest.size_bytes
        return found, error

    def _store_streams(self, workspace: Path, function: DigestFunction) -> list[Digest]:
        digests = []
        for name in ("stdout", "stderr"):
            with open(workspace / name, "r+b", buffering=0) as file:
                cut_stream(file.fileno(), self._limits.max_log_bytes)
                digests.append(self._blobs.ingest(file.fileno(), function))
        return digests

    def _collect_outputs(
        self, root: Path, execution: Execution, spec: ActionSpec, owner: Owner | None
    ) -> CollectedOutputs:
        assert execution.tree is not None
        root_fd = os.open(root, OPEN_DIRECTORY)
        try:
            found = OutputCollector(
                self._blobs,
                root_fd,
                spec.digest.function,
                spec.command,
                owner=owner,
                absolute_symlinks=self._absolute_symlinks,
                accepts_directories=execution.accepts_directories,
                max_bytes=self._limits.max_output_bytes,
            ).collect()
            found.complaint = describe_missing(root_fd, execution.tree, spec.command.outputs, found.missing)
            return found
        finally:
            os.close(root_fd)

    def _run_of(self, spec: ActionSpec, workspace: Path) -> Run:
        command = spec.command
        return Run(
            arguments=command.arguments,
            environment=command.environment,
            workspace=workspace,
            working_directory="/".join(command.working_directory),
            timeout_s=spec.timeout_s,
            stdout=workspace / "stdout",
            stderr=workspace / "stderr",
            max_log_bytes=self._limits.max_log_bytes,
            max_output_bytes=self._limits.max_output_bytes,
        )

    async def _cache(self, execution: Execution, result: ActionResult) -> None:
        """Store the cache entry; a cache that cannot be written does not spoil a good result."""
        key = ActionKey(execution.instance_name, execution.action_digest)
        try:
            await self._action_cache.put(key, result, invocation_id=execution.invocation_id)
        except ExpbuildError as error:
            log.error("action_result.not_stored", action_digest=str(execution.action_digest), reason=str(error))

    async def _remove(self, workspace: Path) -> None:
        try:
            await self._in_thread(remove_tree, workspace)
        except OSError as error:
            log.error("workspace.not_removed", workspace=str(workspace), reason=error.strerror)

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        """Run blocking work to its end even when we are cancelled: nobody else may touch the workspace before."""
        job = asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            while not job.done():
                with suppress(asyncio.CancelledError):  # our caller gets the first one
                    await asyncio.wait([job])
            raise


@contextmanager
def _worker_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the workspace into what it means for the action."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkerFull(f"cannot {what}: no space left where the worker keeps its directories") from error
        raise WorkerFailed(f"cannot {what}: {error.strerror}") from error
