"""Processes as the spawner and its reapers see them. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Set

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process. Raises OSError."""
    if libc.prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def descendants(spare: Set[int] = frozenset()) -> dict[int, int]:
    """Return our descendants as pid -> process group, without `spare` and what is below it.

    One look is not consistent: who is reparented during it can be missed. Ask until there are no children at all.
    """
    children: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
                    fields = file.read(1024).rpartition(b") ")[2].split(maxsplit=3)
            except OSError:
                continue  # gone meanwhile
            children.setdefault(int(fields[1]), []).append((int(name), int(fields[2])))
    found: dict[int, int] = {}
    todo = [os.getpid()]
    while todo:
        for pid, group in children.get(todo.pop(), ()):
            if pid not in spare:
                found[pid] = group
                todo.append(pid)
    return found


def send_signal(pid: int, number: int) -> None:
    # Between the look at /proc and this, the pid cannot have come round to another process: pids are given in turn.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def kill_descendants(spare: Set[int] = frozenset()) -> bool:
    """Kill our descendants but `spare`; return whether there were any.

    Stopped first, until a look finds no new one, so that a fork bomb cannot outrun us.
    """
    stopped: set[int] = set()
    for _ in range(100):
        new = descendants(spare).keys() - stopped
        if not new:
            break
        for pid in new:
            send_signal(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        send_signal(pid, signal.SIGKILL)
    return bool(stopped)


def count_tasks(uid: int) -> int:
    """Return how many processes and threads a user has."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
    return count


class ChildWatch:
    """A descriptor that becomes readable when a child has died."""

    def __init__(self) -> None:
        self.fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._write_fd = write_fd
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        """Forget the inherited watch: a fork shares the pipe with its parent."""
        signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._write_fd)
