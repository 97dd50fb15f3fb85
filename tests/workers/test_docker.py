"""What only the Docker worker does: containers, images, users, limits, failing daemons. (See test_contract.py too.)"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from expbuild.config_workers import DockerWorkerConfig
from expbuild.errors import InvalidArgument, StartupError, WorkerFailed
from expbuild.workers.base import Owner
from expbuild.workers.docker import DockerWorker
from expbuild.workers.docker_daemon import LABEL
from expbuild.workers.docker_image import numeric_user
from tests.support.docker import DockerDaemon
from tests.workers.contract import Bench, containers_of, open_docker_worker, wait_until

pytestmark = pytest.mark.docker

MEMORY_LIMIT = 64 << 20
NO_IMAGE = "localhost:1/expbuild-test:none"  # nothing listens there


class Relay:
    """A socket that leads to the daemon as long as a test wants it to."""

    def __init__(self, path: Path, daemon: DockerDaemon) -> None:
        self.host = f"unix://{path}"
        self._path = path
        self._target = daemon.host.removeprefix("unix://")
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def close(self) -> None:
        """Be a daemon that has died: nobody listens, and what was connected is no more."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def hang(self) -> None:
        """Be a daemon that is stuck: connections are accepted, and nothing moves."""
        self._flows.clear()

    def resume(self) -> None:
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        with suppress(asyncio.CancelledError, OSError):
            far_reader, far_writer = await asyncio.open_unix_connection(self._target)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._copy(reader, far_writer))
                    tasks.create_task(self._copy(far_reader, writer))
            finally:
                far_writer.close()
                writer.close()
        self._connections.discard(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            with suppress(OSError):
                writer.write_eof()


@pytest.fixture
async def relay(docker: DockerDaemon, base_dir: Path) -> AsyncIterator[Relay]:
    if not docker.host.startswith("unix://"):
        pytest.skip(f"NOT TESTED: the daemon at {docker.host} has no unix socket")
    relay = Relay(base_dir / "relay.sock", docker)
    yield relay
    await relay.close()


@asynccontextmanager
async def opened(base_dir: Path, docker: DockerDaemon, image: str, **config: object) -> AsyncIterator[Bench]:
    async with open_docker_worker(base_dir / "work", docker.host, image, **config) as worker:
        yield Bench(worker)


@pytest.fixture
async def bench(docker: DockerDaemon, busybox: str, base_dir: Path) -> AsyncIterator[Bench]:
    """A worker with nothing configured but its image."""
    async with opened(base_dir, docker, busybox) as bench:
        yield bench


@pytest.fixture
def derived_image(docker: DockerDaemon, busybox: str) -> Iterator[Callable[..., str]]:
    """Make images from busybox by Dockerfile instructions; they are removed in the end."""
    made: list[str] = []

    def derive(*instructions: str) -> str:
        name = f"expbuild-test-derived-{len(made)}"
        container = docker.run("create", busybox).strip()
        changes = [word for instruction in instructions for word in ("--change", instruction)]
        docker.run("commit", *changes, container, name)
        docker.run("rm", container)
        made.append(name)
        return name

    yield derive
    for name in made:
        docker.run("rmi", "--force", name)


@asynccontextmanager
async def unstarted(base_dir: Path, host: str, image: str, **config: object) -> AsyncIterator[DockerWorker]:
    """A worker that gives up on its daemon after two seconds."""
    values = {"work_dir": base_dir / "work", "docker_host": host, "image": image, **config}
    worker = DockerWorker("docker-0", DockerWorkerConfig.model_validate(values), api_timeout_s=2.0, heartbeat_s=0.5)
    try:
        yield worker
    finally:
        await worker.close()


# ---- the container ---------------------------------------------------------------------------------------------


async def test_large_output_on_both_streams_is_byte_exact(bench: Bench) -> None:
    """20 MB on each, written at the same time, arrive whole and apart."""
    ran = await bench.sh("seq 2600000 & seq 1 2 5200000 >&2; wait")
    assert ran.stdout == b"".join(b"%d\n" % number for number in range(1, 2_600_001))
    assert ran.stderr == b"".join(b"%d\n" % number for number in range(1, 5_200_001, 2))


async def test_container_has_no_rights(bench: Bench) -> None:
    """No capability, none to be gained, system calls filtered, even for its root."""
    ran = await bench.sh("cat /proc/self/status")
    status = dict(line.split(":\t", 1) for line in ran.stdout.decode().splitlines() if ":\t" in line)
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


async def test_container_is_configured_as_a_closed_list(bench: Bench, docker: DockerDaemon) -> None:
    """What the daemon says about a running one: no rights, no log, bounded processes, only our two mounts."""
    run = bench.prepare("/bin/sh", "-c", ": > ready; sleep 1000", timeout_s=None)
    running = asyncio.create_task(bench.worker.run(run))
    try:
        await wait_until(lambda: bench.has_made(run, "ready"))
        (container,) = containers_of(bench.worker, docker.host)  # type: ignore[arg-type]
        shown = docker.run(
            "inspect",
            "--format",
            "{{.HostConfig.Privileged}} {{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}} {{.HostConfig.PidsLimit}} "
            "{{.HostConfig.NetworkMode}} {{.HostConfig.LogConfig.Type}} {{range .Mounts}}{{.Destination}} {{end}}",
            container,
        ).split()
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert shown[:6] == ["false", "[ALL]", "[no-new-privileges]", "4096", "none", "none"]
    assert sorted(shown[6:]) == ["/tmp", "/workspace"]


async def test_paths_and_host_name_are_the_same_for_every_action(bench: Bench) -> None:
    """Nothing in its surroundings tells one action from another."""
    seen = [(await bench.sh('pwd; hostname; echo "$TMPDIR $HOSTNAME"')).stdout for _ in range(2)]
    assert seen == [b"/workspace\nlocalhost\n/tmp localhost\n"] * 2


async def test_network_none_leaves_only_loopback(bench: Bench) -> None:
    """network_mode = "none" is the default."""
    assert (await bench.run("ls", "/sys/class/net")).stdout.split() == [b"lo"]


async def test_network_host_is_the_machines(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """network_mode = "host" shows the interfaces of this machine."""
    async with opened(base_dir, docker, busybox, network_mode="host") as bench:
        ran = await bench.run("ls", "/sys/class/net")
    assert sorted(ran.stdout.decode().split()) == sorted(os.listdir("/sys/class/net"))


@pytest.mark.parametrize("script", ["tail /dev/zero", "tail /dev/zero; exit 3"], ids=["command", "its-child"])
async def test_out_of_memory_is_said_with_the_limit(
    docker: DockerDaemon, busybox: str, base_dir: Path, script: str
) -> None:
    """Whoever died of it, the message names the limit."""
    async with opened(base_dir, docker, busybox, memory_limit=MEMORY_LIMIT) as bench:
        ran = await bench.sh(script)
        assert ran.result.message == "out of memory: a process was killed at the memory limit of 64 MiB (memory_limit)"
        assert ran.exit_code in (137, 3)
        assert (await bench.sh("exit 137")).result.message == ""


async def test_cpu_limit_may_exceed_the_machine(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """One configuration serves machines of all sizes."""
    async with opened(base_dir, docker, busybox, cpu_limit=512.0) as bench:
        assert (await bench.run("true")).exit_code == 0


async def test_command_may_abort_itself(bench: Bench) -> None:
    """As process 1 it could not: the kernel spares that one its own signals."""
    assert (await bench.sh("kill -ABRT $$")).exit_code == 128 + 6
    assert (await bench.sh("kill -TERM $$")).exit_code == 128 + 15


async def test_image_settings_that_would_change_the_command_are_ignored(
    docker: DockerDaemon, derived_image: Callable[..., str], base_dir: Path
) -> None:
    """Entry point, directory and health check are not the action's; the variables are, below its own."""
    image = derived_image(
        'ENTRYPOINT ["echo", "the entry point"]', 'CMD ["cmd"]', "WORKDIR /home", "ENV FROM_IMAGE=1 BOTH=image"
    )
    async with opened(base_dir, docker, image) as bench:
        ran = await bench.sh('pwd; echo "$FROM_IMAGE $BOTH $PATH"', env={"BOTH": "command"})
    assert ran.stdout == b"/workspace\n1 command /bin:/usr/bin\n"


async def test_volumes_are_read_only_unless_said(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """A directory of this machine is seen, and written only where the configuration says so."""
    for name in ("shared", "with:colon"):
        (base_dir / name).mkdir()
    (base_dir / "shared/file").write_text("content")
    volumes = [
        {"host_path": base_dir / "shared", "container_path": "/read"},
        {"host_path": base_dir / "with:colon", "container_path": "/write", "read_only": False},
    ]
    async with opened(base_dir, docker, busybox, volumes=volumes) as bench:
        ran = await bench.sh("cat /read/file; echo x > /write/file; echo x > /read/file")
    assert (ran.exit_code, ran.stdout) == (1, b"content")
    assert b"Read-only" in ran.stderr
    assert (base_dir / "with:colon/file").read_text() == "x\n"


async def test_missing_volume_keeps_the_worker_offline(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """It is neither created nor left out."""
    volumes = [{"host_path": base_dir / "absent", "container_path": "/volume"}]
    async with unstarted(base_dir, docker.host, busybox, volumes=volumes) as worker:
        with pytest.raises(WorkerFailed, match="absent"):
            await worker.start()
        assert "absent" in worker.offline_reason
        assert not (base_dir / "absent").exists()


async def test_volume_in_place_of_the_workspace_is_refused(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """The server does not start with what cannot work."""
    volumes = [{"host_path": base_dir, "container_path": "/workspace"}]
    async with unstarted(base_dir, docker.host, busybox, volumes=volumes) as worker:
        with pytest.raises(StartupError, match="/workspace"):
            await worker.start()


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        pytest.param({"a=b": "c"}, ["true"], id="equals-in-name"),
        pytest.param({"": "c"}, ["true"], id="empty-name"),
        pytest.param({"a": "\0"}, ["true"], id="nul"),
        pytest.param({}, [""], id="empty-program"),
        pytest.param({}, ["true", "x" * 200_000], id="long-argument"),
        pytest.param({}, ["true", *["x" * 100_000] * 40], id="long-arguments"),
        pytest.param({}, ["true", *["x" * 100_000] * 200], id="endless-arguments"),
    ],
)
async def test_what_no_container_can_be_given_is_the_clients_error(
    bench: Bench, variables: dict[str, str], arguments: list[str]
) -> None:
    """And nothing the worker goes offline for."""
    with pytest.raises(InvalidArgument):
        await bench.run(*arguments, env=variables)
    assert isinstance(bench.worker, DockerWorker)
    assert bench.worker.offline_reason == ""


@pytest.mark.parametrize("program", ["no-such-program", "./no-such-program", "/bin", "./script"])
async def test_programs_are_named_without_an_init(bench: Bench, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On daemons that have no init the daemon's own words are understood."""
    assert isinstance(bench.worker, DockerWorker)
    monkeypatch.setattr(bench.worker._fresh, "use_init", False)
    run = bench.prepare(program, "argument", env={"PATH": "/bin:/nowhere"})
    script = run.workspace / "root/script"
    script.write_bytes(b"#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(InvalidArgument, match=program):
        await bench.worker.run(run)
    assert (await bench.sh("exit 7")).exit_code == 7


# ---- users -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "uid", "gid"),
    [
        pytest.param("1000:1000", 1000, 1000, id="numbers"),
        pytest.param("4321:1234", 4321, 1234, id="unknown-numbers"),
        pytest.param("1000", 1000, 1000, id="known-number"),
        pytest.param("4321", 4321, 0, id="unknown-number"),
        pytest.param("builder", 1000, 1000, id="name"),
        pytest.param("builder:nogroup", 1000, 65534, id="names"),
    ],
)
async def test_user_owns_its_workspace(
    docker: DockerDaemon, busybox: str, base_dir: Path, user: str, uid: int, gid: int
) -> None:
    """Commands run as the configured user, and what they write belongs to it."""
    async with opened(base_dir, docker, busybox, user=user) as bench:
        assert bench.worker.owner == Owner(uid, gid)
        ran = await bench.sh('id -u; id -g; echo x > out; echo x > "$TMPDIR/file"')
        assert (ran.exit_code, ran.stdout.split()) == (0, [b"%d" % uid, b"%d" % gid])
        found = (ran.root / "out").stat()
        assert (found.st_uid, found.st_gid) == (uid, gid)


async def test_user_of_the_image_holds_when_none_is_configured(
    docker: DockerDaemon, derived_image: Callable[..., str], base_dir: Path
) -> None:
    """USER of the image."""
    async with opened(base_dir, docker, derived_image("USER builder")) as bench:
        assert bench.worker.owner == Owner(1000, 1000)
        assert (await bench.run("id", "-u")).stdout == b"1000\n"


async def test_servers_own_user_holds_when_the_image_says_nothing(bench: Bench) -> None:
    """Then the inputs are copies, as the owner could write to links."""
    assert bench.worker.owner is None
    assert (await bench.run("id", "-u")).stdout == b"%d\n" % os.geteuid()


async def test_unknown_user_keeps_the_worker_offline(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """The reason names the user."""
    async with unstarted(base_dir, docker.host, busybox, user="stranger") as worker:
        with pytest.raises(WorkerFailed, match="stranger"):
            await worker.start()
        assert containers_of(worker, docker.host) == []


PASSWD = "root:x:0:0::/:/bin/sh\nbuilder:x:1000:100::/:\nbroken\n"
GROUP = "root:x:0:\nusers:x:100:builder\n"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("builder", (1000, 100)),
        ("builder:root", (1000, 0)),
        ("builder:77", (1000, 77)),
        ("1000", (1000, 100)),
        ("1001", (1001, 0)),
        ("1001:users", (1001, 100)),
        ("nobody", None),
        ("builder:nobody", None),
        ("broken", None),
    ],
)
def test_numeric_user_reads_as_docker_does(user: str, expected: tuple[int, int] | None) -> None:
    """Names by passwd and group; a number without group has the group passwd knows, else 0."""
    assert numeric_user(user, PASSWD, GROUP) == expected


# ---- images ----------------------------------------------------------------------------------------------------


async def test_image_that_cannot_be_pulled_keeps_the_worker_offline(docker: DockerDaemon, base_dir: Path) -> None:
    """The reason names the image."""
    async with unstarted(base_dir, docker.host, NO_IMAGE) as worker:
        with pytest.raises(WorkerFailed, match=f"pull the image {NO_IMAGE}"):
            await worker.start()
        assert NO_IMAGE in worker.offline_reason


async def test_always_pull_asks_though_the_image_is_there(docker: DockerDaemon, busybox: str, base_dir: Path) -> None:
    """Without it an image that is there is used as it is."""
    docker.run("tag", busybox, NO_IMAGE)
    try:
        async with unstarted(base_dir, docker.host, NO_IMAGE, always_pull=True) as worker:
            with pytest.raises(WorkerFailed, match="could not pull"):
                await worker.start()
        async with opened(base_dir, docker, NO_IMAGE) as bench:
            assert (await bench.run("true")).exit_code == 0
    finally:
        docker.run("rmi", NO_IMAGE)


async def test_moved_tag_changes_nothing_while_the_worker_lives(
    docker: DockerDaemon, busybox: str, derived_image: Callable[..., str], base_dir: Path
) -> None:
    """The image is the one the name meant at the start."""
    image, other = derived_image("ENV WHICH=first"), derived_image("ENV WHICH=second")
    async with opened(base_dir, docker, image) as bench:
        docker.run("tag", other, image)
        assert isinstance(bench.worker, DockerWorker)
        await bench.worker.start()
        assert (await bench.sh("echo $WHICH")).stdout == b"first\n"


# ---- what is left behind, and who else is there ----------------------------------------------------------------


async def test_cancellation_at_any_moment_leaves_no_container(bench: Bench, docker: DockerDaemon) -> None:
    """Also in the middle of creating and starting one."""
    assert isinstance(bench.worker, DockerWorker)
    for number in range(10):
        running = asyncio.create_task(bench.worker.run(bench.prepare("sleep", "1000")))
        await asyncio.sleep(number * 0.03)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert containers_of(bench.worker, docker.host) == []
    assert (await bench.run("true")).exit_code == 0


async def test_leftovers_of_this_worker_are_removed_at_start(
    docker: DockerDaemon, busybox: str, base_dir: Path
) -> None:
    """Those of an earlier process, files too; containers of other servers stay."""
    async with unstarted(base_dir, docker.host, busybox) as worker:
        (worker.work_dir / "run-1").mkdir(parents=True)
        ours = docker.run("run", "-d", "--network=none", f"--label={LABEL}={worker.work_dir}", busybox, "sleep", "1000")
        other = docker.run("create", f"--label={LABEL}={base_dir}/other", busybox).strip()
        try:
            assert containers_of(worker, docker.host) == [ours.strip()[:12]]
            await worker.start()
            assert containers_of(worker, docker.host) == []
            assert list(worker.work_dir.iterdir()) == []
            assert docker.run("inspect", "--format", "{{.Id}}", other).strip() == other
        finally:
            docker.run("rm", "--force", other)


async def test_two_servers_do_not_share_a_work_dir(bench: Bench, docker: DockerDaemon, busybox: str) -> None:
    """The second would remove the containers of the first."""
    async with unstarted(bench.worker.work_dir.parent.parent, docker.host, busybox) as worker:
        with pytest.raises(StartupError, match="in use"):
            await worker.start()


@pytest.mark.parametrize("command", ["kill", "stop", "rm"])
async def test_container_ended_by_others_is_no_result(bench: Bench, docker: DockerDaemon, command: str) -> None:
    """Nor is one that the daemon ends as it shuts down: the action may have been about to succeed."""
    run = bench.prepare("/bin/sh", "-c", "trap 'exit 0' TERM; : > ready; while :; do sleep 1; done")
    running = asyncio.create_task(bench.worker.run(run))
    await wait_until(lambda: bench.has_made(run, "ready"))
    assert isinstance(bench.worker, DockerWorker)
    containers = containers_of(bench.worker, docker.host)
    docker.run(command, *(["--force"] if command == "rm" else []), *containers)
    with pytest.raises(WorkerFailed):
        await running
    assert bench.worker.offline_reason != ""
    await bench.worker.start()
    assert bench.worker.offline_reason == ""
    assert (await bench.sh("kill -KILL $$")).exit_code == 137


# ---- daemons that fail -----------------------------------------------------------------------------------------


async def test_worker_comes_online_when_the_daemon_does(relay: Relay, busybox: str, base_dir: Path) -> None:
    """Without a daemon `start` says why, and can be called again."""
    async with unstarted(base_dir, relay.host, busybox) as worker:
        with pytest.raises(WorkerFailed, match="cannot reach the Docker daemon"):
            await worker.start()
        assert worker.offline_reason == f"cannot reach the Docker daemon at {relay.host}: No such file or directory"
        await relay.open()
        await worker.start()
        assert worker.offline_reason == ""
        assert (await Bench(worker).run("true")).exit_code == 0


async def test_hanging_daemon_is_not_waited_for(relay: Relay, busybox: str, base_dir: Path) -> None:
    """Every call has its bound."""
    await relay.open()
    relay.hang()
    async with unstarted(base_dir, relay.host, busybox) as worker:
        async with asyncio.timeout(10):
            with pytest.raises(WorkerFailed, match=r"did not describe itself within 2.0 s"):
                await worker.start()


@pytest.mark.parametrize("trouble", ["dies", "hangs"])
async def test_daemon_lost_during_a_run_is_the_workers_failure(
    relay: Relay, docker: DockerDaemon, busybox: str, base_dir: Path, trouble: str
) -> None:
    """The action has no result, the worker is offline; back online it has removed what it left."""
    await relay.open()
    async with unstarted(base_dir, relay.host, busybox) as worker:
        await worker.start()
        bench = Bench(worker)
        run = bench.prepare("/bin/sh", "-c", ": > ready; sleep 1000", timeout_s=None)
        running = asyncio.create_task(worker.run(run))
        await wait_until(lambda: bench.has_made(run, "ready"))
        if trouble == "dies":
            await relay.close()
        else:
            relay.hang()
        async with asyncio.timeout(15):
            with pytest.raises(WorkerFailed):
                await running
        assert worker.offline_reason != ""
        assert len(containers_of(worker, docker.host)) == 1
        if trouble == "dies":
            await relay.open()
        else:
            relay.resume()
        await worker.start()
        assert worker.offline_reason == ""
        assert containers_of(worker, docker.host) == []


async def test_address_that_is_none_is_a_startup_error(
    busybox: str, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DOCKER_HOST can say anything."""
    monkeypatch.setenv("DOCKER_HOST", "nonsense")
    config = DockerWorkerConfig.model_validate({"work_dir": base_dir / "work", "image": busybox})
    with pytest.raises(StartupError, match="nonsense"):
        await DockerWorker("docker-0", config).start()
