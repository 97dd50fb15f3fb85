"""What an action sees while it runs, and what comes back of what it leaves behind."""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from expbuild.reapi import ActionResult, Command, ExecuteResponse, Status, Tree
from expbuild.workers.base import DEFAULT_PATH
from tests.support.actions import (
    Client,
    Executable,
    Link,
    SideEffects,
    build_action,
    eventually,
    failing_rpc,
    from_message,
    shell,
    to_message,
)
from tests.support.processes import read_stat

INVALID_ARGUMENT, DEADLINE_EXCEEDED, FAILED_PRECONDITION = 3, 4, 9
EMPTY_TREE_SHA256 = "102b51b9765a56a3e899f7cf0ee38e5251f9c503b357b330a49183eb7b155604"
TIMED_OUT = Status(code=DEADLINE_EXCEEDED, message="execution timeout exceeded")


# ---- environment -------------------------------------------------------------------------------------------------


async def test_CMD_09_the_environment_is_exactly_defaults_and_the_commands_own(client: Client) -> None:
    """Nothing of the server's environment leaks; PATH and TMPDIR have defaults."""
    action = build_action(
        ("/usr/bin/env", "-0"), environment={"A": "1", "EMPTY": "", "ÜNI": "wört"}, salt=os.urandom(8)
    )
    output = (await client.stdout((await client.execute(action)).result)).decode()
    variables = dict(line.split("=", 1) for line in output.split("\0") if line)
    tmpdir = variables.pop("TMPDIR")
    assert variables == {"A": "1", "EMPTY": "", "ÜNI": "wört", "PATH": DEFAULT_PATH}
    assert tmpdir.endswith("/tmp")


async def test_the_command_overrides_every_default(client: Client) -> None:
    """PATH and TMPDIR of the Command win over ours."""
    environment = {"PATH": "/bin", "TMPDIR": "/elsewhere"}
    action = build_action(("/usr/bin/env",), environment=environment, salt=os.urandom(8))
    output = await client.stdout((await client.execute(action)).result)
    assert sorted(output.split()) == [b"PATH=/bin", b"TMPDIR=/elsewhere"]


async def test_TMPDIR_is_writable_and_not_part_of_the_input_root(client: Client) -> None:
    """A scratch directory that no output can lie in."""
    script = 'cd "$TMPDIR" && echo x > f && cat f && cd - >/dev/null && ls -A'
    assert await client.stdout((await client.execute(shell(script))).result) == b"x\n"


@pytest.mark.duty("CMD-04")
async def test_CMD_07_the_working_directory_is_below_the_input_root(client: Client) -> None:
    """Paths of the command and of its outputs count from there."""
    action = shell(
        "cat file; echo x > out; echo y > ../beside",
        inputs={"a": {"b": {"file": b"content"}}},
        working_directory="a/b",
        output_paths=["out", "../beside", "../../none"],
    )
    result = (await client.execute(action)).result
    assert await client.stdout(result) == b"content"
    assert [file.path for file in result.output_files] == ["../beside", "out"]


@pytest.mark.parametrize("directory", ["missing", "file", "link", "a/missing"])
async def test_CMD_07_a_working_directory_that_is_none_is_refused(client: Client, directory: str) -> None:
    """It must be a directory of the input tree; none is made for the client."""
    action = shell("pwd", inputs={"a": {}, "file": b"", "link": Link("a")}, working_directory=directory)
    response = (await client.execute(action)).response
    assert response.status.code == INVALID_ARGUMENT
    assert directory in response.status.message


@pytest.mark.parametrize(
    ("arguments", "inputs"),
    [
        pytest.param(("no-such-program",), {}, id="missing-in-PATH"),
        pytest.param(("./tool",), {}, id="missing"),
        pytest.param(("./tool",), {"tool": b"#!/bin/sh\n"}, id="not-executable"),
        pytest.param(("./tool",), {"tool": {}}, id="directory"),
        pytest.param(("./tool",), {"tool": Executable(b"#!/no/such/interpreter\n")}, id="no-interpreter"),
        pytest.param(("./tool",), {"tool": Executable(b"\x7fELF junk")}, id="CMD-10-wrong-format"),
    ],
)
async def test_CMD_10_what_cannot_be_executed_is_the_actions_fault(
    client: Client, arguments: tuple[str, ...], inputs: Mapping[str, object]
) -> None:
    """INVALID_ARGUMENT in the operation, naming the program, and nothing is cached."""
    action = build_action(arguments, inputs=inputs, salt=os.urandom(8))  # type: ignore[arg-type]
    status = (await client.execute(action)).response.status
    assert status.code == INVALID_ARGUMENT
    assert arguments[0] in status.message
    assert await client.cached(action) is None


async def test_CMD_08_programs_are_found_as_execvp_does(client: Client) -> None:
    """With a slash relative to the working directory, without one in the PATH of the command."""
    tool = Executable(b"#!/bin/sh\necho tool\n")
    inputs = {"bin": {"tool": tool}, "w": {"t": tool}}
    for arguments, environment in ((("./t",), {}), (("tool",), {"PATH": "../bin:/bin"}), (("../bin/tool",), {})):
        action = build_action(
            arguments, inputs=inputs, environment=environment, working_directory="w", salt=os.urandom(8)
        )
        assert await client.stdout((await client.execute(action)).result) == b"tool\n"


@pytest.mark.duty("INP-05", "INP-06", "INP-07")
async def test_INP_the_input_root_is_what_was_sent(client: Client) -> None:
    """Files, executables, links, empty directories and equal trees at several places; and nothing else."""
    twin = {"x": b"same"}
    inputs = {
        "one": twin,
        "two": {"deep": twin},
        "empty": {},
        "nothing": b"",
        "run": Executable(b"#!/bin/sh\n"),
        "relative": Link("one/x"),
        "dangling": Link("../no/where"),
        "wörld ☃\n": b"unicode",
    }
    script = "find . -mindepth 1 -printf '%P|%y|%l|%s\\0'; test -x run && ! test -x one/x"
    result = (await client.execute(shell(script, inputs=inputs))).result
    assert result.exit_code == 0
    found = {
        name: (kind, target, size if kind == "f" else "")
        for name, kind, target, size in (
            line.split("|") for line in (await client.stdout(result)).decode().split("\0") if line
        )
    }
    assert found == {
        "one": ("d", "", ""),
        "one/x": ("f", "", "4"),
        "two": ("d", "", ""),
        "two/deep": ("d", "", ""),
        "two/deep/x": ("f", "", "4"),
        "empty": ("d", "", ""),
        "nothing": ("f", "", "0"),
        "run": ("f", "", "10"),
        "relative": ("l", "one/x", ""),
        "dangling": ("l", "../no/where", ""),
        "wörld ☃\n": ("f", "", "7"),
    }


async def test_INP_10_inputs_cannot_be_poisoned(client: Client) -> None:
    """Whatever an action does to its inputs, the blobs stay what they are; the next action sees them unchanged."""
    inputs = {"data": b"original", "tool": Executable(b"#!/bin/sh\necho original\n"), "empty": b""}
    attack = "for f in data tool empty; do chmod 777 $f; echo poison >> $f; echo poison > $f; touch $f; done; true"
    attacked = shell(attack, inputs=inputs)
    assert (await client.execute(attacked)).result.exit_code == 0
    for digest, data in attacked.blobs.items():
        if data:
            assert await client.read(to_message(digest)) == data
    result = (await client.execute(shell("cat data; ./tool; cat empty; stat -c %a data tool", inputs=inputs))).result
    assert await client.stdout(result) == b"originaloriginal\n444\n555\n"


async def test_RUN_04_stdin_is_empty(client: Client) -> None:
    """An action that reads finds the end at once."""
    assert await client.stdout((await client.execute(shell("cat; echo end"))).result) == b"end\n"


# ---- streams and exit codes --------------------------------------------------------------------------------------


async def test_RUN_01_streams_are_byte_exact_whatever_their_size(client: Client) -> None:
    """Megabytes on both, with every byte there is."""
    script = "head -c 5000000 /dev/zero | tr '\\0' a; head -c 3000000 /dev/zero >&2"
    result = (await client.execute(shell(script))).result
    assert (result.stdout_digest.size_bytes, result.stderr_digest.size_bytes) == (5_000_000, 3_000_000)
    assert result.stdout_digest.hash == hashlib.sha256(b"a" * 5_000_000).hexdigest()
    assert result.stderr_digest.hash == hashlib.sha256(bytes(3_000_000)).hexdigest()
    assert await client.stdout(result) == b"a" * 5_000_000


async def test_RUN_02_empty_streams_have_their_digest_set(client: Client) -> None:
    """Some clients take an unset digest for a missing stream."""
    result = (await client.execute(shell("true"))).result
    empty = hashlib.sha256().hexdigest()
    assert (result.stdout_digest.hash, result.stderr_digest.hash) == (empty, empty)


async def test_RUN_03_killed_by_a_signal_is_128_plus_its_number(client: Client) -> None:
    """As shells have it, with a sentence for people."""
    response = (await client.execute(shell("kill -SEGV $$"))).response
    assert response.result.exit_code == 139
    assert "SIGSEGV" in response.message


@pytest.mark.duty("EXE-41", "RUN-08")
async def test_EXE_40_metadata_is_complete_and_monotone(client: Client) -> None:
    """All timestamps are there, in order, with the worker and the duration of the run."""
    metadata = (await client.execute(shell("true"))).result.execution_metadata
    assert metadata.worker in ("host-0", "host-1")
    times = [
        metadata.queued_timestamp,
        metadata.worker_start_timestamp,
        metadata.input_fetch_start_timestamp,
        metadata.input_fetch_completed_timestamp,
        metadata.execution_start_timestamp,
        metadata.execution_completed_timestamp,
        metadata.output_upload_start_timestamp,
        metadata.output_upload_completed_timestamp,
        metadata.worker_completed_timestamp,
    ]
    assert all(time.seconds for time in times)
    assert all(a.ToNanoseconds() <= b.ToNanoseconds() for a, b in itertools.pairwise(times))
    run_ns = metadata.execution_completed_timestamp.ToNanoseconds() - metadata.execution_start_timestamp.ToNanoseconds()
    assert metadata.virtual_execution_duration.ToNanoseconds() == run_ns


# ---- timeouts and survivors --------------------------------------------------------------------------------------


@pytest.mark.duty("RUN-05", "EXE-22")
async def test_EXE_21_a_timeout_returns_what_there_is(client: Client, effects: SideEffects) -> None:
    """The exact status, the output so far, nothing cached, and the whole process tree dead."""
    pids = effects.path("pids")
    script = f"""
    echo out; echo err >&2; echo x > f
    setsid sh -c 'echo $$ >> {pids}; exec sleep 1000' &
    (trap '' TERM; sleep 1001 & echo $! >> {pids}; wait) &
    echo $$ >> {pids}; {effects.mark("ran")}; wait
    """
    action = shell(script, timeout_s=0.5, output_paths=["f"])
    response = (await client.execute(action)).response
    assert response.status == TIMED_OUT
    assert await client.stdout(response.result) == b"out\n"
    assert await client.stderr(response.result) == b"err\n"
    assert [file.path for file in response.result.output_files] == ["f"]
    assert response.result.execution_metadata.worker
    assert await client.cached(action) is None
    alive = [pid for pid in map(int, pids.read_text().split()) if (stat := read_stat(pid)) and stat.is_alive()]
    assert len(pids.read_text().split()) == 3
    assert alive == []
    await client.execute(action)
    assert effects.count("ran") == 2


@pytest.mark.parametrize("timeout_s", [86_401.0, -1.0, 1e11, -0.001])
async def test_EXE_23_impossible_timeouts_are_refused(client: Client, timeout_s: float) -> None:
    """More than the server allows, or less than nothing."""
    async with failing_rpc() as status:
        await client.execute(shell("true", timeout_s=timeout_s))
    assert status.code == INVALID_ARGUMENT
    assert "Action.timeout" in status.message


async def test_EXE_23_a_timeout_of_zero_is_none(client: Client) -> None:
    """Explicit 0 means the server's default, not death at birth."""
    assert (await client.execute(shell("true", timeout_s=0.0))).result.exit_code == 0


async def test_RUN_04_daemons_are_dead_when_the_result_arrives(client: Client, effects: SideEffects) -> None:
    """A child that left session and process group, and holds stdout open, neither survives nor delays."""
    pid_file = effects.path("pid")
    script = f"""
    (setsid sh -c 'trap "" TERM HUP; echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; sleep 1000' &)
    while [ ! -s {pid_file} ]; do :; done
    """
    assert (await client.execute(shell(script))).result.exit_code == 0
    stat = read_stat(int(pid_file.read_text()))
    assert stat is None or not stat.is_alive()


async def test_INP_16_nothing_is_left_in_the_work_directories(client: Client, server_root: Path) -> None:
    """Workspaces go away, whatever an action made of them."""
    script = "mkdir -p a/b/c && echo x > a/b/f && ln -s / root && chmod 0 a/b/c a/b a"
    assert (await client.execute(shell(script))).result.exit_code == 0
    work_dirs = sorted((server_root / "state/work").glob("host-[01]"))
    assert len(work_dirs) == 2
    await eventually(lambda: not any(any(path.iterdir()) for path in work_dirs), "work directories are empty")


# ---- outputs -----------------------------------------------------------------------------------------------------

MAKE_ALL = """
mkdir -p dir/sub empty && echo f > file && printf '#!/bin/sh' > tool && chmod +x tool && echo i > dir/inner &&
echo s > dir/sub/s && ln -s file to-file && ln -s dir to-dir && ln -s nowhere dangling && ln -s /etc/passwd absolute"""
EVERYTHING = ["file", "tool", "dir", "empty", "to-file", "to-dir", "dangling", "absolute", "absent"]


def _links(result: ActionResult, field: str) -> dict[str, str]:
    return {link.path: link.target for link in getattr(result, field)}


@pytest.mark.duty("CAP-09", "OUT-01")
async def test_OUT_03_OUT_06_every_kind_in_output_paths(client: Client) -> None:
    """By what each is, links unfollowed, in the new list and in the old ones; what is absent is left out."""
    result = (await client.execute(shell(MAKE_ALL, output_paths=EVERYTHING))).result
    assert {file.path: file.is_executable for file in result.output_files} == {"file": False, "tool": True}
    assert [directory.path for directory in result.output_directories] == ["dir", "empty"]
    to_directory = {"to-dir": "dir"}
    others = {"to-file": "file", "dangling": "nowhere", "absolute": "/etc/passwd"}
    assert _links(result, "output_symlinks") == {**to_directory, **others}
    assert _links(result, "output_directory_symlinks") == to_directory
    assert _links(result, "output_file_symlinks") == others


async def test_OUT_04_OUT_05_the_old_lists(client: Client) -> None:
    """Files and directories each in their own list; links in the field of their list, `output_symlinks` empty."""
    result = (
        await client.execute(
            shell(
                MAKE_ALL,
                output_files=["file", "tool", "to-file", "dangling", "absent"],
                output_directories=["dir", "empty", "to-dir"],
            )
        )
    ).result
    assert [file.path for file in result.output_files] == ["file", "tool"]
    assert [directory.path for directory in result.output_directories] == ["dir", "empty"]
    assert not result.output_symlinks
    assert _links(result, "output_file_symlinks") == {"to-file": "file", "dangling": "nowhere"}
    assert _links(result, "output_directory_symlinks") == {"to-dir": "dir"}


async def test_CMD_02_the_new_list_replaces_the_old_ones(client: Client) -> None:
    """Clients that fill all three mean the new one."""
    result = (
        await client.execute(
            shell("echo 1 > new; echo 2 > old", output_paths=["new"], output_files=["old"], output_directories=["x"])
        )
    ).result
    assert [file.path for file in result.output_files] == ["new"]


@pytest.mark.duty("CMD-06")
async def test_the_same_path_in_both_old_lists_is_whatever_it_is(client: Client) -> None:
    """Clients that do not know what an output will be name it twice."""
    both = ["f", "d"]
    result = (await client.execute(shell("echo > f; mkdir d", output_files=both, output_directories=both))).result
    assert [file.path for file in result.output_files] == ["f"]
    assert [directory.path for directory in result.output_directories] == ["d"]


@pytest.mark.parametrize(
    ("script", "outputs"),
    [
        pytest.param("mkdir x", {"output_files": ["x"]}, id="OUT-04-directory-for-file"),
        pytest.param("ln -s . x", {"output_files": ["x"]}, id="OUT-04-link-to-directory-for-file"),
        pytest.param("echo > x", {"output_directories": ["x"]}, id="OUT-05-file-for-directory"),
        pytest.param("echo > f; ln -s f x", {"output_directories": ["x"]}, id="OUT-05-link-to-file-for-directory"),
        pytest.param("rmdir d; ln -s /etc d", {"output_paths": ["d/passwd"]}, id="OUT-15-parent-leads-out"),
        pytest.param("mkdir d/x; touch $(printf 'd/x/\\377')", {"output_paths": ["d"]}, id="OUT-20-not-utf-8"),
    ],
)
async def test_outputs_that_cannot_be_returned_are_told_in_the_operation(
    client: Client, script: str, outputs: dict[str, list[str]]
) -> None:
    """FAILED_PRECONDITION without a MISSING, the streams kept, nothing cached."""
    action = shell(f"echo said; {script}", inputs={"d": {}}, **outputs)
    response = (await client.execute(action)).response
    assert response.status.code == FAILED_PRECONDITION
    assert not response.status.details
    assert await client.stdout(response.result) == b"said\n"
    assert await client.cached(action) is None


async def test_OUT_08_a_fifo_is_no_output(client: Client) -> None:
    """At an output INVALID_ARGUMENT, in an output directory as if it were not there."""
    assert (await client.execute(shell("mkfifo x", output_paths=["x"]))).response.status.code == INVALID_ARGUMENT
    result = (await client.execute(shell("mkdir d; mkfifo d/x", output_paths=["d"]))).result
    assert result.output_directories[0].tree_digest.hash == EMPTY_TREE_SHA256


async def test_OUT_12_OUT_22_an_empty_working_directory_is_an_output(client: Client) -> None:
    """The path "" is the working directory itself; a Tree without anything is two bytes."""
    for path in ("", "."):
        result = (await client.execute(shell("true", output_paths=[path]))).result
        (directory,) = result.output_directories
        assert (directory.path, directory.tree_digest.hash) == (path, EMPTY_TREE_SHA256)
        assert not result.output_files


async def test_OUT_11_directories_are_blobs_too_when_asked_for(client: Client) -> None:
    """The root's digest is named, and with it the whole tree can be fetched directory by directory."""
    action = shell(
        MAKE_ALL, output_paths=["dir"], output_directory_format=Command.OutputDirectoryFormat.TREE_AND_DIRECTORY
    )
    (output,) = (await client.execute(action)).result.output_directories
    tree = Tree.FromString(await client.read(output.tree_digest))
    assert output.is_topologically_sorted
    assert await client.read(output.root_directory_digest) == tree.root.SerializeToString(deterministic=True)
    assert [node.name for node in tree.root.directories] == ["sub"]
    assert await client.read(tree.root.directories[0].digest) == tree.children[0].SerializeToString(deterministic=True)


async def test_OUT_14_OUT_16_overlapping_outputs_of_a_failing_action(client: Client) -> None:
    """Outputs of failed actions come back too (test logs!), also where one lies in the other."""
    result = (await client.execute(shell(f"{MAKE_ALL}; exit 7", output_paths=["dir", "dir/sub/s", "dir/sub"]))).result
    assert result.exit_code == 7
    assert [file.path for file in result.output_files] == ["dir/sub/s"]
    assert [directory.path for directory in result.output_directories] == ["dir", "dir/sub"]


@pytest.mark.parametrize("name", ["ünï ☃", "a b", "new\nline", "-rf", "quote'\"", "x" * 255, "ﬁ\u0301"])
async def test_OUT_02_unusual_names_come_back_as_they_were_sent(client: Client, name: str) -> None:
    """Paths are bytes to us: nothing is normalised, quoted or cut."""
    result = (await client.execute(shell(f"echo x > {shlex.quote('./' + name)}", output_paths=[name]))).result
    assert [file.path for file in result.output_files] == [name]


async def test_INP_11_parents_of_outputs_exist_and_the_outputs_do_not(client: Client) -> None:
    """Parents are made for every list, output directories themselves are not."""
    for field in ("output_paths", "output_directories"):
        result = (await client.execute(shell("find . -mindepth 1", **{field: ["a/b/c"]}))).result
        assert sorted((await client.stdout(result)).split()) == [b"./a", b"./a/b"]


async def test_INP_12_an_output_below_an_input_file_is_refused(client: Client) -> None:
    """There can be no directory where a file is."""
    response = (await client.execute(shell("true", inputs={"f": b""}, output_paths=["f/x"]))).response
    assert response == ExecuteResponse(status=response.status)
    assert response.status.code == INVALID_ARGUMENT


async def test_INP_13_an_input_at_an_output_is_collected(client: Client) -> None:
    """It is left in place, and returned if it is still there."""
    result = (
        await client.execute(shell("rm gone", inputs={"kept": b"k", "gone": b"g"}, output_paths=["kept", "gone"]))
    ).result
    assert [file.path for file in result.output_files] == ["kept"]
    assert await client.read(result.output_files[0].digest) == b"k"


async def test_bazel_gets_a_directory_where_it_declared_a_file(client: Client) -> None:
    """As its genrules may do locally; other clients get the error the protocol asks for."""
    action = shell("mkdir x", output_files=["x"])
    await client.upload(action.blobs)
    result = (await client.call(action, tool="bazel").finish()).result
    assert [directory.path for directory in result.output_directories] == ["x"]
    assert await client.find_missing([from_message(result.output_directories[0].tree_digest)]) == []
