"""A Docker daemon for tests, and an image that was made here: nothing is ever pulled."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.files import scratch_directory
from tests.support.processes import process_tree
from tests.support.require import require_tool, unavailable

_DEFAULT_HOST = "unix:///var/run/docker.sock"
_START_TIMEOUT_S = 60
_STOP_TIMEOUT_S = 30
_IMAGE = "expbuild-test-busybox"

_PASSWD = """\
root:x:0:0:root:/root:/bin/sh
builder:x:1000:1000:builder:/home/builder:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
"""
_GROUP = "root:x:0:\nbuilder:x:1000:\nnogroup:x:65534:\n"


@dataclass(frozen=True, slots=True)
class DockerDaemon:
    """A daemon that answers. `host` is what DOCKER_HOST has to be to reach it."""

    host: str

    def run(self, *args: str, stdin: bytes | None = None, timeout_s: float = 60) -> str:
        """Run one command of the docker client and return its stdout. Raises AssertionError when it fails."""
        # Without the user's own client configuration: it may add proxies and credentials to what we do.
        result = subprocess.run(
            ["docker", *args],
            env={"PATH": os.environ["PATH"], "DOCKER_HOST": self.host, "DOCKER_CONFIG": "/nonexistent"},
            input=b"" if stdin is None else stdin,
            capture_output=True,
            timeout=timeout_s,
        )
        stdout, stderr = (text.decode(errors="replace") for text in (result.stdout, result.stderr))
        assert result.returncode == 0, f"docker {args[0]} ended with {result.returncode}\n{stdout}\n{stderr}"
        return stdout

    def is_answering(self) -> bool:
        try:
            self.run("version", "--format", "{{.Server.Version}}", timeout_s=10)
        except (AssertionError, subprocess.TimeoutExpired):
            return False
        return True


@contextmanager
def docker_daemon() -> Iterator[DockerDaemon]:
    """Give a daemon: the one that runs here already, else one of our own for as long as the context lasts.

    Ours has its socket and all its state in a scratch directory. It sets up no bridge and no firewall rules, which
    belong to the machine, so its containers have the networks `none` and `host` only.
    Without either the running test is skipped, loudly.
    """
    require_tool("docker")
    running = DockerDaemon(os.environ.get("DOCKER_HOST") or _DEFAULT_HOST)
    if running.is_answering():
        yield running
    elif os.geteuid() != 0:
        unavailable(f"no Docker daemon answers at {running.host}, and only root can start one")
    else:
        with scratch_directory("expbuild-docker-") as directory:
            yield from _private_daemon(require_tool("dockerd"), directory)


def busybox_image(docker_host: str) -> str:
    """Make an image that holds a static busybox and little else, unless the daemon has it; return its name.

    All of busybox's commands are in /bin, /tmp is writable for everyone, uid 1000 is `builder`.
    """
    daemon = DockerDaemon(docker_host)
    archive = _busybox_archive(Path(require_tool("busybox")))
    name = f"{_IMAGE}:{hashlib.sha256(archive).hexdigest()[:16]}"
    if not daemon.run("images", "--quiet", name).strip():
        daemon.run(
            "import", "--change", "ENV PATH=/bin:/usr/bin", "--change", 'CMD ["/bin/sh"]', "-", name, stdin=archive
        )
    return name


def _private_daemon(dockerd: str, directory: Path) -> Iterator[DockerDaemon]:
    daemon = DockerDaemon(f"unix://{directory / 'docker.sock'}")
    log_file = directory / "dockerd.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [
                dockerd,
                f"--data-root={directory / 'data'}",
                f"--exec-root={directory / 'exec'}",
                f"--pidfile={directory / 'docker.pid'}",
                f"--host={daemon.host}",
                "--config-file=",  # the machine's /etc/docker/daemon.json is not for us
                "--exec-opt=native.cgroupdriver=cgroupfs",
                "--bridge=none",
                "--iptables=false",
                "--ip6tables=false",
                "--ip-forward=false",
                "--shutdown-timeout=5",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not daemon.is_answering():
            if process.poll() is not None or time.monotonic() > deadline:
                unavailable(f"dockerd does not start here:\n{log_file.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield daemon
    finally:
        _stop(daemon, process, directory)


def _stop(daemon: DockerDaemon, process: subprocess.Popen[bytes], directory: Path) -> None:
    """End the daemon and everything it leaves: its containerd, shims of containers that live on, and mounts."""
    # Left to itself dockerd asks every container to end, and most have a first process that does not listen.
    with suppress(AssertionError, subprocess.TimeoutExpired):
        if containers := daemon.run("ps", "--quiet").split():
            daemon.run("kill", *containers)
    descendants = process_tree(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in descendants:
        if child.is_alive():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
    # Shims are started detached, so they are nobody's descendants; but their arguments name our directory.
    for pid in _processes_mentioning(directory):
        for member in reversed(process_tree(pid)):
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
    for mount_point in reversed(_mounts_below(directory)):
        subprocess.run(["umount", "--lazy", mount_point], check=False, capture_output=True)


def _processes_mentioning(directory: Path) -> list[int]:
    wanted, pids = os.fsencode(directory), []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with suppress(OSError):
                if wanted in Path(f"/proc/{name}/cmdline").read_bytes():
                    pids.append(int(name))
    return pids


def _mounts_below(directory: Path) -> list[str]:
    """Return the mount points under `directory`, in the order they were mounted."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{directory}/")]


def _busybox_archive(busybox: Path) -> bytes:
    """Return the image's file system as a tar archive; the same busybox gives the same bytes."""
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        _add(archive, "bin", tarfile.DIRTYPE)
        _add(archive, "bin/busybox", tarfile.REGTYPE, content=busybox.read_bytes())
        for applet in sorted(set(applets) - {"busybox"}):
            _add(archive, f"bin/{applet}", tarfile.SYMTYPE, target="busybox")
        for directory in ("etc", "home", "root", "usr", "usr/bin"):
            _add(archive, directory, tarfile.DIRTYPE)
        _add(archive, "home/builder", tarfile.DIRTYPE, uid=1000)
        _add(archive, "tmp", tarfile.DIRTYPE, mode=0o1777)
        _add(archive, "usr/bin/env", tarfile.SYMTYPE, target="../../bin/busybox")
        _add(archive, "etc/passwd", tarfile.REGTYPE, mode=0o644, content=_PASSWD.encode())
        _add(archive, "etc/group", tarfile.REGTYPE, mode=0o644, content=_GROUP.encode())
    return buffer.getvalue()


def _add(
    archive: tarfile.TarFile,
    name: str,
    kind: bytes,
    *,
    mode: int = 0o755,
    uid: int = 0,
    target: str = "",
    content: bytes = b"",
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.linkname, info.size = kind, mode, uid, uid, target, len(content)
    archive.addfile(info, io.BytesIO(content))
