"""Messages and descriptors over SOCK_SEQPACKET sockets, on asyncio's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_MAX_MESSAGE_BYTES = 65536


async def receive(sock: socket.socket) -> dict[str, Any] | None:
    """Return the next message; None when the other side has closed. `sock` does not block."""
    while True:
        try:
            data = sock.recv(_MAX_MESSAGE_BYTES)
        except BlockingIOError:
            loop = asyncio.get_running_loop()
            await _ready(sock, loop.add_reader, loop.remove_reader)
        except ConnectionResetError:
            return None
        else:
            return dict(json.loads(data)) if data else None


async def send_fds(sock: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    """Send one message with descriptors. `sock` does not block. Raises OSError when nobody is there to take it."""
    while True:
        try:
            socket.send_fds(sock, [message], fds)
        except BlockingIOError:
            loop = asyncio.get_running_loop()
            await _ready(sock, loop.add_writer, loop.remove_writer)
        else:
            return


@contextlib.contextmanager
def memory_file(name: str, data: bytes = b"") -> Iterator[int]:
    """Open a file that exists in memory only, ready to be read from its beginning."""
    fd = os.memfd_create(name)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


async def _ready(sock: socket.socket, add: Callable[..., object], remove: Callable[[int], object]) -> None:
    waiter = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    fd = sock.fileno()
    add(fd, wake)
    try:
        await waiter
    finally:
        remove(fd)
