"""Warm containers: what one command leaves for the next (nothing), and when a container is renewed."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from expbuild.errors import InvalidArgument, WorkerFailed
from expbuild.workers.docker import DockerWorker
from tests.support.docker import DockerDaemon
from tests.support.require import require_tool
from tests.workers.contract import Bench, containers_of, open_docker_worker, wait_until

pytestmark = pytest.mark.docker

USER = "1000:1000"
MEMORY_LIMIT = 64 << 20


@asynccontextmanager
async def opened(base_dir: Path, docker: DockerDaemon, image: str, **config: object) -> AsyncIterator[Bench]:
    settings: dict[str, object] = {"user": USER, **config}
    async with open_docker_worker(base_dir / "work", docker.host, image, **settings) as worker:
        yield Bench(worker)


@pytest.fixture
async def bench(docker: DockerDaemon, busybox: str, base_dir: Path) -> AsyncIterator[Bench]:
    async with opened(base_dir, docker, busybox) as bench:
        yield bench


@pytest.fixture
def image_without_shell(docker: DockerDaemon) -> Iterator[str]:
    """An image of one program."""
    name = "expbuild-test-no-shell"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(require_tool("busybox"), "true")
    docker.run("import", "-", name, stdin=buffer.getvalue())
    yield name
    docker.run("rmi", "--force", name)


def container(bench: Bench, docker: DockerDaemon) -> str:
    """The id of the one container the worker has."""
    assert isinstance(bench.worker, DockerWorker)
    (found,) = containers_of(bench.worker, docker.host)
    return found


async def test_a_container_runs_one_command_after_the_other(bench: Bench, docker: DockerDaemon) -> None:
    """It is there before the first one, and the same for all that leave nothing behind."""
    before = container(bench, docker)
    for number in range(5):
        ran = await bench.sh("cat in; ls -A /tmp; echo x > out; echo x > /tmp/file; exit 3")
        assert (ran.exit_code, ran.stdout) == (3, b""), number
        assert [path.name for path in ran.root.iterdir()] == ["out"]
    assert container(bench, docker) == before


async def test_commands_have_no_rights(bench: Bench) -> None:
    """The agent's capabilities are the agent's alone."""
    ran = await bench.sh("id; cat /proc/self/status")
    status = dict(line.split(":\t", 1) for line in ran.stdout.decode().splitlines() if ":\t" in line)
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"].strip()) == ("1", "2", "1000")
    assert status["Uid"].split() == status["Gid"].split() == ["1000"] * 4


async def test_surroundings_are_those_of_a_fresh_container(
    bench: Bench, docker: DockerDaemon, busybox: str, base_dir: Path
) -> None:
    """Environment, directory, limits, mask: the result of an action does not depend on how it is run."""
    script = "env | sort; pwd; umask; ulimit -a; cat /proc/self/oom_score_adj; ls -ld . /tmp; cat /etc/hostname; id"
    variables = {"EXPBUILD_TEST_MARK": "", "a.b": "c", "HOME2": "$HOME", "QUOTE": "it's \"\n"}
    warm = await bench.sh(script, env=variables)
    async with opened(base_dir / "fresh", docker, busybox, reuse=False) as other:
        assert containers_of(other.worker, docker.host) == []  # type: ignore[arg-type]
        fresh = await other.sh(script, env=variables)
    assert warm.stdout.decode().splitlines() == fresh.stdout.decode().splitlines()


async def test_variables_whose_names_no_shell_has_arrive(bench: Bench) -> None:
    """Bash exports functions under such names."""
    ran = await bench.run("env", env={"BASH_FUNC_x%%": "() { :; }", "a.b": "c"})
    assert {b"BASH_FUNC_x%%=() { :; }", b"a.b=c"} < set(ran.stdout.splitlines())


@pytest.mark.parametrize(
    "script",
    [
        pytest.param('echo x > "$HOME/file"', id="file-of-the-image"),
        pytest.param("echo x > /dev/shm/file", id="shared-memory"),
        pytest.param("echo x > /dev/shm/.hidden", id="hidden-shared-memory"),
        pytest.param("mkdir /dev/mqueue/queue || : > /dev/mqueue/queue", id="message-queue"),
        pytest.param('chmod 700 "$HOME"', id="mode"),
    ],
)
async def test_what_is_left_outside_ends_the_container(bench: Bench, docker: DockerDaemon, script: str) -> None:
    """The next command sees nothing of it."""
    before = container(bench, docker)
    await bench.sh(script)
    ran = await bench.sh('ls -A "$HOME" /dev/shm /dev/mqueue | grep -v :')
    assert ran.stdout.strip() == b""
    assert container(bench, docker) != before


HOSTILE = [
    pytest.param("kill -9 1 || kill -9 $PPID || kill -STOP $PPID", id="kill-the-agent"),
    pytest.param("echo '1 0 0 0' > /proc/$PPID/fd/1 || echo '1 0 0 0' > /proc/1/fd/1", id="speak-for-the-agent"),
    pytest.param("cat /proc/$PPID/fd/0 || cat /proc/$PPID/environ || cat /proc/$PPID/mem", id="listen-to-the-agent"),
    pytest.param("echo exit > /.expbuild/command || echo x > /.expbuild/drop", id="replace-the-command"),
    pytest.param("rm -f /.expbuild/command || mv /.expbuild/stdout /.expbuild/x || chmod 777 /.expbuild", id="move"),
    pytest.param("echo x > /etc/passwd || echo x > /bin/sh || mv /bin/env /bin/x || touch /x", id="replace-a-program"),
    pytest.param("mount -t tmpfs x /mnt || mount -o remount,rw /.expbuild || umount /tmp", id="mount"),
    pytest.param("unshare -Ur true || chroot / true", id="namespace"),
    pytest.param("/.expbuild/drop /bin/true true", id="become-someone"),
    pytest.param("mknod /tmp/disk b 254 0 || mknod /workspace/disk b 254 0", id="device"),
    pytest.param("ls /var/run/docker.sock || ls /run/docker.sock", id="docker-socket"),
    pytest.param("nc -w 1 127.0.0.1 80 </dev/null || ping -c 1 -w 1 1.1.1.1", id="network"),
    pytest.param("echo x > /proc/sys/kernel/hostname || echo x > /proc/sysrq-trigger || hostname x", id="kernel"),
    pytest.param("echo 1 > /sys/fs/cgroup/memory/cgroup.procs || mkdir /sys/fs/cgroup/pids/x", id="cgroup"),
    pytest.param("renice -n -5 -p $$ || su root -c true </dev/null", id="priority-and-root"),
    pytest.param("mv /workspace /workspace2 || rmdir /tmp || rm -rf /workspace /tmp", id="move-the-workspace"),
]


async def test_hostile_commands_succeed_in_nothing(bench: Bench, docker: DockerDaemon) -> None:
    """Every payload fails, and the next command is run as if nothing had happened."""
    for payload in HOSTILE:
        (script,) = payload.values
        ran = await bench.sh(f"( {script} ) 2>/dev/null; echo $? > result", timeout_s=20)
        succeeded = (ran.root / "result").read_text().strip() == "0"
        assert not succeeded, payload.id
        after = await bench.sh("echo fine; cat /tmp/* 2>/dev/null; ls -A /tmp")
        assert (after.exit_code, after.stdout) == (0, b"fine\n"), payload.id


async def test_directories_are_as_new_whatever_was_done_to_them(bench: Bench, docker: DockerDaemon) -> None:
    """Modes, names of all kinds and deep trees are gone with the command."""
    before = container(bench, docker)
    names = "mkdir -p 'a b' ./-r; : > 'new\nline'; : > ...; mkdir -p $(seq -s / 1 200); chmod 0 1 'a b'"
    ran = await bench.sh(f"for d in /workspace /tmp; do cd $d; {names}; done; chmod 0 /tmp /workspace; exit 5")
    assert ran.exit_code == 5
    assert {path.name for path in ran.root.iterdir()} == {"a b", "-r", "new\nline", "...", "1"}
    ran = await bench.sh("ls -A /tmp; ls -A; stat -c '%a %u' /tmp .; echo x > f; echo x > /tmp/f")
    assert (ran.stdout, ran.stderr) == (b"755 1000\n755 1000\n", b"")
    assert container(bench, docker) == before


async def test_daemons_of_one_command_do_not_meet_the_next(bench: Bench, docker: DockerDaemon) -> None:
    """A hundred of them, all deaf to signals, in sessions of their own."""
    before = container(bench, docker)
    spawn = "i=0; while [ $i -lt 100 ]; do (setsid sh -c 'trap \"\" TERM HUP INT; sleep 1000' &); i=$((i+1)); done"
    assert (await bench.sh(spawn)).exit_code == 0
    assert bench.survivors() == []
    assert (await bench.sh("ps -o comm | grep -c sleep")).stdout == b"0\n"
    assert container(bench, docker) == before


async def test_stdout_opened_by_name_is_not_truncated(bench: Bench) -> None:
    """Scripts write `> /dev/stderr`."""
    ran = await bench.sh("echo one >&2; echo two > /dev/stderr; echo three >&2; echo four > /dev/stdout")
    assert (ran.stdout, ran.stderr) == (b"four\n", b"one\ntwo\nthree\n")


async def test_a_timeout_ends_the_container(bench: Bench, docker: DockerDaemon) -> None:
    """With what was written until then."""
    before = container(bench, docker)
    ran = await bench.sh("echo out; echo x > file; sleep 1000", timeout_s=1.0)
    assert (ran.result.timed_out, ran.stdout) == (True, b"out\n")
    assert (ran.root / "file").exists()
    assert containers_of(bench.worker, docker.host) == []  # type: ignore[arg-type]
    assert (await bench.sh("exit 4")).exit_code == 4
    assert container(bench, docker) != before


@pytest.mark.parametrize("script", ["tail /dev/zero", "tail /dev/zero; exit 3"], ids=["command", "its-child"])
async def test_out_of_memory_is_said_with_the_limit(
    docker: DockerDaemon, busybox: str, base_dir: Path, script: str
) -> None:
    """Whoever died of it; the container is not used again."""
    async with opened(base_dir, docker, busybox, memory_limit=MEMORY_LIMIT) as bench:
        before = container(bench, docker)
        ran = await bench.sh(script)
        assert ran.result.message == "out of memory: a process was killed at the memory limit of 64 MiB (memory_limit)"
        assert ran.exit_code in (137, 3)
        assert (await bench.sh("exit 137")).result.message == ""
        assert container(bench, docker) != before


async def test_a_container_is_renewed_after_so_many_actions(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """actions_per_container bounds what could add up unseen."""
    async with opened(base_dir, docker, busybox, actions_per_container=2) as bench:
        seen = []
        for _ in range(5):
            await bench.run("true")
            seen.append(container(bench, docker))
    assert [seen.index(each) for each in seen] == [0, 0, 2, 2, 4]


async def test_a_container_that_died_idle_is_nobodys_failure(bench: Bench, docker: DockerDaemon) -> None:
    """It is replaced."""
    docker.run("rm", "--force", container(bench, docker))
    assert isinstance(bench.worker, DockerWorker)
    warm = bench.worker._warm
    assert warm is not None
    await wait_until(lambda: warm.has_ended)
    assert (await bench.sh("exit 6")).exit_code == 6


@pytest.mark.parametrize("command", ["kill", "stop", "rm"])
async def test_a_container_ended_by_others_is_no_result(bench: Bench, docker: DockerDaemon, command: str) -> None:
    """The action runs elsewhere, or again."""
    run = bench.prepare("/bin/sh", "-c", "trap 'exit 0' TERM; : > ready; while :; do sleep 1; done")
    running = asyncio.create_task(bench.worker.run(run))
    assert isinstance(bench.worker, DockerWorker)
    await wait_until(lambda: bench.has_made(run, "ready"))
    docker.run(command, *(["--force"] if command == "rm" else []), container(bench, docker))
    with pytest.raises(WorkerFailed, match="container"):
        await running
    await bench.worker.start()
    assert (await bench.sh("exit 5")).exit_code == 5


async def test_image_without_shell_runs_in_fresh_containers(
    docker: DockerDaemon, image_without_shell: str, base_dir: Path
) -> None:
    """There the agent has nothing to run it."""
    async with opened(base_dir, docker, image_without_shell) as bench:
        for _ in range(2):
            assert (await bench.run("/true")).exit_code == 0
            assert containers_of(bench.worker, docker.host) == []  # type: ignore[arg-type]


async def test_root_runs_in_fresh_containers(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """Root could tamper with what starts the next command."""
    async with opened(base_dir, docker, busybox, user="0:0") as bench:
        assert (await bench.run("id", "-u")).stdout == b"0\n"
        assert containers_of(bench.worker, docker.host) == []  # type: ignore[arg-type]


async def test_commands_that_cannot_be_run_do_not_end_the_container(bench: Bench, docker: DockerDaemon) -> None:
    """They are the client's error; a command that fails in the same words by itself is a result."""
    before = container(bench, docker)
    for arguments in (["no-such"], ["./no-such"], ["/etc/passwd"], ["true", "x" * 200_000]):
        with pytest.raises(InvalidArgument):
            await bench.run(*arguments)
    assert (await bench.sh("no-such")).exit_code == 127
    assert (await bench.sh("exit 126")).exit_code == 126
    assert container(bench, docker) == before
