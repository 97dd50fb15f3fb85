"""After many actions, some of which misbehave, nothing is left: process, control group, mount, file or descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.attacks.arena import SLOTS, arena, processes_of
from tests.attacks.attack import Level, Target
from tests.support.actions import BuiltAction, eventually, shell
from tests.support.require import only_in_full_runs

_WELL_BEHAVED: tuple[Callable[[], BuiltAction], ...] = (
    lambda: shell("echo out > out; echo words", output_paths=["out"]),
    lambda: shell("cat a/b c > out", inputs={"a": {"b": b"x"}, "c": b""}, output_paths=["out"]),
    lambda: shell("mkdir -p d/e; echo x > d/e/f", output_paths=["d"]),
    lambda: shell("exit 3"),
)
_MISBEHAVED: tuple[Callable[[], BuiltAction], ...] = (
    lambda: shell("setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' & sleep 0.05"),
    lambda: shell("exec sleep 100000", timeout_s=0.2),
    lambda: shell("kill -9 -1"),
    lambda: shell("mkdir -p d/e; mkfifo d/p; chmod 000 d", output_paths=["d"]),
    lambda: shell("yes"),
    lambda: shell("echo x", output_paths=["../x"]),
    lambda: shell("ln -s / out; echo x > $TMPDIR/x", output_paths=["out/x"]),
)
_AT_ONCE = 8


@pytest.mark.parametrize(
    ("level", "count"),
    [
        ("uid", 200),
        pytest.param("uid", 1000, marks=only_in_full_runs),
        pytest.param("namespaces", 1000, marks=only_in_full_runs),
    ],
)
async def test_nothing_is_left_after_many_actions(level: Level, count: int) -> None:
    """One in ten misbehaves, each in another way in turn."""
    async with arena(level) as (target, _):
        await _run(target, 20)
        await eventually(lambda: _is_quiet(target), "the server is quiet after the first actions", timeout_s=60)
        before = _traces(target)
        await _run(target, count)
        await eventually(lambda: _is_quiet(target), "the server is quiet after the last actions", timeout_s=60)
        # A look can see what is just being closed: less than before is as good.
        await eventually(
            lambda: all(count <= before[what] for what, count in _traces(target).items()),
            f"no more than before: {before}",
            timeout_s=60,
        )


async def _run(target: Target, count: int) -> None:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int) -> None:
        kinds = _MISBEHAVED if number % 10 == 0 else _WELL_BEHAVED
        index = number // 10 if number % 10 == 0 else number
        async with gate:
            with contextlib.suppress(grpc.aio.AioRpcError):  # one of the kinds is a request that is refused
                await target.client.execute(kinds[index % len(kinds)]())

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(one(number))


def _is_quiet(target: Target) -> bool:
    """No process of a slot, no workspace."""
    workspaces = [name for slot in (0, 1) for name in os.listdir(target.state / "work" / f"host-{slot}")]
    return not workspaces and not processes_of(SLOTS)


def _traces(target: Target) -> dict[str, int]:
    """What must not grow. (What the server itself has open varies with its connections and its housekeeping.)"""
    spawner = Path("/proc", target.names["SPAWNER"])
    opened = []
    for link in Path("/proc", target.names["SERVER"], "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened.append(os.readlink(link))
    groups = [path for path in Path("/sys/fs/cgroup").rglob(f"expbuild-{target.names['SPAWNER']}/*") if path.is_dir()]
    return {
        "descriptors of the spawner": len(list((spawner / "fd").iterdir())),
        "workspaces the server has open": sum("/work/host-" in name and ".lock" not in name for name in opened),
        "mounts": len(Path("/proc", target.names["SERVER"], "mounts").read_text().splitlines()),
        "control groups": len(groups),
        "files beside the state": len(list(target.state.parent.iterdir())),
    }
