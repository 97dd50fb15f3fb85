"""A server that knows every method and does nothing: it answers OK and an empty message to everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc


class _Nothing(grpc.GenericRpcHandler):
    """One empty message for whatever is asked; one message is right for calls of every kind."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(_answer)


async def _answer(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for _ in requests:
        break
    yield b""


async def start_hollow_server() -> tuple[grpc.aio.Server, str]:
    """Return a hollow server that runs in this process, and its address."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((_Nothing(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"
