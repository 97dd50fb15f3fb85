"""The spawner: a small process that starts commands, and ends everything they started.

Why it exists: forking a large threaded gRPC process is slow and unsafe, and who parses the network should not be who
forks. This file is run as a program, `python -I -S spawner.py FD`, and imports nothing but the standard library.

FD is one end of a SOCK_SEQPACKET pair to the server. The only message is `RUN` with descriptors attached, in the order
of `Files`; the spawner forks a *reaper* for it and goes on. The reaper reads the spec, runs the command, and speaks
with the server over its own control socket: it sends `{"kind": "started"}`, then one result once nothing that the
command started is alive; it takes `KILL`. Lifetimes hang on sockets, not on signals: when the server dies its sockets
close, the reapers kill their actions at once and the spawner ends after them. When the spawner dies, running reapers
go on serving their actions. When a reaper is killed (an action of the same user can do that), its descendants fall to
the spawner, which kills them before it lets go of the control socket: its end of file says "all dead" too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Set
from typing import Any, NamedTuple, NoReturn

RUN = b'{"op":"run"}'
KILL = b'{"op":"kill"}'
FIRST_EXTRA_FD = 3
"""Extra descriptors of a command are 3, 4, ... in it."""

_MAX_FDS = 16
PATIENCE_S = 10.0
"""How long to try to kill what does not die (uninterruptible sleep) before saying so."""
_TEXT_BUSY_RETRIES = 6
_BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Not for the spawner and the reapers: they are sent to whole services; our end is the end of the socket.

Blocked rather than ignored, so that what is sent to a command before it has become one is not lost.
"""
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_SYS_CLOSE_RANGE, _CLOSE_RANGE_CLOEXEC = 436, 4  # the same number on every architecture

_libc = ctypes.CDLL(None, use_errno=True)


class Files(NamedTuple):
    """The descriptors of a RUN message: spec (JSON in a memfd), control socket, the command's output and input root."""

    spec: int
    control: int
    stdout: int
    stderr: int
    root: int
    extra: tuple[int, ...] = ()


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


# ---- processes -------------------------------------------------------------------------------------------------


def _descendants(spare: Set[int] = frozenset()) -> dict[int, int]:
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


def _send_signal(pid: int, number: int) -> None:
    # Between the look at /proc and this, the pid cannot have come round to another process: pids are given in turn.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _kill_descendants(spare: Set[int] = frozenset()) -> bool:
    """Kill our descendants but `spare`; return whether there were any.

    Stopped first, until a look finds no new one, so that a fork bomb cannot outrun us.
    """
    stopped: set[int] = set()
    for _ in range(100):
        new = _descendants(spare).keys() - stopped
        if not new:
            break
        for pid in new:
            _send_signal(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        _send_signal(pid, signal.SIGKILL)
    return bool(stopped)


class _ChildWatch:
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


# ---- the command -----------------------------------------------------------------------------------------------


class _Refused(Exception):
    """The command did not start; the argument is the result message."""

    def __init__(self, kind: str, **details: object) -> None:
        super().__init__(kind)
        self.message = {"kind": kind, **details}


def _become_command(spec: Mapping[str, Any], files: Files, error_fd: int) -> NoReturn:
    """Turn this fresh fork of a reaper into the command, or tell `error_fd` why not."""
    try:
        error_fd, root, *extra = (
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in (error_fd, files.root, *files.extra)
        )
        for target, fd in enumerate((files.stdout, files.stderr, *extra), start=1):
            os.dup2(fd, target)
        _reset_process(spec["max_processes"])
        _take_identity(spec["uid"], spec["gid"])
        _enter_directory(root, spec["cwd"])
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != spec["reaper"]:
            os._exit(127)
        _libc.syscall(_SYS_CLOSE_RANGE, FIRST_EXTRA_FD + len(files.extra), 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC)
        _execute(spec["argv"], spec["env"])
    except _Refused as refused:
        message = refused.message
    except BaseException as error:
        message = {"kind": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    os.write(error_fd, json.dumps(message).encode())
    os._exit(127)


def _reset_process(max_processes: int | None) -> None:
    """A session of its own, and nothing inherited from how the server was started."""
    os.setsid()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if max_processes is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (max_processes, max_processes))


def _take_identity(uid: int | None, gid: int | None) -> None:
    if uid is None or gid is None:
        return
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        return
    raise OSError(errno.EPERM, "the rights of root could not be given up")


def _enter_directory(root: int, components: list[str]) -> None:
    """Go to a directory beneath `root`, one component at a time and through no symbolic link."""
    fd = root
    try:
        for component in components:
            fd = os.open(component, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        os.fchdir(fd)
    except (OSError, ValueError) as error:
        raise _Refused("working_directory", error=getattr(error, "strerror", None) or str(error)) from error


def _execute(argv: list[str], env: Mapping[str, str]) -> NoReturn:
    """Execute argv[0] as execvp(3) finds it, in the command's own PATH and without its fallback to a shell."""
    arguments = [_encode(argument) for argument in argv]
    environment = {_encode(name): _encode(value) for name, value in env.items()}
    program = arguments[0]
    places = (
        [program] if b"/" in program else [(at or b".") + b"/" + program for at in env["PATH"].encode().split(b":")]
    )
    refusal = _Refused("cannot_exec", reason="missing", error=os.strerror(errno.ENOENT))
    for place in places:
        try:
            _execve(place, arguments, environment)
        except ValueError as error:
            raise _Refused("cannot_exec", reason="invalid", error=str(error)) from error
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.exists(place):
                continue
            if refusal.message["reason"] == "missing":
                refusal = _Refused("cannot_exec", reason=_why(place, error), error=os.strerror(error.errno or 0))
            if error.errno not in (errno.ENOENT, errno.EACCES):
                break
    raise refusal


def _execve(place: bytes, arguments: list[bytes], environment: dict[bytes, bytes]) -> NoReturn:
    for attempt in range(_TEXT_BUSY_RETRIES):
        try:
            os.execve(place, arguments, environment)
        except OSError as error:
            if error.errno != errno.ETXTBSY or attempt == _TEXT_BUSY_RETRIES - 1:
                raise
        time.sleep(0.01 * 2**attempt)  # some process that is about to end still has it open for writing
    raise AssertionError


def _why(place: bytes, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "interpreter"
    if error.errno == errno.EACCES:
        return "directory" if os.path.isdir(place) else "permission"
    return {errno.ENOEXEC: "format", errno.E2BIG: "too_long"}.get(error.errno or 0, "other")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# ---- the reaper ------------------------------------------------------------------------------------------------


class Reaper:
    """The process above one command: its clock, its executioner and the adopter of its orphans."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._control = socket.socket(fileno=files.control)
        self._watch = _ChildWatch()
        self._pid = 0
        self._status = 0
        self._timed_out = False

    def run(self) -> None:
        """Run the command to its end and report it. Returns when nothing of it is left."""
        spec = json.loads(os.pread(self._files.spec, os.fstat(self._files.spec).st_size, 0))
        spec["reaper"] = os.getpid()
        os.setsid()
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._report({"kind": "started"})
        error_read, error_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        started = time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            _become_command(spec, self._files, error_write)
        os.close(error_write)
        self._supervise(spec)
        wall_s = time.monotonic() - started
        self._signal_group(signal.SIGKILL)
        if not self._end_all(PATIENCE_S):
            self._report({"kind": "survivors"})
            self._end_all(math.inf)
        else:
            self._report(self._refusal(error_read) or self._result(wall_s))

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
            ready = poller.poll(min(math.ceil(left_s * 1000), 86_400_000) if left_s < math.inf else None)
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
            for pid, group in _descendants().items():
                if group == self._pid != pid:
                    _send_signal(pid, signal.SIGTERM)
        else:
            self._signal_group(signal.SIGTERM)
        return time.monotonic() + grace_s

    def _signal_group(self, number: int) -> None:
        # The leader is not reaped before this, so the number of the group cannot have become someone else's.
        try:
            os.killpg(self._pid, number)
        except (ProcessLookupError, PermissionError):
            _send_signal(self._pid, number)  # not a group leader yet

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
            _kill_descendants()
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

    def _result(self, wall_s: float) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
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
        }

    def _report(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the server is gone; killing goes on
            self._control.send(json.dumps(message).encode())


# ---- the spawner -----------------------------------------------------------------------------------------------


class Spawner:
    """The process between the server and the reapers."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._controls: dict[int, int] = {}  # reaper -> our copy of its control socket, closed after its death
        self._watch = _ChildWatch()

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
        try:
            pid = os.fork()
        except OSError as error:
            with socket.socket(fileno=files.control) as control:
                control.send(json.dumps({"kind": "failed", "error": f"fork: {error.strerror}"}).encode())
            return
        if pid == 0:
            self._become_reaper(files)
        self._controls[pid] = files.control

    def _become_reaper(self, files: Files) -> NoReturn:
        try:
            self._watch.close()
            self._server.close()
            for fd in self._controls.values():
                os.close(fd)
            Reaper(files).run()
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
        while _kill_descendants(self._controls.keys()) and time.monotonic() < give_up:
            for pid in _descendants(self._controls.keys()):
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
    _prctl(_PR_SET_DUMPABLE, 0)  # actions of the same user cannot look into us
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    spawner = Spawner(server)
    gc.disable()
    gc.freeze()
    spawner.run()


if __name__ == "__main__":
    main()
