"""grpc.health.v1: whether the server, and each of its services, takes requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

from expbuild.api.rpc import ServicerContext
from expbuild.errors import Code, ExpbuildError

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING


class UnknownService(ExpbuildError):
    """A question about a service that this server does not have."""

    code = Code.NOT_FOUND


class HealthService(HealthServicer):
    """Health of the server ("") and of its services by full name. Answers anybody.

    The library has one too; ours ends its watchers when the server stops, who would otherwise delay that, and is
    served like every other service.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": NOT_SERVING}
        self._changed = asyncio.Event()
        self._is_closed = False

    def serve(self, services: Iterable[str]) -> None:
        """Say that the server and these services take requests."""
        self._set({"": SERVING, **dict.fromkeys(services, SERVING)})

    def refuse(self) -> None:
        """Say that nothing takes requests any more, so that nobody new comes; watchers go on watching."""
        self._set(dict.fromkeys(self._statuses, NOT_SERVING))

    def close(self) -> None:
        """Say that nothing takes requests any more; watchers hear it and are done."""
        self._is_closed = True
        self._set(dict.fromkeys(self._statuses, NOT_SERVING))

    async def Check(self, request: HealthCheckRequest, context: ServicerContext) -> HealthCheckResponse:
        if request.service not in self._statuses:
            raise UnknownService(f"there is no service {request.service[:200]!r} here")
        return HealthCheckResponse(status=self._statuses[request.service])

    async def List(self, request: Message, context: ServicerContext) -> Message:
        return health_pb2.HealthListResponse(  # type: ignore[attr-defined, no-any-return]  # newer than its stubs
            statuses={name: HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        )

    async def Watch(
        self, request: HealthCheckRequest, context: ServicerContext
    ) -> AsyncGenerator[HealthCheckResponse, None]:
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                yield HealthCheckResponse(status=status)
                told = status
            if self._is_closed:
                return
            await changed.wait()

    def _set(self, statuses: dict[str, int]) -> None:
        self._statuses = statuses
        self._changed.set()
        self._changed = asyncio.Event()
