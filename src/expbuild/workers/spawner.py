"""The spawner: a small process that starts commands, and ends everything they started.

Why it exists: forking a large threaded gRPC process is slow and unsafe, and who parses the network should not be who
forks. It is a program of its own, and imports nothing but the standard library: the `spawner_*` modules beside it and
`cgroups` are the rest of it.

Its argument is the descriptor of one end of a SOCK_SEQPACKET pair to the server. The only message is `RUN` with
descriptors attached, in the order of `Files`; the spawner forks a *reaper* for it and goes on. The reaper reads the
spec, runs the command, and speaks with the server over its own control socket: it sends `{"kind": "started"}`, then one
result once nothing that the command started is alive; it takes `KILL`. Lifetimes hang on sockets, not on signals: when
the server dies its sockets close, the reapers kill their actions at once and the spawner ends after them. When the
spawner dies, running reapers go on serving their actions. When a reaper is killed (an action of the same user can do
that), its descendants fall to the spawner, which kills them before it lets go of the control socket: its end of file
says "all dead" too.
"""

from __future__ import annotations

import gc
import json
import math
import os
import select
import signal
import socket
import sys
import time
from typing import NoReturn

from expbuild.workers.cgroups import CgroupHome, find_home
from expbuild.workers.spawner_command import Files
from expbuild.workers.spawner_processes import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    ChildWatch,
    count_tasks,
    descendants,
    kill_descendants,
    prctl,
)
from expbuild.workers.spawner_reaper import PATIENCE_S, Reaper

RUN = b'{"op":"run"}'

_MAX_FDS = 16
_COUNT_AGAIN_S = 30.0
_BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Not for the spawner and the reapers: they are sent to whole services; our end is the end of the socket.

Blocked rather than ignored, so that what is sent to a command before it has become one is not lost.
"""


class Spawner:
    """The process between the server and the reapers."""

    def __init__(self, server: socket.socket, home: CgroupHome) -> None:
        self._server = server
        self._home = home
        self._tasks = 0
        self._tasks_counted = -math.inf
        self._controls: dict[int, int] = {}  # reaper -> our copy of its control socket, closed after its death
        self._watch = ChildWatch()

    def run(self) -> None:
        """Serve until the server is gone, then until the last reaper is."""
        poller = select.poll()
        poller.register(self._server, select.POLLIN)
        poller.register(self._watch.fd, select.POLLIN)
        serving = True
        while serving or self._controls:
            for fd, _ in poller.poll():
                if fd == self._watch.fd:
                    self._watch.clear()
                    self._reap()
                elif not self._serve_one():
                    serving = False
                    poller.unregister(self._server)

    def _serve_one(self) -> bool:
        try:
            message, fds, _, _ = socket.recv_fds(self._server, 4096, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return False
        if message == RUN and len(fds) >= 5:
            spec, control, stdout, stderr, root, *extra = fds
            self._start_reaper(Files(spec, control, stdout, stderr, root, tuple(extra)))
            fds.remove(control)
        for fd in fds:
            os.close(fd)
        return bool(message)

    def _start_reaper(self, files: Files) -> None:
        """Fork a reaper; its control socket stays open here too."""
        self._count_tasks()
        try:
            pid = os.fork()
        except OSError as error:
            with socket.socket(fileno=files.control) as control:
                control.send(json.dumps({"kind": "failed", "error": f"fork: {error.strerror}"}).encode())
            return
        if pid == 0:
            self._become_reaper(files)
        self._controls[pid] = files.control

    def _count_tasks(self) -> None:
        """Keep in mind how many processes our user has: the limit of an action's processes counts those too."""
        if os.geteuid() != 0 and "pids" not in self._home.controllers:
            now = time.monotonic()
            if now - self._tasks_counted > _COUNT_AGAIN_S:
                self._tasks, self._tasks_counted = count_tasks(os.geteuid()), now

    def _become_reaper(self, files: Files) -> NoReturn:
        try:
            self._watch.close()
            self._server.close()
            for fd in self._controls.values():
                os.close(fd)
            Reaper(files, self._home, self._tasks).run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            control = self._controls.pop(pid, None)
            if control is not None:
                if status != 0:
                    self._kill_strays()
                os.close(control)

    def _kill_strays(self) -> None:
        """Kill what a reaper that was killed has left: the descendants of ours that belong to no living reaper."""
        give_up = time.monotonic() + PATIENCE_S
        while kill_descendants(self._controls.keys()) and time.monotonic() < give_up:
            for pid in descendants(self._controls.keys()):
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue
            select.select([self._watch.fd], [], [], 0.02)
            self._watch.clear()  # whoever it was for: our caller goes on reaping


def main() -> None:
    """Serve the socket whose descriptor is the only argument."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _BLOCKED_SIGNALS)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
        signal.signal(number, signal.SIG_DFL)
    server = socket.socket(fileno=int(sys.argv[1]))
    server.set_inheritable(False)
    prctl(PR_SET_DUMPABLE, 0)  # actions of the same user cannot look into us
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    home = find_home()
    spawner = Spawner(server, home)
    gc.disable()
    gc.freeze()
    spawner.run()
    home.close()
