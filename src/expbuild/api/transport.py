"""What carries our services: grpcio's own server, or a native front with the same interface.

Services are registered through the code grpcio-tools generates and never know which one it is. Which one serves is
decided once, at start, and said in one log line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

import grpc
import structlog

from expbuild.errors import StartupError

log = structlog.get_logger()

Choice = Literal["auto", "grpcio", "native"]

MAX_MESSAGE_BYTES = 16 << 20

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Clients ping idle connections, some every 10 s; by default the library ends such connections.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Bazel and Buck2 open 100 streams on a connection before they open another.
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.max_metadata_size", 64 << 10),
    # Two servers on one port would take turns at answering.
    ("grpc.so_reuseport", 0),
)

_INSTALL = "pip install 'expbuild[native]'"


@dataclass(frozen=True, slots=True)
class Selection:
    """A transport, and why it. is_fallback: another one was asked for by name, and cannot do what is configured."""

    transport: Literal["grpcio", "native"]
    reason: str
    is_fallback: bool = False


class Server:
    """A server of one transport: services are registered at `handlers`, then it is bound, started and stopped."""

    def __init__(self, handlers: grpc.aio.Server, credentials: grpc.ServerCredentials | None = None) -> None:
        self.handlers = handlers
        self._credentials = credentials

    def bind(self, address: str) -> int:
        """Take the address; return the port, which is another where the address says 0. Raises StartupError."""
        try:
            if self._credentials is None:
                return self.handlers.add_insecure_port(address)
            return self.handlers.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise StartupError(
                f"server.address: cannot listen on {address}: is another server running there, or the address not one "
                "of this machine?"
            ) from error

    async def start(self) -> None:
        """Serve from now on; with the user the process has now, who also owns what the transport needs on disk."""
        await self.handlers.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse what is new, give what runs this long, then cancel it."""
        await self.handlers.stop(grace_s)


def create_server(choice: Choice, *, credentials: grpc.ServerCredentials | None = None, tokens: bool = False) -> Server:
    """Return a server on the transport that is wanted, not bound yet. Raises StartupError when it cannot be had.

    credentials: for TLS. tokens: whether callers need one.
    """
    obstacle = None if choice == "grpcio" else _native_obstacle()
    selected = select(choice, obstacle=obstacle, tls=credentials is not None, tokens=tokens)
    say = log.warning if selected.is_fallback else log.info
    say("transport.selected", transport=selected.transport, reason=selected.reason)
    if selected.transport == "native":
        from expbuild.api.native import NativeServer

        return Server(NativeServer(_OPTIONS))
    return Server(grpc.aio.server(options=_OPTIONS), credentials)


def select(choice: Choice, *, obstacle: str | None, tls: bool, tokens: bool) -> Selection:
    """Return the transport for a configuration. Raises StartupError when "native" is demanded and not installed.

    obstacle: why the native transport cannot be loaded, if so. tokens: whether callers need one.
    """
    match choice:
        case "grpcio":
            return Selection("grpcio", "server.transport says so")
        case "native":
            if obstacle is not None:
                raise StartupError(f'server.transport: "native" is not possible: {obstacle}')
            if tls:
                reason = 'server.transport says "native", which has no TLS: grpcio serves in its place'
                return Selection("grpcio", reason, is_fallback=True)
            return Selection("native", "server.transport says so")
        case "auto":
            if obstacle is not None:
                return Selection("grpcio", obstacle)
            if tls:
                return Selection("grpcio", "the native transport has no TLS")
            if tokens:
                # It takes a message of any size into memory before anybody can look at the token.
                return Selection("grpcio", "the native transport does not protect memory from callers without a token")
            return Selection("native", "the native transport can do all that is configured")
        case _:
            assert_never(choice)


def _native_obstacle() -> str | None:
    """Return why the native transport cannot be used here, None when it can."""
    try:
        from expbuild.api.native import obstacle
    except ModuleNotFoundError:
        return f"pygrpc-native is not installed: {_INSTALL}"
    except ImportError as error:
        return f"pygrpc-native cannot be loaded: {error}"
    return obstacle()
