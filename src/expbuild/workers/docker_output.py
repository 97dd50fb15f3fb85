"""Output of a command in a warm container: a pipe it writes to, and the file we copy that into."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

from expbuild.errors import WorkerFailed, WorkerFull

_CHUNK_BYTES = 1 << 16


class OutputPipe:
    """A named pipe that commands write to as stdout or stderr, one after the other.

    A pipe, not the file itself: what opens /dev/stderr by name would truncate a file. Our own descriptor is open both
    ways, so there is never an end of file; a command's output is complete when everything it started is dead and the
    pipe is empty.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        path.chmod(0o666)  # opening /dev/stdout opens it anew, as the command's user
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._target: int | None = None
        self._room_bytes = 0
        self._on_flood: Callable[[], None] | None = None
        self._error: OSError | None = None

    def start(self, target: Path, limit_bytes: int, on_flood: Callable[[], None]) -> None:
        """Begin to copy what is written into a new file.

        What exceeds the limit is dropped but for one byte, by which it is known; `on_flood` is called once.
        """
        self._error = None
        self._room_bytes = limit_bytes + 1
        self._on_flood = on_flood
        self._target = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        asyncio.get_running_loop().add_reader(self._fd, self._copy)

    def finish(self) -> None:
        """Copy the rest; nobody writes any more. Raises WorkerFull or WorkerFailed when the file could not be written.

        Harmless when nothing was begun.
        """
        target = self._target
        if target is None:
            return
        asyncio.get_running_loop().remove_reader(self._fd)
        while self._copy():
            pass
        self._target = None
        os.close(target)
        if self._error is not None:
            failure = WorkerFull if self._error.errno in (errno.ENOSPC, errno.EDQUOT) else WorkerFailed
            raise failure(f"cannot write the output of the command: {self._error.strerror}") from self._error

    def close(self) -> None:
        """Give up the pipe."""
        if self._target is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._target)
            self._target = None
        os.close(self._fd)

    def _copy(self) -> bool:
        """Copy one chunk, into the page cache: too little for a thread. Return whether there was anything."""
        try:
            data = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        assert self._target is not None
        data = data[: self._room_bytes]
        self._room_bytes -= len(data)
        if self._room_bytes == 0 and self._on_flood is not None:
            self._on_flood()
            self._on_flood = None
        try:
            while data and self._error is None:  # after one the rest is dropped, or the command would hang
                data = data[os.write(self._target, data) :]
        except OSError as error:
            self._error = error
        return True
