"""The spawner and its client, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import uvloop

from expbuild.errors import WorkerFailed
from expbuild.workers.base import DEFAULT_PATH, Owner
from expbuild.workers.limits import Limits
from expbuild.workers.spawner_client import BadWorkingDirectory, CannotExecute, Ended, Spawn, Spawner, SpawnResult
from tests.support.processes import process_tree
from tests.support.require import require_tool
from tests.workers.contract import DAEMON, processes_with, wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: switching users needs root")
FORK_BOMB_USER = Owner(100_000 + os.getpid() % 100_000, 61183)  # nobody else's: its processes are counted


@dataclass
class Desk:
    """A spawner, and a directory with open files to run commands in."""

    spawner: Spawner
    path: Path
    root: int
    output: int
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def spawn(self, *arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> Spawn:
        environment = {"PATH": DEFAULT_PATH, "EXPBUILD_TEST_MARK": self.mark, **(env or {})}
        return Spawn(arguments, environment, self.root, self.output, self.output, **options)

    async def run(self, *arguments: str, **options: Any) -> SpawnResult:
        return await self.spawner.run(self.spawn(*arguments, **options))

    def start_sh(self, script: str, **options: Any) -> asyncio.Task[SpawnResult]:
        return asyncio.create_task(self.run("/bin/sh", "-c", script, **options))

    @property
    def spawner_pid(self) -> int:
        assert self.spawner.pid is not None
        return self.spawner.pid

    def survivors(self) -> list[str]:
        return processes_with(f"EXPBUILD_TEST_MARK={self.mark}")

    def reapers(self) -> list[int]:
        return [process.pid for process in process_tree(self.spawner_pid) if process.parent == self.spawner_pid]


@contextlib.contextmanager
def open_files(path: Path) -> Iterator[tuple[int, int]]:
    (path / "root").mkdir(mode=0o777)
    (path / "root").chmod(0o777)
    root = os.open(path / "root", os.O_PATH | os.O_DIRECTORY)
    output = os.open(path / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        yield root, output
    finally:
        os.close(root)
        os.close(output)


@pytest.fixture
async def desk(base_dir: Path) -> AsyncIterator[Desk]:
    spawner = Spawner()
    with open_files(base_dir) as (root, output):
        await spawner.start()
        try:
            yield Desk(spawner, base_dir / "root", root, output)
        finally:
            await spawner.close()


def is_ended(result: SpawnResult, exit_code: int) -> bool:
    return isinstance(result, Ended) and result.exit_code == exit_code


async def test_result_has_the_resources_used(desk: Desk) -> None:
    """CPU time of all processes together, memory of the largest, time on the clock."""
    result = await desk.run("/bin/sh", "-c", "(i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done); exit 4")
    assert isinstance(result, Ended)
    assert (result.exit_code, result.signal, result.timed_out) == (4, None, False)
    assert 0.01 < result.user_cpu_s + result.system_cpu_s < result.wall_s + 1
    assert 1 << 20 < result.max_rss_bytes < 1 << 30


async def test_spawner_is_small_and_knows_nothing_of_the_server(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, base_dir: Path
) -> None:
    """No environment and no descriptor of the server reach it, also when it is restarted."""
    monkeypatch.setenv("SECRET", "of the server")
    with open(base_dir / "open", "wb") as file:
        os.set_inheritable(file.fileno(), True)
        os.kill(desk.spawner_pid, signal.SIGKILL)
        assert is_ended(await desk.run("/bin/true"), 0)
        assert b"SECRET" not in Path("/proc", str(desk.spawner_pid), "environ").read_bytes()
        await wait_until(lambda: not desk.reapers())  # until then it is still closing what was the run's
        opened = {os.readlink(link) for link in Path("/proc", str(desk.spawner_pid), "fd").iterdir()}
    assert not any(str(base_dir) in name for name in opened)
    status = Path("/proc", str(desk.spawner_pid), "status").read_text()
    rss_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert rss_kib < 24 << 10


async def test_many_runs_at_once_leave_no_descriptor_and_no_process(desk: Desk) -> None:
    """Runs do not disturb each other, and nothing adds up."""
    await desk.run("/bin/true")
    await wait_until(lambda: not desk.reapers())
    ours = len(os.listdir("/proc/self/fd"))
    spawners = Path("/proc", str(desk.spawner_pid), "fd")
    before = len(list(spawners.iterdir()))
    results = await asyncio.gather(*(desk.run("/bin/sh", "-c", f"exit {n}") for n in range(100)))
    assert all(is_ended(result, number) for number, result in enumerate(results))
    await wait_until(lambda: not desk.reapers())
    assert len(os.listdir("/proc/self/fd")) == ours
    assert len(list(spawners.iterdir())) == before


@pytest.mark.parametrize("target", ["missing", "link", "link/below", "file", "a\0b"])
async def test_working_directory_is_a_real_directory(desk: Desk, target: str) -> None:
    """A working directory that is missing, a file, or behind a symbolic link is refused."""
    (desk.path / "real/below").mkdir(parents=True)
    (desk.path / "link").symlink_to("real")
    (desk.path / "file").touch()
    assert isinstance(await desk.run("/bin/true", working_directory=target), BadWorkingDirectory)
    assert is_ended(await desk.run("/bin/true", working_directory="real/below"), 0)


@pytest.mark.parametrize(
    ("arguments", "env", "reason"),
    [
        pytest.param(("missing",), {}, "missing", id="missing"),
        pytest.param(("",), {}, "invalid", id="empty"),
        pytest.param(("/etc/passwd/x",), {}, "missing", id="below-a-file"),
        pytest.param(("/etc",), {}, "directory", id="directory"),
        pytest.param(("/etc/passwd",), {}, "permission", id="permission"),
        pytest.param(("./text",), {}, "format", id="no-shebang"),
        pytest.param(("./lost",), {}, "interpreter", id="no-interpreter"),
        pytest.param(("./loop",), {}, "other", id="symlink-loop"),
        pytest.param(("text",), {"PATH": "/nowhere:."}, "format", id="in-path"),
        pytest.param(("/bin/true", "x" * 200_000), {}, "too_long", id="too-long"),
        pytest.param(("/bin/true", "a\0b"), {}, "invalid", id="nul"),
        pytest.param(("/bin/true",), {"A=B": "c"}, "invalid", id="variable-name"),
    ],
)
async def test_refusal_to_execute_has_its_reason(
    desk: Desk, arguments: tuple[str, ...], env: dict[str, str], reason: str
) -> None:
    """No shell is tried instead, and no refusal looks like an exit code."""
    for name, content in (("text", "echo hello\n"), ("lost", "#!/no/such/shell\n")):
        (desk.path / name).write_text(content)
        (desk.path / name).chmod(0o755)
    (desk.path / "loop").symlink_to("loop")
    result = await desk.run(*arguments, env=env)
    assert isinstance(result, CannotExecute)
    assert result.reason == reason


async def test_path_goes_on_after_what_cannot_be_executed(desk: Desk) -> None:
    """As execvp: a file without permission hides no later one."""
    for name, mode in (("first", 0o644), ("second", 0o755)):
        (desk.path / name).mkdir()
        (desk.path / name / "tool").write_text("#!/bin/sh\nexit 7\n")
        (desk.path / name / "tool").chmod(mode)
    assert is_ended(await desk.run("tool", env={"PATH": "first:second"}), 7)
    result = await desk.run("tool", env={"PATH": "first"})
    assert isinstance(result, CannotExecute)
    assert result.reason == "permission"


async def test_program_still_being_written_is_tried_again(desk: Desk) -> None:
    """A descriptor open for writing, in some process about to end, is waited for; not for ever."""
    tool = desk.path / "tool"
    tool.write_text("#!/bin/sh\nexit 7\n")
    tool.chmod(0o755)
    with open(tool, "ab"):
        result = await desk.run("./tool")
        assert isinstance(result, CannotExecute)
        running = asyncio.create_task(desk.run("./tool"))
        await wait_until(lambda: len(process_tree(desk.spawner_pid)) > 2)
    assert is_ended(await running, 7)


async def test_deadline_gives_a_grace(desk: Desk) -> None:
    """SIGTERM first, so that a command can tidy up; what it then exits with is kept."""
    script = "trap 'echo bye; exit 9' TERM; sleep 1000 & wait"
    result = await desk.run("/bin/sh", "-c", script, timeout_s=0.3)
    assert isinstance(result, Ended)
    assert (result.exit_code, result.timed_out) == (9, True)
    assert result.wall_s < 2
    result = await desk.run("/bin/sh", "-c", "trap '' TERM; sleep 1000", timeout_s=0.3, kill_grace_s=0.2)
    assert isinstance(result, Ended)
    assert (result.signal, result.timed_out) == (signal.SIGKILL, True)
    assert 0.45 < result.wall_s < 5


async def test_cancelled_run_is_dead_within_two_seconds(desk: Desk) -> None:
    """A command that ignores SIGTERM costs the caller a short grace, one that does not nothing."""
    for prefix, limit_s in (("trap '' TERM;", 2.0), ("", 0.9)):
        (desk.path / "ready").unlink(missing_ok=True)
        running = desk.start_sh(f"{prefix} : > ready; sleep 1000")
        await wait_until((desk.path / "ready").exists)
        started = time.monotonic()
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        assert time.monotonic() - started < limit_s
        assert desk.survivors() == []


async def test_second_cancellation_does_not_shorten_the_wait(desk: Desk) -> None:
    """Whoever waits for a cancelled run can rely on its death."""
    running = desk.start_sh(f"trap '' TERM; {DAEMON} sleep 1000")
    await wait_until((desk.path / "ready").exists)
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([running])
    assert running.cancelled()
    assert desk.survivors() == []


async def test_run_cancelled_at_once_leaves_nothing(desk: Desk) -> None:
    """Wherever in its first steps a run is cancelled."""
    for steps in range(6):
        running = desk.start_sh("sleep 1000")
        for _ in range(steps):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
    await wait_until(lambda: not desk.reapers())
    assert desk.survivors() == []


async def test_orphans_are_reaped_while_the_command_runs(desk: Desk) -> None:
    """A long command that leaves many dead orphans does not fill the process table."""
    script = "for i in $(seq 30); do (true &); done; : > ready; while [ ! -e end ]; do sleep 0.01; done"
    running = desk.start_sh(script)
    await wait_until((desk.path / "ready").exists)
    await wait_until(lambda: all(process.state != "Z" for process in process_tree(desk.spawner_pid)))
    (desk.path / "end").touch()
    assert is_ended(await running, 0)


@needs_root
async def test_fork_bomb_is_ended(desk: Desk) -> None:
    """Processes that multiply while they are being killed are killed all the same."""
    require_tool("perl")
    bomb = "trap '' TERM; exec perl -e 'setpgrp, fork while 1'"
    running = desk.start_sh(bomb, owner=FORK_BOMB_USER, limits=Limits(processes=300, own_user=True))
    await wait_until(lambda: len(desk.survivors()) > 250)
    running.cancel()
    await asyncio.wait([running])
    assert desk.survivors() == []


@needs_root
async def test_command_has_the_identity_asked_for_and_no_other(desk: Desk) -> None:
    """User, group, no supplementary groups, no capabilities, and no way to gain any."""
    await desk.run("grep", "-E", "^(Uid|Gid|Groups|Cap(Inh|Prm|Eff|Amb)|NoNewPrivs):", "/proc/self/status",
                   owner=Owner(60801, 60802))  # fmt: skip
    status = dict(line.split(":") for line in (desk.path.parent / "output").read_text().splitlines())
    assert status["Uid"].split() == ["60801"] * 4
    assert status["Gid"].split() == ["60802"] * 4
    assert status["Groups"].split() == []
    assert {int(status[f"Cap{which}"], 16) for which in ("Inh", "Prm", "Eff", "Amb")} == {0}
    assert status["NoNewPrivs"].split() == ["1"]


async def test_killed_spawner_is_replaced_and_its_runs_go_on(desk: Desk) -> None:
    """The death of the spawner costs no run."""
    running = desk.start_sh(": > ready; while [ ! -e end ]; do sleep 0.01; done; exit 5")
    await wait_until((desk.path / "ready").exists)
    first = desk.spawner_pid
    with structlog.testing.capture_logs() as logs:
        os.kill(first, signal.SIGKILL)
        assert is_ended(await desk.run("/bin/true"), 0)
    assert [entry["event"] for entry in logs] == ["spawner.restarted"]
    assert desk.spawner_pid != first
    (desk.path / "end").touch()
    assert is_ended(await running, 5)


async def test_request_a_dead_spawner_never_read_is_sent_again(desk: Desk) -> None:
    """A run that did not start is not lost either."""
    os.kill(desk.spawner_pid, signal.SIGSTOP)
    running = desk.start_sh("exit 6")
    await asyncio.sleep(0)
    os.kill(desk.spawner_pid, signal.SIGKILL)
    assert is_ended(await running, 6)


async def test_killed_reaper_is_a_worker_failure_and_nothing_survives(desk: Desk) -> None:
    """The orphans of a reaper fall to the spawner, which kills them before the client hears of it."""
    running = desk.start_sh(f"{DAEMON} sleep 1000")
    await wait_until((desk.path / "ready").exists)
    bystander = desk.start_sh(": > started; while [ ! -e end ]; do sleep 0.01; done", env={"EXPBUILD_TEST_MARK": ""})
    (victim,) = desk.reapers()[:1]
    await wait_until((desk.path / "started").exists)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(WorkerFailed):
        await running
    assert desk.survivors() == []
    (desk.path / "end").touch()
    assert is_ended(await bystander, 0)


async def test_signals_to_the_whole_service_do_not_end_the_spawner(desk: Desk) -> None:
    """SIGTERM, SIGINT and SIGHUP are the server's to handle; a run goes on while it drains."""
    running = desk.start_sh(": > ready; while [ ! -e end ]; do sleep 0.01; done; exit 5")
    await wait_until((desk.path / "ready").exists)
    for pid in (desk.spawner_pid, *desk.reapers()):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    (desk.path / "end").touch()
    assert is_ended(await running, 5)
    assert is_ended(await desk.run("/bin/true"), 0)


async def test_command_starts_with_default_signals(desk: Desk) -> None:
    """Nothing is ignored or blocked, whatever the server or we ignore."""
    await desk.run("grep", "-E", "^Sig(Blk|Ign):", "/proc/self/status")
    lines = (desk.path.parent / "output").read_text().split()
    of_the_c_library = 0b11 << 31  # signals 32 and 33: as inherited, no program can change them
    assert [int(value, 16) & ~of_the_c_library for value in lines[1::2]] == [0, 0]


async def test_close_kills_what_runs(desk: Desk) -> None:
    """After close there is neither spawner nor reaper nor command; the run is a failure of the worker."""
    running = desk.start_sh(f"{DAEMON} sleep 1000")
    await wait_until((desk.path / "ready").exists)
    everything = process_tree(desk.spawner_pid)
    await desk.spawner.close()
    assert not any(process.is_alive() for process in everything)
    assert desk.survivors() == []
    with pytest.raises(WorkerFailed):
        await running
    with pytest.raises(WorkerFailed):
        await desk.run("/bin/true")


SERVER = """
import asyncio, os, sys
from expbuild.workers.spawner_client import Spawn, Spawner

async def main():
    spawner = Spawner()
    root = os.open(sys.argv[1], os.O_PATH)
    output = os.open("/dev/null", os.O_WRONLY)
    env = {"PATH": os.environ["PATH"], "EXPBUILD_TEST_MARK": sys.argv[2]}
    await spawner.run(Spawn(("/bin/sh", "-c", sys.argv[3]), env, root, output, output))

asyncio.run(main())
"""


async def test_death_of_the_server_kills_its_actions(base_dir: Path) -> None:
    """kill -9 of the server leaves neither its actions nor a spawner."""
    mark = uuid.uuid4().hex
    script = f"trap '' TERM; {DAEMON} sleep 1000"
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(base_dir), mark, script)
    await wait_until((base_dir / "ready").exists)
    processes = process_tree(server.pid)
    assert len(processes) > 4
    server.kill()
    await server.wait()
    await wait_until(lambda: not processes_with(f"EXPBUILD_TEST_MARK={mark}"), timeout_s=5)
    await wait_until(lambda: not any(process.is_alive() for process in processes), timeout_s=5)


def test_works_on_uvloop(base_dir: Path) -> None:
    """The event loop the server runs on."""

    async def main() -> SpawnResult:
        spawner = Spawner()
        with open_files(base_dir) as (root, output):
            desk = Desk(spawner, base_dir / "root", root, output)
            try:
                cancelled = desk.start_sh(": > ready; sleep 1000")
                await wait_until((desk.path / "ready").exists)
                cancelled.cancel()
                await asyncio.wait([cancelled])
                return await desk.run("/bin/sh", "-c", "exit 8")
            finally:
                await spawner.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert is_ended(runner.run(main()), 8)


async def test_output_files_stay_as_they_are(desk: Desk, base_dir: Path) -> None:
    """The spawner writes to what it is given and changes nothing else about it."""
    before = (base_dir / "output").stat()
    await desk.run("echo", "hello")
    after = (base_dir / "output").stat()
    assert (after.st_size, stat.S_IMODE(after.st_mode)) == (before.st_size + 6, stat.S_IMODE(before.st_mode))
