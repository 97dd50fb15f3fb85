"""From a fresh fork of a reaper to the command of an action. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from expbuild.workers.spawner_processes import PR_SET_PDEATHSIG, libc, prctl

FIRST_EXTRA_FD = 3
"""Extra descriptors of a command are 3, 4, ... in it."""
_TEXT_BUSY_RETRIES = 6
_SYS_CLOSE_RANGE, _CLOSE_RANGE_CLOEXEC = 436, 4  # the same number on every architecture


class Files(NamedTuple):
    """The descriptors of a RUN message: spec (JSON in a memfd), control socket, the command's output and input root."""

    spec: int
    control: int
    stdout: int
    stderr: int
    root: int
    extra: tuple[int, ...] = ()


class Refused(Exception):
    """The command did not start; the argument is the result message."""

    def __init__(self, kind: str, **details: object) -> None:
        super().__init__(kind)
        self.message = {"kind": kind, **details}


def become_command(spec: Mapping[str, Any], files: Files, error_fd: int) -> NoReturn:
    """Turn this fresh fork of a reaper into the command, or tell `error_fd` why not."""
    try:
        error_fd, root, *extra = (
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in (error_fd, files.root, *files.extra)
        )
        for target, fd in enumerate((files.stdout, files.stderr, *extra), start=1):
            os.dup2(fd, target)
        _join(spec["cgroups"])
        _reset_process(spec["rlimits"])
        _take_identity(spec["uid"], spec["gid"])
        _enter_directory(root, spec["cwd"])
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != spec["reaper"]:
            os._exit(127)
        libc.syscall(_SYS_CLOSE_RANGE, FIRST_EXTRA_FD + len(files.extra), 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC)
        _execute(spec["argv"], spec["env"])
    except Refused as refused:
        message = refused.message
    except BaseException as error:
        message = {"kind": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    os.write(error_fd, json.dumps(message).encode())
    os._exit(127)


def _join(cgroups: list[str]) -> None:
    for path in cgroups:
        fd = os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"0")
        os.close(fd)
    with contextlib.suppress(OSError):  # rather an action than the server, when the memory of the machine is used up
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"500")
        os.close(fd)


def _reset_process(rlimits: Mapping[str, int]) -> None:
    """A session of its own, and nothing inherited from how the server was started."""
    os.setsid()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, value in rlimits.items():
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(number, (value, value))


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
        raise Refused("working_directory", error=getattr(error, "strerror", None) or str(error)) from error


def _execute(argv: list[str], env: Mapping[str, str]) -> NoReturn:
    """Execute argv[0] as execvp(3) finds it, in the command's own PATH and without its fallback to a shell."""
    arguments = [_encode(argument) for argument in argv]
    environment = {_encode(name): _encode(value) for name, value in env.items()}
    program = arguments[0]
    places = (
        [program] if b"/" in program else [(at or b".") + b"/" + program for at in env["PATH"].encode().split(b":")]
    )
    refusal = Refused("cannot_exec", reason="missing", error=os.strerror(errno.ENOENT))
    for place in places:
        try:
            _execve(place, arguments, environment)
        except ValueError as error:
            raise Refused("cannot_exec", reason="invalid", error=str(error)) from error
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.exists(place):
                continue
            if refusal.message["reason"] == "missing":
                refusal = Refused("cannot_exec", reason=_why(place, error), error=os.strerror(error.errno or 0))
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
