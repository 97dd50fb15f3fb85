"""The private root of an action: namespaces by bubblewrap, described as arguments for it.

An action sees the system's programs and libraries read-only, a few files of /etc, its own /dev, /proc and /tmp, and its
input root at `INPUT_ROOT`; it has process, IPC, host name, user and network namespaces of its own, so nothing of the
rest of the machine: no file, no process, no network. Works without any privilege where the kernel lets ordinary users
create user namespaces, and in particular after the switch to the user of a slot.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expbuild.errors import InvalidArgument, StartupError, WorkerFailed
from expbuild.workers.base import Run
from expbuild.workers.spawner_client import CannotExecute

INPUT_ROOT = "/workspace"
"""Where an action finds its input root: the same as in a container, so that paths in outputs do not differ."""
TMPDIR = "/tmp"
"""The workspace's tmp/, as an action sees it."""

OPTIONS_FD, STATUS_FD = 3, 4
"""Descriptors of bubblewrap: its options, NUL-separated; and its report, for `refusal`."""

_MAX_ARGUMENTS = 9000
"""bubblewrap takes no more, options and command together."""

_MAX_STDERR_BYTES = 1 << 20
_REASONS = {
    os.strerror(number): reason
    for number, reason in (
        (errno.ENOENT, "missing"),
        (errno.EACCES, "permission"),
        (errno.ENOEXEC, "format"),
        (errno.E2BIG, "too_long"),
    )
}

_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = (
    "alternatives",
    "ca-certificates",
    "group",
    "hosts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "passwd",
    "pki/tls/certs",
    "protocols",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
)
"""What programs and compilers read of /etc; the java* of a JDK is added."""


@dataclass(frozen=True, slots=True)
class Sandboxed:
    """A command wrapped in bubblewrap: what to execute, and what it reads from `OPTIONS_FD`."""

    arguments: tuple[str, ...]
    options: bytes


class Sandbox:
    """Wraps commands so that they run in a private root.

    network: whether they have the network of the machine. read_only_paths: what they see beside the system.
    """

    def __init__(self, *, network: bool = False, read_only_paths: Sequence[Path] = ()) -> None:
        """Raises StartupError when bubblewrap is not installed."""
        program = shutil.which("bwrap")
        if program is None:
            raise StartupError("namespaces need bubblewrap, and there is no `bwrap` in the server's PATH")
        self._program = program
        self._namespaces = tuple(_namespaces(network=network))
        self._system = tuple(_system_root(network=network))
        self._paths = [str(path) for path in read_only_paths]

    def wrap(self, run: Run, environment: Mapping[str, str], *, input_is_root: bool = False) -> Sandboxed:
        """Return the command that runs `run` in a private root. `environment` is the whole of it.

        input_is_root: the input root is that root, with nothing of the system in it.

        Nothing the client sent is an option to bubblewrap or in its own environment. Raises InvalidArgument when
        there is more of it than bubblewrap takes.
        """
        _check_format(run)
        if input_is_root:
            _check_mount_points(run.workspace / "root")
            root = "/"
            options = [
                *self._namespaces,
                "--bind",
                str(run.workspace / "root"),
                "/",
                "--proc",
                "/proc",
                "--dev",
                "/dev",
            ]
            options += ["--bind", str(run.workspace / "tmp"), TMPDIR]
        else:
            root = INPUT_ROOT
            options = [*self._namespaces, *self._system, "--bind", str(run.workspace / "tmp"), TMPDIR]
            options += ["--bind", str(run.workspace / "root"), INPUT_ROOT]
            for path in self._paths:  # after /tmp, which would hide those below it
                options += ["--ro-bind-try", path, path]
            options += ["--remount-ro", "/"]
        options += ["--chdir", os.path.join(root, run.working_directory).rstrip("/") or "/", "--clearenv"]
        for name, value in environment.items():
            options += ["--setenv", name, value]
        arguments = (self._program, "--args", str(OPTIONS_FD), "--json-status-fd", str(STATUS_FD), "--", *run.arguments)
        if len(options) + len(arguments) > _MAX_ARGUMENTS:
            raise InvalidArgument(
                f"{len(run.arguments)} arguments and {len(environment)} variables are more than a worker with "
                f"namespaces takes: arguments plus three times the variables must stay below {_MAX_ARGUMENTS - 200}"
            )
        if any("\0" in option for option in options):
            raise InvalidArgument("an environment variable contains a NUL character")
        return Sandboxed(arguments, b"\0".join(os.fsencode(option) for option in options) + b"\0")


def refusal(report: bytes, stderr: Path) -> CannotExecute | None:
    """Return why bubblewrap did not execute the command; None when it did.

    Only then does its report contain an exit code; otherwise `stderr` holds nothing but its own words. Raises
    WorkerFailed when the private root could not be made.
    """
    if any("exit-code" in json.loads(line) for line in report.splitlines()):
        return None
    with open(stderr, "rb") as file:
        words = file.read(_MAX_STDERR_BYTES).decode(errors="replace").strip()
    if words.startswith("bwrap: execvp "):
        error = words.rpartition(": ")[2]
        return CannotExecute(_REASONS.get(error, "other"), error)
    raise WorkerFailed(f"the private root could not be made: {words or 'bubblewrap gave no reason'}")


_MOUNT_POINTS = ("dev", "proc", "tmp")
"""What bubblewrap creates in an input root that is to be /, where it is not there."""


@contextlib.contextmanager
def without_mount_points(root: Path) -> Iterator[None]:
    """Remove in the end what a run with this input root as / created for its mounts, where it is still empty."""
    absent = [path for name in _MOUNT_POINTS if not os.path.lexists(path := root / name)]
    try:
        yield
    finally:
        for path in absent:
            with contextlib.suppress(OSError):
                path.rmdir()


def _check_format(run: Run) -> None:
    """Refuse a script without a #! line, which bubblewrap would hand to a shell."""
    program = run.arguments[0]
    path = run.workspace / "root" / run.working_directory / program
    if "/" not in program or program.startswith("/") or "\0" in program or path.is_symlink():
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # bubblewrap will say why it cannot be executed
    try:
        mode = os.fstat(fd).st_mode
        start = os.read(fd, 4) if stat.S_ISREG(mode) and mode & 0o111 else b"#!"
    finally:
        os.close(fd)
    if start[:2] != b"#!" and start != b"\x7fELF":
        raise InvalidArgument(f"program {program!r} is neither a binary of this machine nor a script with a #! line")


def _check_mount_points(root: Path) -> None:
    for name in _MOUNT_POINTS:
        path = root / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InvalidArgument(f"{name!r} of the input root must be a directory, since the input root becomes /")


def _namespaces(*, network: bool) -> Iterator[str]:
    yield from ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts")
    if not network:
        yield "--unshare-net"
    yield from ("--unshare-cgroup-try", "--die-with-parent", "--hostname", "expbuild")


def _system_root(*, network: bool) -> Iterator[str]:
    yield from ("--ro-bind", "/usr", "/usr")
    for name in _SYSTEM:
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", os.readlink(path), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    jdks = (path.name for path in sorted(Path("/etc").glob("java*")))
    for name in (*_ETC, *jdks):
        yield from ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")
    if network:
        yield from ("--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf")
    yield from ("--proc", "/proc", "--dev", "/dev", "--dir", "/var", "--symlink", TMPDIR, "/var/tmp")
