"""Asking a running server, over its unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import grpc

from expbuild.errors import Code, ExpbuildError
from expbuild.reapi import AdminStub, GetStatusRequest, GetStatusResponse, WhyRequest, WhyResponse

_T = TypeVar("_T")
_TIMEOUT_S = 10.0


class ServerNotReached(ExpbuildError):
    """No server answers on the socket."""

    code = Code.UNAVAILABLE

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"no server answers at {path}: {reason}. Is it running, with this configuration (--config FILE), "
            "and under a user whose files you may open?"
        )


class AdminClient:
    """Calls of `expbuild.v1.Admin`, each on a connection of its own. They raise ServerNotReached."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def status(self) -> GetStatusResponse:
        """Return what the server is doing."""
        return self._call(lambda stub: stub.GetStatus(GetStatusRequest(), timeout=_TIMEOUT_S))

    def why(self, subject: str) -> WhyResponse:
        """Return where executions are, and why."""
        return self._call(lambda stub: stub.Why(WhyRequest(subject=subject), timeout=_TIMEOUT_S))

    def _call(self, rpc: Callable[[AdminStub], Awaitable[_T]]) -> _T:
        async def call() -> _T:
            async with grpc.aio.insecure_channel(f"unix:{self._path}") as channel:
                return await rpc(AdminStub(channel))

        try:
            return asyncio.run(call())
        except grpc.aio.AioRpcError as error:
            raise ServerNotReached(self._path, error.details() or error.code().name) from error
