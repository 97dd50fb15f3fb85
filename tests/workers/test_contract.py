"""What every kind of worker does, whatever runs the command."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from expbuild.errors import InvalidArgument
from expbuild.workers.base import DEFAULT_PATH
from tests.workers.contract import DAEMON, WORKER_KINDS, Bench, Input, OpenWorker, wait_until


@pytest.fixture(params=WORKER_KINDS)
async def bench(request: pytest.FixtureRequest, base_dir: Path) -> AsyncIterator[Bench]:
    open_worker: OpenWorker = request.param
    async with open_worker(base_dir / "work", request) as worker:
        yield Bench(worker)


async def test_exit_code_is_the_commands(bench: Bench) -> None:
    """A nonzero exit code is a result, with nothing more to say about it."""
    ran = await bench.sh("exit 37")
    assert (ran.exit_code, ran.result.timed_out, ran.result.message) == (37, False, "")
    assert (await bench.sh("exit 0")).exit_code == 0


async def test_stdout_and_stderr_are_byte_exact_and_apart(bench: Bench) -> None:
    """No byte is added, changed, lost or sent to the other stream."""
    ran = await bench.sh(r"printf 'out\000\377\r\n'; printf 'err\376' >&2; printf last")
    assert (ran.stdout, ran.stderr) == (b"out\x00\xff\r\nlast", b"err\xfe")


async def test_large_output_arrives_whole(bench: Bench) -> None:
    """50 MB are written at the speed of the disk and all there."""
    ran = await bench.sh("head -c 50000000 /dev/zero")
    assert (ran.exit_code, len(ran.stdout)) == (0, 50_000_000)


async def test_dev_stdout_and_dev_stderr_can_be_opened(bench: Bench) -> None:
    """Scripts write to /dev/stderr by name."""
    ran = await bench.sh("echo out >> /dev/stdout; echo err >> /dev/stderr")
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, b"out\n", b"err\n")


async def test_stdin_is_empty(bench: Bench) -> None:
    """Reading stdin gives end of file at once."""
    ran = await bench.run("cat")
    assert (ran.exit_code, ran.stdout) == (0, b"")


async def test_environment_is_the_commands_and_not_the_servers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables arrive unchanged, whatever is in them; the server's own do not."""
    monkeypatch.setenv("SECRET", "of the server")
    values = {"EMPTY": "", "SPACES": " a  b ", "LINES": "a\nb", "QUOTES": "\"'$HOME`", "UNICODE": "ü€", "X": "a=b"}
    ran = await bench.run("env", "-0", env=values)
    seen = dict(line.decode().split("=", 1) for line in ran.stdout.split(b"\0") if line)
    assert {name: seen.get(name) for name in values} == values
    assert "SECRET" not in seen


async def test_default_path_lies_under_the_commands_own(bench: Bench) -> None:
    """Without PATH the default holds; a PATH of the command replaces it."""
    assert (await bench.sh('printf %s "$PATH"')).stdout.decode() == DEFAULT_PATH
    assert (await bench.sh('printf %s "$PATH"', env={"PATH": "/nowhere"})).stdout == b"/nowhere"


async def test_tmpdir_is_private_writable_and_outside_the_input_root(bench: Bench) -> None:
    """TMPDIR is empty at first, and what is written there is no output."""
    ran = await bench.sh('ls -A "$TMPDIR"; echo x > "$TMPDIR/file" && cat "$TMPDIR/file"')
    assert (ran.exit_code, ran.stdout) == (0, b"x\n")
    assert os.listdir(ran.root) == []


async def test_input_root_is_the_working_directory(bench: Bench) -> None:
    """Without a working directory the command starts in the input root, which it can write to."""
    ran = await bench.sh("cat in && echo made > out", files={"in": Input(b"content")})
    assert (ran.exit_code, ran.stdout) == (0, b"content")
    assert (ran.root / "out").read_bytes() == b"made\n"
    assert stat.S_IMODE((ran.root / "out").stat().st_mode) == 0o644


async def test_working_directory_is_below_the_input_root(bench: Bench) -> None:
    """The command starts in its working directory."""
    ran = await bench.sh("pwd; cat ../in; echo made > out", files={"a/in": Input(b"x")}, working_directory="a/b")
    assert ran.stdout.endswith(b"/a/b\nx")
    assert (ran.root / "a/b/out").exists()


async def test_program_with_slash_is_relative_to_the_working_directory(bench: Bench) -> None:
    """argv[0] with a slash is no matter of PATH."""
    files = {"tools/say": Input(b'#!/bin/sh\necho "$0" "$@"\n', executable=True)}
    ran = await bench.run("tools/say", "a b", files=files)
    assert (ran.exit_code, ran.stdout) == (0, b"tools/say a b\n")
    ran = await bench.run("../tools/say", files=files, working_directory="sub")
    assert (ran.exit_code, ran.stdout) == (0, b"../tools/say\n")


async def test_program_without_slash_is_found_in_the_commands_path(bench: Bench) -> None:
    """The command's own PATH decides, relative entries count from the working directory."""
    files = {"tools/say": Input(b"#!/bin/sh\necho said\n", executable=True)}
    ran = await bench.run("say", files=files, env={"PATH": "/nowhere:tools"})
    assert (ran.exit_code, ran.stdout) == (0, b"said\n")


async def test_missing_program_names_it_and_the_path(bench: Bench) -> None:
    """What cannot be found is the client's error, said with where we looked."""
    with pytest.raises(InvalidArgument, match=r"no-such-program.*/nowhere:/neither"):
        await bench.run("no-such-program", env={"PATH": "/nowhere:/neither"})
    with pytest.raises(InvalidArgument, match=r"\./no-such-program"):
        await bench.run("./no-such-program")


@pytest.mark.parametrize(
    ("program", "files"),
    [
        pytest.param("./data", {"data": Input(b"#!/bin/sh\n")}, id="not-executable"),
        pytest.param("./directory", {"directory/file": Input()}, id="directory"),
        pytest.param("./script", {"script": Input(b"#!/no/such/shell\n", executable=True)}, id="no-interpreter"),
    ],
)
async def test_program_that_cannot_be_executed_is_named(bench: Bench, program: str, files: dict[str, Input]) -> None:
    """A file that is no program is the client's error."""
    with pytest.raises(InvalidArgument, match=program):
        await bench.run(program, files=files)


async def test_thousand_arguments_arrive(bench: Bench) -> None:
    """Long command lines are ordinary."""
    arguments = [f"argument {number}" for number in range(1000)]
    ran = await bench.sh('echo $#; printf "%s\\n" "$@"', *arguments)
    assert ran.stdout.decode().splitlines() == ["1000", *arguments]


async def test_large_environment_arrives(bench: Bench) -> None:
    """So are 100 kB of environment."""
    ran = await bench.sh('printf %s "$LARGE"', env={"LARGE": "x" * 100_000})
    assert len(ran.stdout) == 100_000


async def test_no_descriptor_is_inherited(bench: Bench) -> None:
    """The command has three descriptors; the fourth is ls's own."""
    ran = await bench.run("ls", "/proc/self/fd")
    assert ran.stdout.split() == [b"0", b"1", b"2", b"3"]


async def test_death_by_signal_is_128_and_its_number(bench: Bench) -> None:
    """As a shell has it."""
    assert (await bench.sh("kill -SEGV $$")).exit_code == 128 + 11
    assert (await bench.sh("kill -KILL $$")).exit_code == 128 + 9


async def test_timeout_keeps_what_was_written_and_kills_all(bench: Bench) -> None:
    """The deadline ends the command and every process it started, also a daemon that ignores SIGTERM."""
    ran = await bench.sh(f"echo before; echo too >&2; {DAEMON} sleep 1000", timeout_s=1.5)
    assert ran.result.timed_out
    assert ran.result.message.startswith("timed out after 1.5 s")
    assert (ran.stdout, ran.stderr) == (b"before\n", b"too\n")
    assert (ran.root / "ready").exists()
    assert bench.survivors() == []


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_who_writes_without_end_is_killed(bench: Bench, stream: str) -> None:
    """And the message says which stream it was; about as much as was allowed is kept."""
    to = {"stdout": "", "stderr": ">&2"}[stream]
    run = replace(bench.prepare("/bin/sh", "-c", f"yes {to}; exit 3"), max_log_bytes=1 << 20)
    result = await bench.worker.run(run)
    assert result.message.startswith(f"more than 1 MiB written to {stream} (max_log_bytes)")
    assert result.exit_code != 0
    assert getattr(run, stream).stat().st_size > 1 << 20
    assert (await bench.sh("exit 4")).exit_code == 4


async def test_nothing_survives_a_normal_end(bench: Bench) -> None:
    """A command that leaves daemons behind has its result at once, and they are dead by then."""
    async with asyncio.timeout(20):
        ran = await bench.sh(f"{DAEMON} sleep 1000 & echo done; exit 3", timeout_s=None)
    assert (ran.exit_code, ran.result.message) == (3, "")
    assert b"done\n" in ran.stdout
    assert bench.survivors() == []


async def test_cancellation_kills_all(bench: Bench) -> None:
    """When the cancelled call returns, the command is dead, though it ignores SIGTERM."""
    run = bench.prepare("/bin/sh", "-c", f"trap '' TERM; {DAEMON} sleep 1000", timeout_s=None)
    running = asyncio.create_task(bench.worker.run(run))
    await wait_until(lambda: bench.has_made(run, "ready"))
    assert bench.survivors() != []
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20):
            await running
    assert bench.survivors() == []
    assert (await bench.sh("exit 0")).exit_code == 0


async def test_runs_follow_each_other(bench: Bench) -> None:
    """A slot is as good as new after each run, whatever the run was."""
    for number in range(10):
        assert (await bench.sh(f"exit {number}")).exit_code == number
