"""A relay between a client and the server that shows what went over the wire."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Relay:
    """Passes every connection on to one server and keeps the bytes, all connections together.

    HTTP/2 compresses header fields but no messages, so a resource name inside a message can be searched for.
    """

    def __init__(self, server_address: str) -> None:
        host, _, port = server_address.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.from_client = bytearray()
        self.from_server = bytearray()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        # Closing a socket does not wake the thread that waits on it; shutting it down does.
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                for source, target, record in (
                    (client, server, self.from_client),
                    (server, client, self.from_server),
                ):
                    threading.Thread(target=_pass_on, args=(source, target, record), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            record += data
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relay(server_address: str) -> Iterator[Relay]:
    """Run a relay in front of a server."""
    made = Relay(server_address)
    try:
        yield made
    finally:
        made.close()
