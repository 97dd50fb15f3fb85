"""What an action may use up, and what its client is told when it wanted more: in plain words, in `message`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest

from expbuild.reapi import ExecuteResponse, ResourceUsage, Status
from expbuild.workers.cgroups import find_home
from tests.support.actions import BuiltAction, Client, build_action, shell
from tests.support.files import scratch_directory
from tests.support.require import unavailable
from tests.support.server import ReServer, host_pool_config

pytestmark = pytest.mark.one_transport

FAILED_PRECONDITION, DEADLINE_EXCEEDED, INVALID_ARGUMENT = 9, 4, 3
MEMORY_LIMIT = 96 << 20
LOG_LIMIT = 1 << 20
OUTPUT_LIMIT = 8 << 20


@pytest.fixture(scope="module")
def strict_server() -> Iterator[ReServer]:
    with scratch_directory("expbuild-verdicts-") as directory:
        config = host_pool_config(directory / "state")
        config["execution"]["pool"].update(max_log_bytes=LOG_LIMIT, max_output_bytes=OUTPUT_LIMIT)
        config["execution"]["pool"]["workers"][0].update(
            memory_limit=MEMORY_LIMIT, cpu_limit=1.0, max_processes=64, max_open_files=100
        )
        with ReServer(directory / "server", config) as server:
            yield server


@pytest.fixture
async def strict(strict_server: ReServer) -> AsyncIterator[Client]:
    async with Client(strict_server.address) as client:
        yield client


async def respond(client: Client, action: BuiltAction) -> ExecuteResponse:
    return (await client.execute(action)).response


def python(script: str, **options: object) -> BuiltAction:
    """Build an action that runs the system's Python."""
    return build_action(("/usr/bin/python3", "-c", script), salt=os.urandom(8), **options)  # type: ignore[arg-type]


async def test_out_of_memory_names_limit_and_peak(strict: Client) -> None:
    """Not the exit code alone, which a command can have of itself."""
    home = find_home()
    home.close()
    if "memory" not in home.controllers:
        unavailable("no control group can be made here")
    response = await respond(strict, python(f"x = bytearray({4 * MEMORY_LIMIT}); x[::4096] = b'x' * len(x[::4096])"))
    assert response.status == Status()
    assert response.result.exit_code == 137
    assert "out of memory: a process was killed at the memory limit of 96 MiB (memory_limit); it had used 9" in (
        response.message
    )
    own = await respond(strict, shell("exit 137"))
    assert (own.result.exit_code, own.message) == (137, "")


async def test_timeout_says_how_long_the_command_was_silent(strict: Client) -> None:
    """A hang looks different from slowness."""
    response = await respond(strict, shell("exec sleep 1000", timeout_s=0.2))
    assert response.status == Status(code=DEADLINE_EXCEEDED, message="execution timeout exceeded")
    assert response.message == "timed out after 0.2 s; it wrote nothing to stdout or stderr"
    response = await respond(strict, shell("echo started; exec sleep 1000", timeout_s=2.5))
    assert response.message.startswith("timed out after 2.5 s; silent for the last ")


@pytest.mark.parametrize(("stream", "redirection"), [("stdout", ""), ("stderr", ">&2")])
async def test_endless_output_is_cut_and_its_writer_killed(strict: Client, stream: str, redirection: str) -> None:
    """The disk is bounded, and what came before the limit is there to be read."""
    response = await respond(strict, shell(f"yes {redirection}"))
    assert response.message == (
        f"more than 1 MiB written to {stream} (max_log_bytes): the rest was cut, and the command was killed"
    )
    assert response.result.exit_code != 0
    digest = getattr(response.result, f"{stream}_digest")
    assert LOG_LIMIT < digest.size_bytes < LOG_LIMIT + 100
    assert (await strict.read(digest))[LOG_LIMIT:].startswith(b"\n[cut after 1048576 of ")


async def test_output_on_a_sparse_file_is_refused_unread(strict: Client) -> None:
    """By the size it claims; and no single file can claim more than the limit in the first place."""
    response = await respond(strict, shell("truncate -s 7M a b", output_paths=["a", "b"]))
    assert response.status.code == FAILED_PRECONDITION
    assert "the outputs are larger than 8 MiB together (max_output_bytes)" in response.status.message
    response = await respond(strict, shell("exec truncate -s 1T a", output_paths=["a"]))
    assert response.result.exit_code == 128 + 25
    assert response.message.startswith(
        "killed by signal 25 (SIGXFSZ): it wrote a file larger than 8 MiB (max_output_bytes)"
    )


async def test_processes_and_open_files_are_limited(strict: Client) -> None:
    """The action fails, nobody else."""
    script = "import os\nfor i in range(200):\n    os.fork() or os.execvp('sleep', ['sleep', '1000'])"
    if os.geteuid() == 0:
        response = await respond(strict, python(script))
        assert response.result.exit_code == 1
        assert b"Resource temporarily unavailable" in await strict.read(response.result.stderr_digest)
    response = await respond(strict, python("import os\nfor i in range(200): os.dup(0)"))
    assert response.result.exit_code == 1
    assert b"Too many open files" in await strict.read(response.result.stderr_digest)


async def test_missing_output_says_what_was_written_instead(strict: Client) -> None:
    """Which is how misspelt names are found. Inputs are not named: they were not written."""
    response = await respond(
        strict,
        shell(
            "echo > out/lib.so; echo > top",
            inputs={"out": {"input": b"x"}},
            output_paths=["out/lib.o", "gone/x", *(f"more{i}" for i in range(3))],
        ),
    )
    assert response.status == Status()
    assert response.message == (
        "declared output 'out/lib.o' was not written ('out' holds 'lib.so' instead); "
        "declared output 'gone/x' was not written ('gone' holds nothing new); "
        "declared output 'more0' was not written (the input root holds 'top' instead); "
        "nor were 2 more of them"
    )


async def test_program_that_is_not_found_names_the_path_that_was_searched(strict: Client) -> None:
    """The PATH of the command, not that of the server."""
    action = build_action(("no-such-program",), environment={"PATH": "/nowhere:/bin"}, salt=os.urandom(8))
    response = await respond(strict, action)
    assert response.status.code == INVALID_ARGUMENT
    assert response.status.message == (
        "program 'no-such-program' was not found in the PATH of the command: /nowhere:/bin"
    )


async def test_result_tells_what_the_action_used(strict: Client) -> None:
    """As our own message in `auxiliary_metadata`; a cached result still has it."""
    action = python(
        "x = bytearray(50 << 20)\nx[::4096] = b'x' * len(x[::4096])\nopen('out', 'w').write('12345')",
        inputs={"a": b"123", "d": {"b": b"4567"}},
        output_paths=["out"],
    )
    for is_cached in (False, True):
        response = await respond(strict, action)
        assert response.cached_result is is_cached
        usage = ResourceUsage()
        assert response.result.execution_metadata.auxiliary_metadata[0].Unpack(usage)
        assert (usage.input_files, usage.input_bytes) == (2, 7)
        assert (usage.output_files, usage.output_bytes) == (1, 5)
        assert 50 << 20 <= usage.memory_peak_bytes <= MEMORY_LIMIT
        assert usage.user_cpu.ToNanoseconds() + usage.system_cpu.ToNanoseconds() > 0
        assert usage.command.ToNanoseconds() > 0


async def test_full_disk_is_said() -> None:
    """The command's own words are about some file; this is about the worker."""
    if os.geteuid() != 0:
        unavailable("mounting a small file system needs root")
    with scratch_directory("expbuild-full-") as directory:
        small = directory / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=755", "tmpfs", str(small)], check=True)
        try:
            config = host_pool_config(directory / "state")
            config["execution"]["pool"]["workers"][0].update(work_dir=str(small / "work"))
            with ReServer(directory / "server", config) as server:
                async with Client(server.address) as client:
                    response = await respond(client, shell("head -c 100M /dev/zero > $TMPDIR/x"))
                assert response.result.exit_code == 1
                assert response.message == "the disk of the worker's directories is full"
        finally:
            subprocess.run(["umount", str(small)], check=True)
