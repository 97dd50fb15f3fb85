"""What the service manager is told: that we are ready, that we stop, that we are alive (sd_notify(3), in plain Python).

Without a `NOTIFY_SOCKET` in the environment nobody asks, and nothing is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

import structlog

log = structlog.get_logger()


class ServiceManager:
    """Whoever started us and wants to know how we are: systemd, or something that speaks its protocol.

    watchdog_s: how long we may be silent before we count as hung; None when nobody watches.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self.watchdog_s = _watchdog_s(environment) if self._address else None

    def notify(self, *assignments: str) -> None:
        """Send `NAME=value` pairs in one message. Never raises: nobody may be there any more to hear it."""
        if not self._address:
            return
        # "@" stands for the zero byte that begins the names of sockets outside the file system.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.connect(address)
                sender.send("\n".join(assignments).encode())
        except OSError as error:
            log.warning("service_manager.unreachable", socket=self._address, reason=error.strerror or str(error))

    async def keep_alive(self) -> None:
        """Say that the event loop turns, often enough, until cancelled. Returns when nobody watches."""
        if self.watchdog_s is None:
            return
        while True:
            self.notify("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / 3)


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # meant for another process, whose environment we inherited
    with contextlib.suppress(ValueError):
        if (microseconds := int(environment.get("WATCHDOG_USEC", ""))) > 0:
            return microseconds / 1e6
    return None
