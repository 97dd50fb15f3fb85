"""The native transport: pygrpc-native, HTTP/2 and gRPC framing in Rust, outside the GIL, behind grpcio's interface.

It serves unary calls and streams of answers itself. What streams requests (uploads, reflection) it hands to a grpcio
server behind it, over a socket in a directory only we can enter. An optional package: imported only when it is wanted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import pygrpc_native
import pygrpc_native.aio

_TRIED_VERSIONS = "0.5."
"""Below we replace methods that are no public part of the library, so it has to be one of those that have them."""

_BATCH = 64
"""Calls fetched at a time."""

_LAST_ANSWERS_S = 0.2
"""So long the last answers have to reach the network before the connections are closed."""

_MIN_PAUSE_S = 0.001
_MAX_PAUSE_S = 0.25


def obstacle() -> str | None:
    """Return why the package that is installed cannot be used, None when it can."""
    version = pygrpc_native.__version__
    if not version.startswith(_TRIED_VERSIONS):
        return f"pygrpc-native {version} is installed, and expbuild knows only {_TRIED_VERSIONS}x"
    return None


class NativeServer(pygrpc_native.aio.Server):
    """The library's server, with what is between it and the event loop replaced.

    Slow readers are waited for on the event loop. The library waits for them in threads of the loop's default executor,
    of which there are few: six clients that do not read would stop all other streams, all other work of that executor,
    and the server's own stop.

    Calls are fetched, and unary calls answered, in batches, by the event loop itself as long as there are any. The
    library's thread would take the GIL at every system call a handler makes, and each answer of its own wakes a thread
    of the front. With handlers that read a file and log a line, that costs more than half of the calls per second.
    """

    def __init__(self, options: Sequence[tuple[str, int]]) -> None:
        super().__init__(options=options)
        self._loop_is_fetching = threading.Lock()

    def add_insecure_port(self, address: str) -> int:
        """Take the address and return its port. Raises RuntimeError."""
        port = super().add_insecure_port(address)
        self._front = cast("pygrpc_native.NativeGrpcFront", _AnswersTogether(self._front))
        return port

    def _dispatch(self) -> None:
        """Wait for calls when there are none, in a thread. (Replaces the library's.)"""
        front, loop = self._front, self._loop
        assert front is not None  # start() has seen to it
        assert loop is not None
        while (events := front.recv_batch_details(_BATCH)) is not None:
            self._loop_is_fetching.acquire()
            try:
                loop.call_soon_threadsafe(self._take, events)
            except RuntimeError:  # the loop was closed without stop()
                front.close()
                return
            with self._loop_is_fetching:  # as soon as it has found none
                pass

    def _take(self, events: list[Any]) -> None:
        """Start calls; look for more when each has had its first turn."""
        assert self._loop is not None  # we run on it
        try:
            self._on_events(events)
        finally:
            self._loop.call_soon(self._fetch)

    def _fetch(self) -> None:
        assert self._front is not None  # it has brought us calls before
        events = self._front.recv_batch_details(_BATCH, 0)
        if events:
            self._take(events)
        else:
            self._loop_is_fetching.release()

    async def _send(self, call: Any, context: Any, response: Any) -> bool:
        """Send one message of a stream of answers; False when the stream is over. (Replaces the library's.)"""
        front = self._front
        assert front is not None  # it has brought us the call
        data = self._encode(call, context, response)
        if data is None:
            return False
        context._initial_sent = True
        pause_s = _MIN_PAUSE_S
        while (sent := front.stream_try_send(call.call_id, data)) == pygrpc_native.STREAM_FULL:
            # Nothing tells when there is room again. Each pause is about a quarter of the time waited so far: a slow
            # reader loses no more than that, and one who has stopped costs next to nothing.
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.25, _MAX_PAUSE_S)
        return sent != pygrpc_native.STREAM_CLOSED


class _AnswersTogether:
    """The library's front, which hears of all the answers of one turn of the event loop at its end."""

    def __init__(self, front: Any) -> None:
        self._front = front
        self._answers: list[tuple[int, bytes]] = []

    def respond(
        self, call_id: int, payload: bytes, initial_metadata: Any = None, trailing_metadata: Any = None
    ) -> bool:
        """Answer a call, a moment later when nothing can be wrong with the answer."""
        if initial_metadata or trailing_metadata:
            return bool(self._front.respond(call_id, payload, initial_metadata, trailing_metadata))
        if not self._answers:
            asyncio.get_running_loop().call_soon(self._flush)
        self._answers.append((call_id, payload))
        return True

    def close(self) -> None:
        """Close the front when every answer is out. (Called in a thread, by stop().)"""
        self._flush()
        # The front drops what it has not written yet, and nothing tells when it has.
        time.sleep(_LAST_ANSWERS_S)
        self._front.close()

    def _flush(self) -> None:
        answers, self._answers = self._answers, []
        for call_id, payload in answers:
            self._front.respond(call_id, payload)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._front, name)
