"""What one action may use up, and what is done with output beyond it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one command; None is "no limit".

    memory_bytes, cpus (cores) and, unless `own_user`, processes hold for the action as a whole, by a control group
    where there is one, else for each process as far as the system can. own_user: nothing else runs as the action's
    user, so that its processes can be counted by user. open_files and file_bytes (the largest file) hold for each
    process; stream_bytes for stdout and for stderr.
    """

    memory_bytes: int | None = None
    cpus: float | None = None
    processes: int | None = None
    own_user: bool = False
    open_files: int | None = None
    file_bytes: int | None = None
    stream_bytes: int | None = None


def cut_stream(fd: int, limit_bytes: int) -> None:
    """Cut a captured stdout or stderr to its limit, and say so at its end. `fd` is open for writing."""
    size_bytes = os.fstat(fd).st_size
    if size_bytes > limit_bytes:
        os.ftruncate(fd, limit_bytes)
        os.pwrite(fd, f"\n[cut after {limit_bytes} of {size_bytes} bytes: max_log_bytes]\n".encode(), limit_bytes)
