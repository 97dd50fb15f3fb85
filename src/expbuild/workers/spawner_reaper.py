"""The reaper: the process above one command. Standard library only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

from expbuild.workers.cgroups import Cgroup, CgroupHome
from expbuild.workers.spawner_command import Files, become_command
from expbuild.workers.spawner_processes import (
    PR_SET_CHILD_SUBREAPER,
    ChildWatch,
    descendants,
    kill_descendants,
    prctl,
    send_signal,
)

KILL = b'{"op":"kill"}'
PATIENCE_S = 10.0
"""How long to try to kill what does not die (uninterruptible sleep) before saying so."""
_LOOK_S = 0.1
"""Between two looks at how much was written to stdout and stderr."""


class Reaper:
    """The process above one command: its clock, its executioner and the adopter of its orphans."""

    def __init__(self, files: Files, home: CgroupHome, tasks: int) -> None:
        """`tasks`: how many processes and threads our user had lately, when we are not root."""
        self._files = files
        self._home = home
        self._tasks = tasks
        self._cgroup: Cgroup | None = None
        self._control = socket.socket(fileno=files.control)
        self._watch = ChildWatch()
        self._pid = 0
        self._status = 0
        self._timed_out = False
        self._flooded = ""

    def run(self) -> None:
        """Run the command to its end and report it. Returns when nothing of it is left."""
        spec = json.loads(os.pread(self._files.spec, os.fstat(self._files.spec).st_size, 0))
        spec["reaper"] = os.getpid()
        os.setsid()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._report({"kind": "started"})
        try:
            spec["cgroups"], spec["rlimits"] = self._limit(spec["limits"])
        except OSError as error:
            self._report({"kind": "failed", "error": f"its limits cannot be set: {error}"})
            return
        try:
            self._run(spec)
        finally:
            if self._cgroup is not None:
                self._cgroup.remove()

    def _run(self, spec: Mapping[str, Any]) -> None:
        error_read, error_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        started = time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            become_command(spec, self._files, error_write)
        os.close(error_write)
        self._supervise(spec)
        wall_s = time.monotonic() - started
        self._signal_group(signal.SIGKILL)
        if not self._end_all(PATIENCE_S):
            self._report({"kind": "survivors"})
            self._end_all(math.inf)
        else:
            self._report(self._refusal(error_read) or self._result(spec, wall_s))

    def _limit(self, limits: Mapping[str, Any]) -> tuple[list[str], dict[str, int]]:
        """Make the control groups that the limits need; return them, and what else each process is to be limited to."""
        memory_bytes, cpus, processes = limits["memory_bytes"], limits["cpus"], limits["processes"]
        wanted = {"memory"} if memory_bytes is not None else set()
        if cpus is not None:
            wanted.add("cpu")
        if processes is not None and not limits["own_user"]:
            wanted.add("pids")
        paths: list[str] = []
        controllers = self._home.controllers & wanted
        if controllers:
            self._cgroup = self._home.create(f"{os.getpid()}", frozenset(controllers))
            self._cgroup.limit(memory_bytes, cpus, processes)
            paths = self._cgroup.paths()
        rlimits = {"RLIMIT_NOFILE": limits["open_files"], "RLIMIT_FSIZE": limits["file_bytes"]}
        if limits["own_user"]:
            rlimits["RLIMIT_NPROC"] = processes
        elif processes is not None and "pids" not in controllers and os.geteuid() != 0:
            rlimits["RLIMIT_NPROC"] = self._tasks + processes
        if "memory" not in controllers:
            rlimits["RLIMIT_DATA"] = memory_bytes
        return paths, {name: value for name, value in rlimits.items() if value is not None}

    def _floods(self, limit_bytes: int | None) -> bool:
        """Whether more was written to stdout or stderr than may be; remembers which."""
        if limit_bytes is not None:
            for name in ("stdout", "stderr"):
                if os.fstat(getattr(self._files, name)).st_size > limit_bytes:
                    self._flooded = name
        return bool(self._flooded)

    def _supervise(self, spec: Mapping[str, Any]) -> None:
        """Return when the command has ended, or has to be killed now."""
        timeout_s = spec["timeout_s"]
        end = time.monotonic() + timeout_s if timeout_s is not None else math.inf
        terminating = False
        poller = select.poll()
        poller.register(self._watch.fd, select.POLLIN)
        poller.register(self._control, select.POLLIN)
        while not self._has_ended():
            left_s = end - time.monotonic()
            if left_s <= 0:
                if terminating:
                    return
                terminating = self._timed_out = True
                end = self._terminate(spec, spec["kill_grace_s"])
                continue
            if self._floods(spec["limits"]["stream_bytes"]):
                return
            ready = poller.poll(math.ceil(min(left_s, _LOOK_S) * 1000))
            if any(fd == self._files.control for fd, _ in ready):
                if self._receive() != KILL:
                    return  # the server is gone
                if not terminating:
                    end = math.inf
                    terminating = True
                    self._terminate(spec, 0)
                end = min(end, time.monotonic() + spec["cancel_grace_s"])
            self._watch.clear()

    def _receive(self) -> bytes:
        try:
            return self._control.recv(64)
        except OSError:
            return b""

    def _terminate(self, spec: Mapping[str, Any], grace_s: float) -> float:
        """Ask the command's process group to end; return until when it may."""
        if spec["spare_leader"]:  # a wrapper that would take its command down with it, without any grace
            for pid, group in descendants().items():
                if group == self._pid != pid:
                    send_signal(pid, signal.SIGTERM)
        else:
            self._signal_group(signal.SIGTERM)
        return time.monotonic() + grace_s

    def _signal_group(self, number: int) -> None:
        # The leader is not reaped before this, so the number of the group cannot have become someone else's.
        try:
            os.killpg(self._pid, number)
        except (ProcessLookupError, PermissionError):
            send_signal(self._pid, number)  # not a group leader yet

    def _has_ended(self) -> bool:
        """Whether the command is dead, still unreaped. Reaps its orphans."""
        while (child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if child.si_pid == self._pid:
                return True
            os.waitpid(child.si_pid, 0)
        return False

    def _end_all(self, patience_s: float) -> bool:
        """Kill and reap everything below us; return False if something still lives after `patience_s`."""
        give_up = time.monotonic() + patience_s
        while self._reap():
            if time.monotonic() > give_up:
                return False
            kill_descendants()
            select.select([self._watch.fd], [], [], 0.02)
            self._watch.clear()
        return True

    def _reap(self) -> bool:
        """Reap all the dead; return whether a child is left. No child means no descendant: orphans come to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self._status = status

    def _refusal(self, error_fd: int) -> dict[str, Any] | None:
        """Return what the fork said when it could not become the command."""
        try:
            data = os.read(error_fd, 65536)
        except BlockingIOError:
            return None
        return dict(json.loads(data)) if data else None

    def _result(self, spec: Mapping[str, Any], wall_s: float) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        cgroup = self._cgroup
        self._floods(spec["limits"]["stream_bytes"])
        killed = os.WIFSIGNALED(self._status)
        return {
            "kind": "ended",
            "exit_code": None if killed else os.WEXITSTATUS(self._status),
            "signal": os.WTERMSIG(self._status) if killed else None,
            "timed_out": self._timed_out,
            "wall_s": wall_s,
            "user_cpu_s": usage.ru_utime,
            "system_cpu_s": usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
            "flooded": self._flooded,
            "out_of_memory": cgroup is not None and cgroup.out_of_memory(),
            "memory_peak_bytes": None if cgroup is None else cgroup.memory_peak_bytes(),
            "limited_by": sorted(cgroup.directories) if cgroup is not None else [],
        }

    def _report(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the server is gone; killing goes on
            self._control.send(json.dumps(message).encode())
