"""What every RPC has in common: its log line, the request's context, and errors turned into statuses.

Applied once per method where a servicer is registered; per call it costs a few microseconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from expbuild.api.status import to_status
from expbuild.errors import Code, ExpbuildError, InternalError
from expbuild.reapi import RequestMetadata

log = structlog.get_logger()

ServicerContext = grpc.aio.ServicerContext[Any, Any]

_METADATA_KEYS = frozenset(
    {
        "build.bazel.remote.execution.v2.requestmetadata-bin",
        "google.devtools.remoteexecution.v1test.requestmetadata-bin",  # the name one client still uses
    }
)
_GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}


def instrumented(servicer: object, descriptor: ServiceDescriptor) -> Any:
    """Return an object with the servicer's methods, each wrapped; what the generated `add_…_to_server` takes."""
    methods = {}
    for method in descriptor.methods:
        name = f"{descriptor.full_name}/{method.name}"
        handler = getattr(servicer, method.name)
        methods[method.name] = _streaming(name, handler) if method.server_streaming else _unary(name, handler)
    return SimpleNamespace(**methods)


def request_metadata(context: ServicerContext) -> RequestMetadata:
    """Return who calls and why, as the client says; empty when it does not say or nobody can read it."""
    for key, value in context.invocation_metadata() or ():
        if key in _METADATA_KEYS and isinstance(value, bytes):
            try:
                return RequestMetadata.FromString(value)
            except DecodeError:
                break
    return RequestMetadata()


class _Call:
    """One call under way."""

    def __init__(self, method: str, context: ServicerContext) -> None:
        self._method = method
        self._context = context
        self._start = time.monotonic()
        self._invocation_id = request_metadata(context).tool_invocation_id
        structlog.contextvars.bind_contextvars(rpc=method, invocation_id=self._invocation_id)

    def completed(self, code: str, reason: str | None = None) -> None:
        """Write the call's one log line."""
        fields = {} if reason is None else {"reason": reason}
        log.info(
            "rpc.completed",
            code=code,
            duration_ms=round((time.monotonic() - self._start) * 1000, 1),
            peer=self._context.peer(),
            **fields,
        )

    async def failed(self, error: BaseException) -> NoReturn:
        """End the call with the status an exception means."""
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            self.completed("CANCELLED")
            raise error
        if not isinstance(error, ExpbuildError):
            cause, error = error, InternalError()
            log.error("rpc.crashed", incident=error.incident, exc_info=cause)
        self.completed(error.code.name, str(error))
        await self._abort(error)

    async def _abort(self, error: ExpbuildError) -> NoReturn:
        status = to_status(error)
        if status.details:
            await self._context.abort_with_status(rpc_status.to_status(status))
        await self._context.abort(_GRPC_CODES[Code(status.code)], status.message)


def _unary(method: str, handler: Callable[[Any, ServicerContext], Awaitable[Any]]) -> Callable[..., Any]:
    async def wrapped(request: Any, context: ServicerContext) -> Any:
        call = _Call(method, context)
        try:
            response = await handler(request, context)
        except (Exception, asyncio.CancelledError) as error:
            await call.failed(error)
        call.completed("OK")
        return response

    return wrapped


def _streaming(method: str, handler: Callable[[Any, ServicerContext], AsyncIterator[Any]]) -> Callable[..., Any]:
    async def wrapped(request: Any, context: ServicerContext) -> AsyncIterator[Any]:
        call = _Call(method, context)
        try:
            async for response in handler(request, context):
                yield response
        except GeneratorExit:
            call.completed("CANCELLED")
            raise
        except (Exception, asyncio.CancelledError) as error:
            await call.failed(error)
        call.completed("OK")

    return wrapped


def _is_cancelled() -> bool:
    """Whether our own task was cancelled: the client went away. Any other CancelledError is a fault of ours."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
