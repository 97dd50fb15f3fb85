"""Servers to attack, one for each level, and what is around them."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from tests.attacks.attack import CANARY, LEVELS, Level, Target
from tests.attacks.running import POISON
from tests.support.actions import Client, Executable, Node, build_action
from tests.support.files import scratch_directory
from tests.support.processes import process_tree
from tests.support.require import require_tool, unavailable
from tests.support.server import Config, ReServer, host_pool_config

SLOTS = (54800, 54801)
"""The users of the two slots, as root."""
_NOBODY = 65534


@contextlib.asynccontextmanager
async def arena(level: Level) -> AsyncIterator[tuple[Target, ReServer]]:
    """Start a server of a level, with secrets and sockets around it, and clean up what attacks leave outside of it."""
    assert level in LEVELS
    if level != "user" and os.geteuid() != 0:
        unavailable(f"level {level} needs root")
    mark = f"expbuild-attack-{uuid.uuid4().hex}"
    with scratch_directory("expbuild-attacks-") as directory, contextlib.ExitStack() as stack:
        state = directory / "state"
        state.mkdir()
        uid = _NOBODY if level == "user" and os.geteuid() == 0 else os.geteuid()
        secret = state / "secret"
        secret.write_bytes(CANARY)
        secret.chmod(0o600)
        (directory / "victim").mkdir()
        (directory / "victim/file").touch()
        for path in (state, secret):
            os.chown(path, uid, -1)
        for name, mode in (("open.sock", 0o777), ("private.sock", 0o600)):
            stack.enter_context(_listening(str(directory / name)))
            (directory / name).chmod(mode)
        stack.enter_context(_listening(f"\0{mark}"))
        stack.callback(_clean_up, mark)
        python = _as_nobody() if uid != os.geteuid() else (sys.executable,)
        environment = {"EXPBUILD_ATTACK_SECRET": CANARY.decode()}
        server = stack.enter_context(ReServer(directory, _config(state, level), python=python, env=environment))
        async with Client(server.address) as client:
            await _plant(client)
            names = {
                "SECRET": secret,
                "STATE": state,
                "CAS": state / "cas",
                "AC": state / "action-cache",
                "WORK": state / "work",
                "BLOB": poison_files(state)[0],
                "SERVER": server.pid,
                "SPAWNER": next(p.pid for p in process_tree(server.pid) if p.parent == server.pid),
                "PORT": server.address.rpartition(":")[2],
                "SOCKET": directory / "open.sock",
                "PRIVATE": directory / "private.sock",
                "ABSTRACT": mark,
                "MARK": mark,
                "VICTIM": directory / "victim",
                "HOSTNAME": socket.gethostname(),
            }
            yield Target(client, level, state, {name: str(value) for name, value in names.items()}), server


def poison_files(state: Path) -> list[Path]:
    """Return the files that hold the blob which attacks try to change: one to read and one to execute."""
    files = (path for path in (state / "cas").rglob("*") if path.is_file() and path.stat().st_size == len(POISON))
    return sorted(path for path in files if path.read_bytes() == POISON)


def processes_of(uids: tuple[int, ...]) -> list[str]:
    """Return the ids of the processes that run as one of the users."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone meanwhile
            if entry.name.isdigit() and entry.stat().st_uid in uids:
                found.append(entry.name)
    return found


def _config(state: Path, level: Level) -> Config:
    config = host_pool_config(state, workers=len(SLOTS))
    pool = config["execution"]["pool"]
    pool.update(max_log_bytes=1 << 20, max_output_bytes=8 << 20, default_task_timeout_seconds=3)
    pool["workers"][0].update(
        isolation="uid" if level == "uid" else "namespaces",
        slot_uids=list(SLOTS),
        memory_limit=128 << 20,
        max_processes=200,
        max_open_files=256,
    )
    return config


async def _plant(client: Client) -> None:
    """Have the poison blob stored and used, in both its forms."""
    inputs: dict[str, Node] = {"in": POISON, "x": Executable(POISON)}
    await client.execute(build_action(("/bin/true",), inputs=inputs, salt=os.urandom(8)))


@contextlib.contextmanager
def _listening(address: str) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(100)
        yield


def _as_nobody() -> tuple[str, ...]:
    """Return a command that is our Python as user nobody; where that lies in a closed directory, with it opened up."""
    script = "set -e\n"
    prefix = Path(sys.base_prefix)
    closed = next((path for path in reversed(prefix.parents) if not path.stat().st_mode & stat.S_IXOTH), None)
    if closed is not None:
        shown = shlex.quote(str(closed / prefix.relative_to(closed).parts[0]))
        script += (
            f"mount --bind {shown} /mnt; mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(closed))}\n"
            f"mkdir {shown}; mount --bind /mnt {shown}; umount /mnt\n"
        )
    script += f'exec {require_tool("setpriv")} --reuid={_NOBODY} --regid={_NOBODY} --clear-groups "$@"'
    return (require_tool("unshare"), "--mount", "--", "/bin/sh", "-c", script, "sh", sys.executable, "-B")


def _clean_up(mark: str) -> None:
    """Remove what attacks at level `uid` leave on this machine: nothing there is private."""
    for directory in ("/tmp", "/var/tmp", "/dev/shm"):
        Path(directory, mark).unlink(missing_ok=True)
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "4242" and int(fields[7]) in SLOTS:
            subprocess.run(["ipcrm", "--shmem-id", fields[1]], check=True)
