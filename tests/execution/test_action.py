"""Actions and commands: everything a client can write into them, checked before anything is queued."""

from __future__ import annotations

import time
from typing import Any

import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import InvalidArgument, MissingBlobs
from expbuild.execution.action import (
    MAX_DEPTH,
    MAX_OUTPUTS,
    ActionSpec,
    OutputKind,
    TimeoutPolicy,
    check_command,
    load_action,
)
from expbuild.reapi import Action, Command, DigestMessage, Platform
from expbuild.storage.base import write_blob
from expbuild.storage.memory import MemoryBlobStore
from tests.support.actions import Blobs, from_message, put

POLICY = TimeoutPolicy(default_s=60, max_s=3600)
FILE, DIRECTORY, ANY = OutputKind.FILE, OutputKind.DIRECTORY, OutputKind.ANY


def command(**fields: Any) -> Command:
    return Command(arguments=["true"], **fields)


async def load(action: Action, blobs: Blobs) -> ActionSpec:
    """Store blobs and an action, then load it."""
    store = MemoryBlobStore()
    digest = from_message(put(blobs, action))
    for key, data in blobs.items():
        await write_blob(store, key, data)
    return await load_action(store, digest, POLICY)


async def spec_of(command: Command, **fields: Any) -> ActionSpec:
    blobs: Blobs = {}
    return await load(Action(command_digest=put(blobs, command), input_root_digest=put(blobs, b""), **fields), blobs)


# ---- outputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, [], id="none"),
        pytest.param({"output_paths": ["a/b"]}, [("a/b", "a/b", ANY)], id="new-list"),
        pytest.param(
            {"output_files": ["f"], "output_directories": ["d"]}, [("f", "f", FILE), ("d", "d", DIRECTORY)], id="old"
        ),
        pytest.param(
            {"output_paths": ["new"], "output_files": ["old"], "output_directories": ["/bad"]},
            [("new", "new", ANY)],
            id="CMD-02-new-list-replaces-old",
        ),
        pytest.param({"output_files": ["x"], "output_directories": ["x"]}, [("x", "x", ANY)], id="both-old-lists"),
        pytest.param({"output_paths": ["b", "a", "b"]}, [("b", "b", ANY), ("a", "a", ANY)], id="CMD-05-duplicates"),
        pytest.param({"output_paths": [""]}, [("", "", ANY)], id="CMD-03-working-directory"),
        pytest.param({"output_directories": ["."]}, [(".", "", DIRECTORY)], id="dot"),
        pytest.param({"output_paths": ["./a/./b"]}, [("./a/./b", "a/b", ANY)], id="CMD-04-dots"),
        pytest.param({"output_paths": ["a/../b"]}, [("a/../b", "b", ANY)], id="CMD-04-parents"),
        pytest.param(
            {"working_directory": "w/x", "output_paths": ["../o", "p"]},
            [("../o", "w/o", ANY), ("p", "w/x/p", ANY)],
            id="relative-to-working-directory",
        ),
        pytest.param(
            {"working_directory": "w", "output_directories": [".."]}, [("..", "", DIRECTORY)], id="whole-root"
        ),
        pytest.param(
            {"output_directories": ["d", "d/e"], "output_files": ["d/f"]},
            [("d/f", "d/f", FILE), ("d", "d", DIRECTORY), ("d/e", "d/e", DIRECTORY)],
            id="CMD-06-nested-directories",
        ),
        pytest.param({"output_paths": ["x" * 255]}, [("x" * 255, "x" * 255, ANY)], id="longest-name"),
        pytest.param(
            {"output_paths": ["a/" * (MAX_DEPTH - 1) + "b"]},
            [("a/" * (MAX_DEPTH - 1) + "b", "a/" * (MAX_DEPTH - 1) + "b", ANY)],
            id="deepest",
        ),
    ],
)
def test_outputs(fields: dict[str, Any], expected: list[tuple[str, str, OutputKind]]) -> None:
    """Every form clients use: the path as it was sent, where that is, and what may be there."""
    outputs = check_command(command(**fields)).outputs
    assert [(output.path, "/".join(output.location), output.kind) for output in outputs] == expected


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"output_paths": ["/etc/passwd"]}, id="CMD-03-absolute"),
        pytest.param({"output_paths": ["a/"]}, id="CMD-03-trailing-slash"),
        pytest.param({"output_paths": ["a//b"]}, id="CMD-03-empty-segment"),
        pytest.param({"output_paths": ["/"]}, id="root"),
        pytest.param({"output_paths": [".."]}, id="CMD-04-above-the-root"),
        pytest.param({"output_paths": ["a/../../b"]}, id="CMD-04-out-and-in-again"),
        pytest.param({"output_paths": ["w/../../w/x"], "working_directory": ""}, id="CMD-04-escape"),
        pytest.param(
            {"output_paths": ["../../x"], "working_directory": "w"}, id="CMD-04-escape-from-working-directory"
        ),
        pytest.param({"output_paths": ["a\0b"]}, id="NUL"),
        pytest.param({"output_paths": ["x" * 256]}, id="name-too-long"),
        pytest.param({"output_paths": ["é" * 128]}, id="name-too-long-in-bytes"),
        pytest.param({"output_paths": ["a/" * MAX_DEPTH + "b"]}, id="too-deep"),
        pytest.param({"output_paths": ["a/" * 4_000_000 + "b"]}, id="absurdly-deep"),
        pytest.param({"output_paths": [f"{i}" for i in range(MAX_OUTPUTS + 1)]}, id="too-many"),
        pytest.param({"output_files": ["a", "a/b"]}, id="CMD-06-file-below-a-file"),
        pytest.param({"output_files": ["a"], "output_directories": ["a/b"]}, id="CMD-06-directory-below-a-file"),
        pytest.param({"output_files": ["./a", "b/../a/c"]}, id="CMD-06-by-other-names"),
        pytest.param({"output_files": [""]}, id="working-directory-as-a-file"),
        pytest.param({"output_files": ["."]}, id="dot-as-a-file"),
        pytest.param({"output_files": [".."], "working_directory": "w/x"}, id="parent-of-it-as-a-file"),
        pytest.param({"output_files": ["../../w"], "working_directory": "w/x"}, id="parent-by-name-as-a-file"),
        pytest.param({"working_directory": "/abs"}, id="CMD-07-absolute"),
        pytest.param({"working_directory": "../x"}, id="CMD-07-escape"),
        pytest.param({"working_directory": "a/"}, id="CMD-07-trailing-slash"),
        pytest.param({"working_directory": "a\0"}, id="CMD-07-NUL"),
        pytest.param({"environment_variables": [Command.EnvironmentVariable(name="", value="x")]}, id="env-empty"),
        pytest.param({"environment_variables": [Command.EnvironmentVariable(name="A=B")]}, id="env-equals"),
        pytest.param({"environment_variables": [Command.EnvironmentVariable(name="A\0")]}, id="env-NUL-in-name"),
        pytest.param(
            {"environment_variables": [Command.EnvironmentVariable(name="A", value="\0")]}, id="env-NUL-in-value"
        ),
        pytest.param({"output_node_properties": ["mtime"]}, id="CMD-11-node-properties"),
        pytest.param({"output_paths": ["/" + "x" * 10_000_000]}, id="huge"),
    ],
)
def test_commands_that_cannot_be_run_are_refused(fields: dict[str, Any]) -> None:
    """INVALID_ARGUMENT at once, with a sentence short enough for a header."""
    message = command(**fields)
    started = time.monotonic()
    with pytest.raises(InvalidArgument) as caught:
        check_command(message)
    assert time.monotonic() - started < 5  # generous: some of these took for ever
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("arguments", [[], [""], ["a\0b"], ["true", "\0"]])
def test_arguments_that_cannot_be_run_are_refused(arguments: list[str]) -> None:
    """CMD-01, and what no exec can take."""
    with pytest.raises(InvalidArgument):
        check_command(Command(arguments=arguments))


def test_empty_arguments_after_the_first_are_fine() -> None:
    """They mean something."""
    assert check_command(Command(arguments=["echo", ""])).arguments == ("echo", "")


def test_CMD_05_the_last_of_equal_variables_wins() -> None:
    """Names with unusual characters are passed on as they are."""
    variables = [("A", "1"), ("B.b-%", "x=y"), ("A", "2")]
    message = command(environment_variables=[Command.EnvironmentVariable(name=n, value=v) for n, v in variables])
    assert check_command(message).environment == {"A": "2", "B.b-%": "x=y"}


@pytest.mark.parametrize(
    ("number", "wanted"), [(0, False), (1, True), (2, True), (99, False)], ids=["tree", "directory", "both", "unknown"]
)
def test_CMD_12_output_directory_format(number: int, wanted: bool) -> None:
    """Unknown values mean TREE_ONLY."""
    assert check_command(command(output_directory_format=number)).wants_directories is wanted


# ---- actions -----------------------------------------------------------------------------------------------------


async def test_action_with_nothing_but_what_it_needs() -> None:
    """Defaults: the server's timeout, cacheable, no platform, the empty input root."""
    spec = await spec_of(command())
    assert (spec.timeout_s, spec.do_not_cache, spec.platform) == (60, False, ())
    assert spec.input_root.is_empty


@pytest.mark.parametrize(
    ("seconds", "nanos", "expected"),
    [(0, 0, 60.0), (1, 500_000_000, 1.5), (3600, 0, 3600.0), (0, 1, 1e-9)],
    ids=["zero-is-unset", "fraction", "longest", "shortest"],
)
async def test_EXE_23_timeouts(seconds: int, nanos: int, expected: float) -> None:
    """Up to what the server allows."""
    action = Action()
    action.timeout.seconds, action.timeout.nanos = seconds, nanos
    assert (await spec_of(command(), timeout=action.timeout)).timeout_s == expected


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [(-1, 0), (0, -1), (3600, 1), (10**11, 0), (2**63 - 1, 0), (-(2**63), 0), (1, 2_000_000_000), (5, -(2**31))],
)
async def test_EXE_23_impossible_timeouts(seconds: int, nanos: int) -> None:
    """Negative, above the maximum, or no duration at all."""
    action = Action()
    action.timeout.seconds, action.timeout.nanos = seconds, nanos
    with pytest.raises(InvalidArgument, match=r"Action\.timeout"):
        await spec_of(command(), timeout=action.timeout)


@pytest.mark.parametrize(
    ("of_action", "of_command", "expected"),
    [
        (None, None, ()),
        (None, ["c"], (("c", "1"),)),
        (["a"], None, (("a", "1"),)),
        (["a"], ["c"], (("a", "1"),)),
        ([], ["c"], ()),
        (["b", "a", "b"], None, (("b", "1"), ("a", "1"), ("b", "1"))),
    ],
    ids=["none", "command", "action", "action-wins", "empty-in-action", "repeated-and-unsorted"],
)
async def test_CMD_13_platform(of_action: list[str] | None, of_command: list[str] | None, expected: object) -> None:
    """The action's where it is set, even to nothing; else the command's."""

    def platform(names: list[str] | None) -> Platform | None:
        if names is None:
            return None
        return Platform(properties=[Platform.Property(name=name, value="1") for name in names])

    spec = await spec_of(command(platform=platform(of_command)), platform=platform(of_action))
    assert spec.platform == expected


async def test_EXE_03_missing_action_and_command() -> None:
    """Each by its own digest."""
    store = MemoryBlobStore()
    blobs: Blobs = {}
    action = Action(command_digest=put({}, command()), input_root_digest=put(blobs, b""))
    digest = from_message(put(blobs, action))
    with pytest.raises(MissingBlobs) as caught:
        await load_action(store, digest, POLICY)
    assert caught.value.digests == (digest,)
    await write_blob(store, digest, blobs[digest])
    with pytest.raises(MissingBlobs) as caught:
        await load_action(store, digest, POLICY)
    assert caught.value.digests == (from_message(action.command_digest),)


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(Action(), id="T10-empty"),
        pytest.param(Action(command_digest=put({}, command())), id="no-input-root"),
        pytest.param(Action(input_root_digest=put({}, b"")), id="no-command"),
        pytest.param(Action(command_digest=DigestMessage(), input_root_digest=put({}, b"")), id="empty-digest"),
        pytest.param(
            Action(command_digest=put({}, command()), input_root_digest=DigestMessage(hash="00", size_bytes=1)),
            id="CMD-20-digest-of-another-function",
        ),
        pytest.param(
            Action(command_digest=put({}, b""), input_root_digest=put({}, b"")), id="T10-empty-bytes-as-a-command"
        ),
    ],
)
async def test_EXE_07_incomplete_actions(action: Action) -> None:
    """An unset digest is never the empty blob."""
    blobs: Blobs = {}
    put(blobs, command())
    with pytest.raises(InvalidArgument):
        await load(action, blobs)


@pytest.mark.parametrize("what", ["action", "command"])
async def test_EXE_07_garbage(what: str) -> None:
    """INVALID_ARGUMENT that says which blob is not what it should be."""
    store = MemoryBlobStore()
    blobs: Blobs = {}
    garbage = put(blobs, b"\xff\xff\xff\xff")
    action = put(blobs, Action(command_digest=garbage, input_root_digest=put(blobs, b"")))
    for key, data in blobs.items():
        await write_blob(store, key, data)
    with pytest.raises(InvalidArgument, match=what.capitalize()):
        await load_action(store, from_message(garbage if what == "action" else action), POLICY)


async def test_a_message_too_large_to_look_into_is_refused_by_its_digest() -> None:
    """Nothing is read."""
    with pytest.raises(InvalidArgument, match="larger than"):
        await load_action(MemoryBlobStore(), Digest("a" * 64, (16 << 20) + 1, DigestFunction.SHA256), POLICY)


async def test_a_large_command_is_fine() -> None:
    """Hundreds of kilobytes of arguments, taken apart beside the event loop."""
    spec = await spec_of(Command(arguments=["true"] + ["x" * 100] * 3000))
    assert len(spec.command.arguments) == 3001
