"""What every RPC has in common: who may call, its log line, the request's context, errors turned into statuses.

Applied once per method where a servicer is registered; per call it costs a few microseconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status

from expbuild.api.auth import Authenticator, authorize
from expbuild.api.status import to_status
from expbuild.errors import Code, ExpbuildError, InternalError, InvalidArgument
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


def register(
    add_to_server: Callable[[Any, Any], None],
    servicer: object,
    descriptor: Any,
    server: grpc.aio.Server,
    authenticator: Authenticator,
) -> None:
    """Serve `servicer` to those whom `authenticator` admits.

    add_to_server: the function generated for its service; `descriptor`: of that service.
    """
    methods = {}
    for method in descriptor.methods:
        wrap = _streaming if method.server_streaming else _unary
        name = f"{descriptor.full_name}/{method.name}"
        methods[method.name] = wrap(name, _decoder(method), getattr(servicer, method.name), authenticator)
    add_to_server(SimpleNamespace(**methods), _Registry(server, descriptor))


class _Lookup(NamedTuple):
    """How a generic handler is asked for the handler of one method (grpc.HandlerCallDetails)."""

    method: str
    invocation_metadata: tuple[()] = ()


class _Registry:
    """Stands in for the server in a generated `add_…_to_server`, so that requests reach us as bytes.

    A request that does not parse is then ours to refuse; the library would answer UNKNOWN with the exception's text.
    """

    def __init__(self, server: grpc.aio.Server, descriptor: Any) -> None:
        self._server = server
        self._descriptor = descriptor

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        service = self._descriptor.full_name
        for handler in handlers:
            found = {m.name: handler.service(_Lookup(f"/{service}/{m.name}")) for m in self._descriptor.methods}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, _raw(found)),))

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Pass on the methods by name: the native transport serves only these itself."""
        self._server.add_registered_method_handlers(service, _raw(handlers))


def _raw(handlers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: method._replace(request_deserializer=None) for name, method in handlers.items()}


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
        # Asked for now: a generator may be closed after its call is gone, and asking then crashes the process.
        self._peer = context.peer()
        self._invocation_id = request_metadata(context).tool_invocation_id
        self._caller = ""
        structlog.contextvars.bind_contextvars(rpc=method, invocation_id=self._invocation_id)

    def admit(self, authenticator: Authenticator) -> None:
        """Find out who calls. Raises Unauthenticated or PermissionDenied, before anybody reads what was sent."""
        if authenticator.is_open:
            return
        caller = authenticator.identify(self._method, self._context.invocation_metadata() or ())
        self._caller = caller.name
        authorize(caller, self._method)

    def completed(self, code: str, reason: str | None = None) -> None:
        """Write the call's one log line."""
        fields = {} if reason is None else {"reason": reason}
        if self._caller:
            fields["caller"] = self._caller
        log.info(
            "rpc.completed",
            code=code,
            duration_ms=round((time.monotonic() - self._start) * 1000, 1),
            peer=self._peer,
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


_Decoder = Callable[[Any], Any]
"""From what the library hands over, a message's bytes or a stream of them, to a request or a stream of requests."""


def _decoder(method: Any) -> _Decoder:
    parse = GetMessageClass(method.input_type).FromString

    def decode(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            raise InvalidArgument(f"the request cannot be decoded: {error}") from error

    async def decode_stream(messages: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
        async for data in messages:
            yield decode(data)

    return decode_stream if method.client_streaming else decode


def _unary(
    method: str,
    decode: _Decoder,
    handler: Callable[[Any, ServicerContext], Awaitable[Any]],
    authenticator: Authenticator,
) -> Callable[..., Any]:
    async def wrapped(request: Any, context: ServicerContext) -> Any:
        call = _Call(method, context)
        try:
            call.admit(authenticator)
            response = await handler(decode(request), context)
        except (Exception, asyncio.CancelledError) as error:
            await call.failed(error)
        call.completed("OK")
        return response

    return wrapped


def _streaming(
    method: str,
    decode: _Decoder,
    handler: Callable[[Any, ServicerContext], AsyncGenerator[Any, None]],
    authenticator: Authenticator,
) -> Callable[..., Any]:
    async def wrapped(request: Any, context: ServicerContext) -> AsyncIterator[Any]:
        call = _Call(method, context)
        try:
            call.admit(authenticator)
            async with aclosing(handler(decode(request), context)) as responses:
                async for response in responses:
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
