"""What is special about host workers: identity, environment, work directory, private root."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog.testing

from expbuild.config_workers import HostWorkerConfig
from expbuild.errors import InvalidArgument, StartupError
from expbuild.workers.base import DEFAULT_PATH, Owner
from expbuild.workers.host import HostWorker
from expbuild.workers.sandbox import INPUT_ROOT
from expbuild.workers.spawner_client import Spawner
from tests.support.require import require_tool, unavailable
from tests.workers.contract import Bench, Input, open_host_worker, wait_until

PROJECT = Path(__file__).parents[2]

SLOT_IDS = range(60800, 61184)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: switching users needs root")


@pytest.fixture
async def bench(base_dir: Path) -> AsyncIterator[Bench]:
    async with open_host_worker(base_dir / "work") as worker:
        yield Bench(worker)


@pytest.fixture
async def chroot(base_dir: Path) -> AsyncIterator[Bench]:
    async with open_host_worker(base_dir / "work", use_chroot=True) as worker:
        yield Bench(worker)


@asynccontextmanager
async def slot(work_dir: Path, number: int = 0, **config: object) -> AsyncIterator[HostWorker]:
    """One of several slots; not started."""
    spawner = Spawner()
    if not config.get("use_chroot"):
        config.setdefault("isolation", "uid" if os.geteuid() == 0 else "none")
    model = HostWorkerConfig.model_validate({"work_dir": work_dir, **config})
    worker = HostWorker(f"host-{number}", model, number, spawner)
    try:
        yield worker
    finally:
        await worker.close()
        await spawner.close()


async def refusal(work_dir: Path, **config: object) -> str:
    """Return why a worker configured so does not start."""
    async with slot(work_dir, 0, **config) as worker:
        with pytest.raises(StartupError) as caught:
            await worker.start()
    return str(caught.value)


# ---- environment ----------------------------------------------------------------------------------------------------


async def test_environment_is_exactly_defaults_whitelist_and_command(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whitelisted variables lie over the defaults and under the command's; unset ones stay unset."""
    for name, value in {"ALLOWED": "1", "OVERRIDDEN": "server", "SECRET": "x", "PATH": "/usr/bin:/bin"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)
    whitelist = ["ALLOWED", "OVERRIDDEN", "UNSET", "PATH"]
    async with open_host_worker(base_dir / "work", env_whitelist=whitelist) as worker:
        bench = Bench(worker)
        ran = await bench.run("env", "-0", env={"OVERRIDDEN": "command"})
    seen = dict(line.decode().split("=", 1) for line in ran.stdout.split(b"\0") if line)
    assert seen == {
        "PATH": "/usr/bin:/bin",
        "TMPDIR": str(ran.root.parent / "tmp"),
        "ALLOWED": "1",
        "OVERRIDDEN": "command",
        "EXPBUILD_TEST_MARK": bench.mark,
    }


async def test_empty_whitelist_passes_nothing_on(bench: Bench) -> None:
    """Not even PATH."""
    ran = await bench.run("env")
    assert {line.partition(b"=")[0] for line in ran.stdout.splitlines()} == {b"PATH", b"TMPDIR", b"EXPBUILD_TEST_MARK"}
    assert f"PATH={DEFAULT_PATH}".encode() in ran.stdout.splitlines()


# ---- results --------------------------------------------------------------------------------------------------------


async def test_death_by_signal_is_said_in_words(bench: Bench) -> None:
    """The exit code alone could be the command's own."""
    ran = await bench.sh("kill -SEGV $$")
    assert (ran.exit_code, ran.result.message) == (139, "killed by signal 11 (SIGSEGV)")
    ran = await bench.sh("kill -40 $$")
    assert (ran.exit_code, ran.result.message) == (168, f"killed by signal 40 (SIGRTMIN+{40 - signal.SIGRTMIN})")
    assert (await bench.sh("exit 139")).result.message == ""


@pytest.mark.parametrize("use_chroot", [False, True])
async def test_command_may_tidy_up_at_the_deadline(base_dir: Path, use_chroot: bool) -> None:
    """SIGTERM reaches it, in a private root too, and what it then writes is kept."""
    async with open_host_worker(base_dir / "work", use_chroot=use_chroot) as worker:
        ran = await Bench(worker).sh("trap 'echo bye; exit 0' TERM; sleep 1000 & wait", timeout_s=0.5)
    assert (ran.result.timed_out, ran.stdout) == (True, b"bye\n")
    assert ran.result.message.startswith("timed out after 0.5 s; ")


async def test_cancelled_command_is_dead_within_two_seconds(bench: Bench) -> None:
    """Also one that ignores SIGTERM."""
    run = bench.prepare("/bin/sh", "-c", "trap '' TERM; : > ready; while :; do sleep 1000; done")
    running = asyncio.create_task(bench.worker.run(run))
    await wait_until((run.workspace / "root/ready").exists)
    started = time.monotonic()
    running.cancel()
    await asyncio.wait([running])
    assert time.monotonic() - started < 2
    assert bench.survivors() == []


async def test_script_without_shebang_is_refused(bench: Bench) -> None:
    """No shell is guessed."""
    with pytest.raises(InvalidArgument, match=r"'\./script' is neither a binary .* nor a script with a #! line"):
        await bench.run("./script", files={"script": Input(b"echo hello\n", executable=True)})


# ---- identity -------------------------------------------------------------------------------------------------------


@needs_root
async def test_each_slot_has_a_user_of_its_own(base_dir: Path) -> None:
    """Without configuration no action runs as root, and no two slots as the same user."""
    seen = []
    for number in (0, 1):
        async with slot(base_dir / "work", number) as worker:
            await worker.start()
            assert worker.owner == Owner(SLOT_IDS[number], SLOT_IDS[number])
            ran = await Bench(worker).sh("id -u; id -g; id -G; : > file")
            assert (ran.root / "file").stat().st_uid == SLOT_IDS[number]
            seen.append(ran.stdout.split())
    assert seen == [[str(SLOT_IDS[number]).encode()] * 3 for number in (0, 1)]


@needs_root
async def test_run_as_user_and_group(base_dir: Path) -> None:
    """By name or number, with the user's primary group unless another is given."""
    for number, (config, expected) in enumerate(
        [
            ({"run_as_user": "nobody"}, Owner(65534, 65534)),
            ({"run_as_user": "nobody", "run_as_group": "daemon"}, Owner(65534, 1)),
            ({"run_as_user": "54321", "run_as_group": "54322"}, Owner(54321, 54322)),
            ({"run_as_user": "54321"}, Owner(54321, 54321)),
        ]
    ):
        async with open_host_worker(base_dir / f"work-{number}", **config) as worker:
            assert worker.owner == expected
            ran = await Bench(worker).sh("id -u; id -g")
            assert ran.stdout.split() == [str(expected.uid).encode(), str(expected.gid).encode()]


@needs_root
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"run_as_user": "no-such-user"}, "run_as_user = 'no-such-user': there is no such user"),
        ({"run_as_user": "root"}, "run_as_user = 'root': actions do not run as root"),
        ({"run_as_user": "0"}, "run_as_user = '0': actions do not run as root"),
        ({"run_as_user": "4294967295"}, "run_as_user = '4294967295': no number above 4294967294"),
        ({"run_as_user": "nobody", "run_as_group": "no-such"}, "run_as_group = 'no-such': there is no such group"),
        ({"run_as_user": "nobody", "run_as_group": "root"}, "run_as_group = 'root'"),
    ],
)
async def test_impossible_users_are_refused(base_dir: Path, config: dict[str, str], reason: str) -> None:
    """The message names the key."""
    assert (await refusal(base_dir / "work", **config)).startswith(reason)


@needs_root
async def test_inputs_cannot_be_changed_by_the_action(bench: Bench) -> None:
    """They belong to another user: not even their mode can be changed."""
    ran = await bench.sh("chmod u+w in; echo x >> in; cat in", files={"in": Input(b"content")})
    assert ran.stdout == b"content"


# ---- work directory -------------------------------------------------------------------------------------------------


async def test_leftovers_of_an_earlier_run_are_removed(base_dir: Path) -> None:
    """Whatever their permissions."""
    old = base_dir / "work/host-0/old"
    (old / "locked").mkdir(parents=True)
    (old / "locked/file").touch()
    (old / "link").symlink_to("/etc")
    (old / "locked").chmod(0)
    async with open_host_worker(base_dir / "work") as worker:
        assert os.listdir(worker.work_dir) == []
        mode = stat.S_IMODE(worker.work_dir.stat().st_mode)
        assert mode == (0o710 if worker.owner else 0o700)
    assert os.listdir(base_dir / "work") == ["host-0.lock"]


async def test_work_dir_in_use_is_refused(base_dir: Path) -> None:
    """Two servers with one configuration do not wipe each other's workspaces."""
    async with open_host_worker(base_dir / "work") as worker:
        assert "in use by another server" in await refusal(base_dir / "work")
        assert worker.work_dir.is_dir()


async def test_work_dir_others_could_exchange_is_refused(base_dir: Path) -> None:
    """Symbolic links, directories everybody can write to, what another user put into a sticky one."""
    (base_dir / "real").mkdir()
    (base_dir / "link").symlink_to("real")
    assert "link is a symbolic link; name the real path" in await refusal(base_dir / "link/work")
    (base_dir / "open").mkdir()
    (base_dir / "open").chmod(0o777)
    assert "everybody can write to" in await refusal(base_dir / "open/work")
    (base_dir / "file").touch()
    assert "file is not a directory" in await refusal(base_dir / "file/work")
    (base_dir / "open").chmod(0o1777)
    async with open_host_worker(base_dir / "open/work"):
        pass
    if os.geteuid() == 0:
        os.chown(base_dir / "open/work", 12345, 12345)
        assert "belongs to another user (uid 12345)" in await refusal(base_dir / "open/work")


@needs_root
async def test_work_dir_the_slot_cannot_reach_is_refused(base_dir: Path) -> None:
    """The self-test finds it before an action does."""
    (base_dir / "closed").mkdir(mode=0o700)
    reason = await refusal(base_dir / "closed/work")
    assert f"user {SLOT_IDS[0]} cannot use {base_dir / 'closed/work/host-0'}" in reason


async def test_start_can_be_repeated(bench: Bench) -> None:
    """After a failure; workspaces that still exist are left alone."""
    run = bench.prepare("/bin/true")
    await bench.worker.start()
    assert (await bench.worker.run(run)).exit_code == 0


# ---- private root ---------------------------------------------------------------------------------------------------


async def test_private_root_shows_nothing_of_the_host(chroot: Bench, base_dir: Path) -> None:
    """No file, no process, no host name; the system cannot be written to."""
    (base_dir / "canary").write_text("seen")
    base_dir.chmod(0o755)
    ran = await chroot.sh(
        f"cat {base_dir}/canary; ls /home /root /var/lib /etc/shadow; hostname; ls -d /proc/[0-9]* | wc -l; pwd"
    )
    hostname, processes, directory = ran.stdout.split()
    assert (hostname, directory) == (b"expbuild", INPUT_ROOT.encode())
    assert int(processes) < 8
    assert (await chroot.sh(f"kill -0 {os.getpid()}")).exit_code == 1
    ran = await chroot.sh("touch /usr/x /etc/x /x; true")
    assert [b"Read-only" in line for line in ran.stderr.splitlines()] == [True] * 3
    ran = await chroot.sh('touch /tmp/x /var/tmp/y /dev/shm/z && ls "$TMPDIR"')
    assert ran.stdout.split() == [b"x", b"y"]


async def test_private_root_has_no_network(chroot: Bench) -> None:
    """Only its own loopback interface."""
    ran = await chroot.sh("tail -n +3 /proc/net/dev | cut -d: -f1")
    assert ran.stdout.split() == [b"lo"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        ran = await chroot.sh(f"exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]}")
        assert ran.exit_code != 0


async def test_private_root_passes_no_variable_to_bubblewrap(chroot: Bench) -> None:
    """What the client preloads is loaded into its command alone."""
    ran = await chroot.sh("echo ran", env={"LD_PRELOAD": "/workspace/evil.so", "LD_LIBRARY_PATH": "/workspace"})
    assert ran.stdout == b"ran\n"
    assert all(b"evil.so" in line and b"bwrap" not in line for line in ran.stderr.splitlines())


async def test_private_root_option_like_arguments_are_the_commands(chroot: Bench) -> None:
    """Nothing a client sends is an option of bubblewrap."""
    ran = await chroot.run("echo", "--ro-bind", "/", "/mnt", "--", env={"--bind": "--setenv"})
    assert ran.stdout == b"--ro-bind / /mnt --\n"
    with pytest.raises(InvalidArgument, match="--dev-bind"):
        await chroot.run("--dev-bind", "/", "/mnt")


async def test_private_root_takes_only_so_many_arguments(chroot: Bench) -> None:
    """The limit of bubblewrap is named before it is hit."""
    with pytest.raises(InvalidArgument, match="10001 arguments"):
        await chroot.run("echo", *["x"] * 10_000)


async def test_private_root_without_bubblewrap_is_refused(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At start, not at the first action."""
    monkeypatch.setenv("PATH", str(base_dir))
    assert "namespaces need bubblewrap" in await refusal(base_dir / "work", use_chroot=True)


async def test_private_root_that_cannot_be_made_is_refused(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the words of bubblewrap, or with what is visible that should not be."""
    base_dir.chmod(0o755)
    bwrap = base_dir / "bwrap"
    monkeypatch.setenv("PATH", f"{base_dir}:{os.environ['PATH']}")
    for script, reason in (
        ('echo "bwrap: No permissions to create new namespace" >&2; exit 1', "No permissions to create new namespace"),
        ("while [ $1 != -- ]; do shift; done; shift; echo '{\"exit-code\": 0}' >&4; export TMPDIR=/tmp; exec \"$@\"",
         "the files of the host can be seen"),
    ):  # fmt: skip
        bwrap.write_text(f"#!/bin/sh\n{script}\n")
        bwrap.chmod(0o755)
        assert reason in await refusal(base_dir / "work", use_chroot=True)


async def test_private_root_shows_the_paths_that_are_named(base_dir: Path) -> None:
    """Read-only; what does not exist is left out."""
    base_dir.chmod(0o755)
    (base_dir / "toolchain").mkdir()
    (base_dir / "toolchain/tool").write_text("a tool")
    paths = [str(base_dir / "toolchain"), str(base_dir / "missing")]
    async with open_host_worker(base_dir / "work", use_chroot=True, read_only_paths=paths) as worker:
        ran = await Bench(worker).sh(f"cat {paths[0]}/tool; echo x > {paths[0]}/tool; ls {base_dir}")
    assert ran.stdout == b"a tooltoolchain\n"
    assert b"Read-only file system" in ran.stderr


async def test_private_root_with_network_reaches_the_machine(base_dir: Path) -> None:
    """Only where it is configured."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port})).close(); print('connected')"
        async with open_host_worker(base_dir / "work", use_chroot=True, network=True) as worker:
            ran = await Bench(worker).run("/usr/bin/python3", "-c", connect)
    assert ran.stdout == b"connected\n"


async def test_input_root_as_the_root(base_dir: Path) -> None:
    """Nothing of this system is there, and the mounts leave no directory behind in the input root."""
    busybox = Path(require_tool("busybox"))
    async with open_host_worker(base_dir / "work", use_chroot=True, chroot_root="input") as worker:
        bench = Bench(worker)
        tool = {"bin/sh": Input(busybox.read_bytes(), executable=True)}
        ran = await bench.run("/bin/sh", "-c", "echo /*; pwd; echo x > /d/y", files=tool, working_directory="d")
        assert ran.stdout == b"/bin /d /dev /proc /tmp\n/d\n"
        assert sorted(path.name for path in ran.root.iterdir()) == ["bin", "d"]
        assert (ran.root / "d/y").read_text() == "x\n"
        with pytest.raises(InvalidArgument, match="'tmp' of the input root must be a directory"):
            await bench.run("/bin/sh", files={**tool, "tmp": Input()})


# ---- the ladder -----------------------------------------------------------------------------------------------------


async def level_of(work_dir: Path, **config: object) -> dict[str, str]:
    """Return the log line that says how a worker is isolated."""
    with structlog.testing.capture_logs() as lines:
        async with slot(work_dir, 0, **config) as worker:
            await worker.start()
    (line,) = [line for line in lines if line["event"] == "worker.isolated"]
    return {key: str(line[key]) for key in ("worker", "isolation", "reason")}


async def test_auto_takes_the_best_level_and_says_so(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And why not a better one."""
    best = {"worker": "host-0", "isolation": "namespaces", "reason": ""}
    assert await level_of(base_dir / "work", isolation="auto") == best
    monkeypatch.setenv("PATH", str(base_dir))
    assert await level_of(base_dir / "work", isolation="auto") == {
        "worker": "host-0",
        "isolation": "uid" if os.geteuid() == 0 else "none",
        "reason": "not namespaces: namespaces need bubblewrap, and there is no `bwrap` in the server's PATH",
    }
    assert "namespaces need bubblewrap" in await refusal(base_dir / "work", isolation="namespaces")


@needs_root
async def test_no_level_runs_actions_as_root(base_dir: Path) -> None:
    """`none` needs a user then."""
    assert "actions do not run as root; set run_as_user" in await refusal(base_dir / "work", isolation="none")
    level = await level_of(base_dir / "work", isolation="none", run_as_user="nobody")
    assert level["isolation"] == "none"


@needs_root
async def test_slot_users_come_from_the_configured_range(base_dir: Path) -> None:
    """One each; when there are no more, the start is refused."""
    async with slot(base_dir / "work", 1, slot_uids=(54000, 54001)) as worker:
        await worker.start()
        assert worker.owner == Owner(54001, 54001)
    async with slot(base_dir / "work", 2, slot_uids=(54000, 54001)) as worker:
        with pytest.raises(StartupError, match=r"slot_uids = \[54000, 54001\] are users for 2 host slots only"):
            await worker.start()


# ---- as an ordinary user --------------------------------------------------------------------------------------------


@pytest.fixture
async def python_as_nobody() -> list[str]:
    """The command line of our Python as user nobody; where it lies in a closed directory, with that opened up."""
    prefix = Path(sys.base_prefix)
    closed = next((path for path in reversed(prefix.parents) if not path.stat().st_mode & stat.S_IXOTH), None)
    command = [require_tool("bwrap"), "--dev-bind", "/", "/", "--cap-add", "ALL"]
    if closed is not None:
        shown = str(closed / prefix.relative_to(closed).parts[0])
        command += ["--perms", "0755", "--tmpfs", str(closed), "--ro-bind", shown, shown]
    command += ["--", require_tool("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-B"]
    check = "import os, sys, expbuild.workers.host; sys.exit(not os.access(sys.executable, os.X_OK))"
    probe = await asyncio.create_subprocess_exec(*command, "-c", check, cwd=PROJECT)
    if await probe.wait() != 0:
        unavailable(f"user nobody cannot use {sys.executable}")
    return command


@needs_root
async def test_contract_holds_for_an_ordinary_user(python_as_nobody: list[str]) -> None:
    """The whole contract, of every kind of worker that needs no other rights."""
    tests = ["tests/workers/test_contract.py", "-k", "host and not large", "-q", "-p", "no:cacheprovider"]
    process = await asyncio.create_subprocess_exec(
        *(*python_as_nobody, "-m", "pytest", *tests), cwd=PROJECT, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


CONFIGURED_USER = """
import asyncio, sys
from pathlib import Path
from expbuild.config_workers import HostWorkerConfig
from expbuild.workers.host import HostWorker
from expbuild.workers.spawner_client import Spawner

config = HostWorkerConfig(work_dir=Path(sys.argv[1]), isolation="none", run_as_user="nobody")
asyncio.run(HostWorker("host-0", config, 0, Spawner()).start())
"""


@needs_root
async def test_ordinary_user_cannot_promise_another_user(python_as_nobody: list[str], base_dir: Path) -> None:
    """run_as_user is refused where it cannot be kept."""
    process = await asyncio.create_subprocess_exec(
        *(*python_as_nobody, "-c", CONFIGURED_USER, str(base_dir / "work")),
        cwd=PROJECT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert b"StartupError: run_as_user = 'nobody': only a server started as root can switch users" in stderr
