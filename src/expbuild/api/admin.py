"""What the operator of a server asks it: its state, and why things wait. On a unix socket only the owner can open."""

from __future__ import annotations

import os
import resource
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grpc
import structlog

from expbuild import __version__
from expbuild.api.operations import wait_reason_message
from expbuild.api.rpc import ServicerContext
from expbuild.execution.execution import Execution
from expbuild.execution.manager import ExecutionManager
from expbuild.execution.slots import Slot
from expbuild.reapi import (
    AdminServicer,
    BuildStatus,
    ExecutionStatus,
    GetStatusRequest,
    GetStatusResponse,
    StoreStatusMessage,
    WhyRequest,
    WhyResponse,
    WorkerStatus,
    add_AdminServicer_to_server,
)
from expbuild.storage.caretaker import StoreStatus

log = structlog.get_logger()

_MAX_SHOWN = 200
_MAX_PATH_BYTES = 107
"""The kernel takes no longer name for a unix socket."""


class AdminService(AdminServicer):
    """GetStatus and Why. manager: None for a server that executes nothing. stores: tells how the stores are."""

    def __init__(self, manager: ExecutionManager | None, stores: Callable[[], Iterable[StoreStatus]]) -> None:
        self._manager = manager
        self._stores = stores
        self._started_s = time.monotonic()

    async def GetStatus(self, request: GetStatusRequest, context: ServicerContext) -> GetStatusResponse:
        response = GetStatusResponse(
            version=__version__,
            memory_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            stores=[_store(store) for store in self._stores()],
        )
        response.uptime.FromNanoseconds(int((time.monotonic() - self._started_s) * 1e9))
        if self._manager is not None:
            pool, now_s = self._manager.pool, time.monotonic()
            response.draining = pool.is_draining
            response.workers.extend(_worker(slot, now_s) for slot in pool.slots)
            queued = pool.queued()
            response.queued = len(queued)
            response.builds.extend(_builds(pool.slots, queued))
            for name in pool.statistics.__slots__:
                response.executions[name] = getattr(pool.statistics, name)
        return response

    async def Why(self, request: WhyRequest, context: ServicerContext) -> WhyResponse:
        names: dict[Execution, list[str]] = {}
        if self._manager is not None:
            for operation in self._manager.operations():
                names.setdefault(operation.execution, []).append(operation.name)
        wanted = [execution for execution in names if _is_meant(execution, names[execution], request.subject)]
        shown = [_execution(execution, names[execution]) for execution in wanted[:_MAX_SHOWN]]
        return WhyResponse(executions=shown, left_out=len(wanted) - len(shown))


async def serve_admin(path: Path, service: AdminService) -> grpc.aio.Server | None:
    """Serve on a unix socket that only its owner can open; None, and a warning, where that is not possible.

    A socket that an ended server left there is replaced, one on which a server answers is not.
    """
    reason = _why_not(path)
    if reason is None:
        server = grpc.aio.server()
        add_AdminServicer_to_server(service, server)
        before = os.umask(0o177)
        try:
            if server.add_insecure_port(f"unix:{path}"):
                await server.start()
                return server
            reason = "the socket cannot be bound"
        except RuntimeError as error:
            reason = str(error)
        finally:
            os.umask(before)
    log.warning("admin.unavailable", socket=str(path), reason=reason, missing="re-server status and re-server why")
    return None


def _why_not(path: Path) -> str | None:
    """Return why there cannot be a socket of ours; remove one that nobody serves any more."""
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        return f"its name is longer than {_MAX_PATH_BYTES} bytes; set server.admin_socket to a shorter one"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return "there is something else of that name"
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            try:
                client.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink()
                return None
        return "another server answers there"
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)


def _is_meant(execution: Execution, operations: Sequence[str], subject: str) -> bool:
    """Whether a subject names this execution; "" names all that have not ended."""
    if not subject:
        return not execution.is_done
    digest = execution.action_digest
    return (
        execution.build == subject
        or execution.invocation_id == subject
        or subject in operations
        or subject == f"{digest.hash}/{digest.size_bytes}"
        or (len(subject) >= 4 and digest.hash.startswith(subject))
    )


def _execution(execution: Execution, operations: Iterable[str]) -> ExecutionStatus:
    message = ExecutionStatus(
        action=f"{execution.action_digest.hash}/{execution.action_digest.size_bytes}",
        instance_name=execution.instance_name,
        build=execution.build,
        stage=execution.stage.name,
        worker=execution.worker,
        operations=operations,
    )
    message.age.FromNanoseconds(execution.clock.now_ns() - execution.timeline.queued)
    reason, outcome = execution.wait_reason, execution.outcome
    if reason is not None:
        message.wait.CopyFrom(wait_reason_message(execution, reason))
    if outcome is not None:
        message.code = outcome.error.code.name if outcome.error is not None else "OK"
        message.message = str(outcome.error) if outcome.error is not None else outcome.message
        if outcome.result is not None and not message.message:
            message.message = f"exit code {outcome.result.exit_code}"
        if outcome.cached:
            message.message = f"answered from the action cache; {message.message}"
    return message


def _worker(slot: Slot, now_s: float) -> WorkerStatus:
    message = WorkerStatus(
        name=slot.worker.name, state=slot.state, platform=str(slot.worker.properties), reason=slot.offline_reason
    )
    if slot.offline_reason:
        message.since.FromNanoseconds(int((now_s - slot.offline_since_s) * 1e9) if slot.offline_since_s else 0)
    if slot.running is not None:
        digest = slot.running.action_digest
        message.action, message.build = f"{digest.hash}/{digest.size_bytes}", slot.running.build
    return message


def _builds(slots: Iterable[Slot], queued: Iterable[Execution]) -> list[BuildStatus]:
    running = Counter(slot.running.build for slot in slots if slot.running is not None)
    waiting = Counter(execution.build for execution in queued)
    names = sorted(running.keys() | waiting.keys(), key=lambda name: (-running[name] - waiting[name], name))
    return [BuildStatus(name=name, running=running[name], queued=waiting[name]) for name in names]


def _store(store: StoreStatus) -> StoreStatusMessage:
    return StoreStatusMessage(
        root=store.root,
        entries=store.entries,
        used_bytes=store.used_bytes,
        free_bytes=store.free_bytes,
        at_risk=store.is_at_risk,
        evicted_entries=store.evicted_entries,
        evicted_bytes=store.evicted_bytes,
        quarantined=store.quarantined,
        broken_promises=store.broken_promises,
    )
