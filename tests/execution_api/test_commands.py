"""Actions and commands that are refused, and what those that are not mean (conformance CMD-*)."""

from __future__ import annotations

import os
from typing import Any

import grpc
import pytest

from expbuild.digest import DigestFunction
from expbuild.reapi import Action, Command, DigestMessage, Directory, FileNode, Platform
from tests.support.actions import (
    Blobs,
    BuiltAction,
    Client,
    SideEffects,
    build_action,
    failing_rpc,
    put,
    put_tree,
    shell,
)

INVALID_ARGUMENT, FAILED_PRECONDITION = 3, 9

Words = dict[str, Any]


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        pytest.param((), {}, id="CMD-01-no-arguments"),
        pytest.param(("",), {}, id="CMD-01-empty-program"),
        pytest.param(("true",), {"output_paths": ["/absolute"]}, id="CMD-03-absolute"),
        pytest.param(("true",), {"output_paths": ["d/"]}, id="CMD-03-trailing-slash"),
        pytest.param(("true",), {"output_files": ["/absolute"]}, id="CMD-03-absolute-file"),
        pytest.param(("true",), {"output_directories": ["a//b"]}, id="CMD-03-empty-segment"),
        pytest.param(("true",), {"output_paths": ["../outside"]}, id="CMD-04-outside"),
        pytest.param(("true",), {"output_paths": ["a/../../outside"]}, id="CMD-04-outside-by-a-detour"),
        pytest.param(("true",), {"working_directory": "a", "output_paths": ["../../x"]}, id="CMD-04-outside-of-a"),
        pytest.param(("true",), {"output_files": ["a", "a/b"]}, id="CMD-06-file-in-a-file"),
        pytest.param(("true",), {"output_files": ["a"], "output_directories": ["a/b"]}, id="CMD-06-directory-in-it"),
        pytest.param(("true",), {"working_directory": "/"}, id="CMD-07-absolute"),
        pytest.param(("true",), {"working_directory": "../x"}, id="CMD-07-outside"),
        pytest.param(("true",), {"output_node_properties": ["mtime"]}, id="CMD-11-node-property"),
    ],
)
async def test_a_command_that_cannot_be_meant_is_refused(
    client: Client, arguments: tuple[str, ...], fields: Words
) -> None:
    """INVALID_ARGUMENT for the call, before there is an operation, and no invitation to upload anything."""
    action = build_action(arguments, inputs={"a": {}}, salt=os.urandom(8), **fields)
    async with failing_rpc() as status:
        await client.execute(action)
    assert status.code == INVALID_ARGUMENT
    assert not status.details


async def test_CMD_04_CMD_05_odd_paths_and_orders_are_accepted(client: Client) -> None:
    """Dots are resolved and come back as written; unsorted and repeated outputs and variables are no fault."""
    action = build_action(
        ("/bin/sh", "-c", 'echo "$B" > z; echo > ../y'),
        inputs={"w": {}},
        working_directory="w",
        output_paths=["./z", "../y", "./z", "../w/./z"],
        salt=os.urandom(8),
    )
    blobs = dict(action.blobs)
    command = Command(
        arguments=["/bin/sh", "-c", 'echo "$B" > z; echo > ../y'],
        working_directory="w",
        output_paths=["./z", "../y", "./z", "../w/./z"],
    )
    for name, value in (("B", "first"), ("A", "1"), ("B", "last")):
        command.environment_variables.add(name=name, value=value)
    parsed = Action.FromString(action.blobs[DigestFunction.SHA256.digest_of(_bytes_of(action))])
    parsed.command_digest.CopyFrom(put(blobs, command))
    result = (await client.execute(BuiltAction(put(blobs, parsed), blobs))).result
    assert sorted(file.path for file in result.output_files) == ["../w/./z", "../y", "./z"]
    (file,) = [file for file in result.output_files if file.path == "./z"]
    assert await client.read(file.digest) == b"last\n"


def _bytes_of(action: BuiltAction) -> bytes:
    (data,) = [data for digest, data in action.blobs.items() if digest.hash == action.digest.hash]
    return data


@pytest.mark.parametrize(("wanted", "has_root"), [(0, False), (1, True), (2, True), (77, False)])
async def test_CMD_12_OUT_11_a_tree_is_always_there_and_directories_when_asked_for(
    client: Client, wanted: int, has_root: bool
) -> None:
    """An unknown format is as if unset."""
    action = shell("mkdir d; echo > d/f", output_paths=["d"], output_directory_format=wanted)
    (directory,) = (await client.execute(action)).result.output_directories
    assert directory.HasField("tree_digest")
    assert directory.HasField("root_directory_digest") == has_root
    assert await client.read(directory.tree_digest)


@pytest.mark.duty("CAP-09")
async def test_CMD_13_the_platform_of_the_action_counts_where_it_is_set(client: Client) -> None:
    """Also an empty one; only without it does the Command's, where older clients put it."""
    impossible, empty = Platform(), Platform()
    impossible.properties.add(name="OSFamily", value="plan9")
    for of_action, of_command, runs in (
        (None, None, True),
        (None, impossible, False),
        (impossible, None, False),
        (empty, impossible, True),
        (impossible, empty, False),
    ):
        blobs: Blobs = {}
        command = Command(arguments=["true"], platform=of_command)
        action = Action(
            command_digest=put(blobs, command),
            input_root_digest=put_tree(blobs, {}),
            platform=of_action,
            salt=os.urandom(8),
        )
        built = BuiltAction(put(blobs, action), blobs)
        if runs:
            assert (await client.execute(built)).result.exit_code == 0
        else:
            async with failing_rpc() as status:
                await client.execute(built)
            assert status.code == FAILED_PRECONDITION


async def test_CMD_16_a_property_named_twice_must_hold_twice(client: Client) -> None:
    """A processor that is of this kind and of that one too: there is none."""
    for values, runs in ((("linux", "Linux"), True), (("linux", "windows"), False), (("windows", "linux"), False)):
        blobs: Blobs = {}
        action = Action(
            command_digest=put(blobs, Command(arguments=["true"])),
            input_root_digest=put_tree(blobs, {}),
            salt=os.urandom(8),
        )
        for value in values:
            action.platform.properties.add(name="OSFamily", value=value)
        built = BuiltAction(put(blobs, action), blobs)
        if runs:
            assert (await client.execute(built)).result.exit_code == 0
        else:
            async with failing_rpc() as status:
                await client.execute(built)
            assert status.code == FAILED_PRECONDITION
            assert "OSFamily=windows" in status.message


async def test_CMD_17_values_are_compared_exactly(client: Client) -> None:
    """Where spelling is not tolerated on purpose, nearly the same is not the same."""
    for platform in ({"OSFamily": "linux2"}, {"OSFamily": " linux"}, {"Arch": "x86"}):
        async with failing_rpc() as status:
            await client.execute(shell("true", platform=platform))
        assert status.code == FAILED_PRECONDITION


@pytest.mark.parametrize("place", ["command", "root", "file"])
async def test_CMD_20_digests_of_another_function_in_an_action_are_refused(client: Client, place: str) -> None:
    """The request says SHA256 by its digest's length; one inside is as long as SHA512's."""
    blobs: Blobs = {}
    other = DigestFunction.SHA512.digest_of(b"x")
    foreign = DigestMessage(hash=other.hash, size_bytes=other.size_bytes)
    command, root = put(blobs, Command(arguments=["true"])), put_tree(blobs, {})
    if place == "file":
        root = put(blobs, Directory(files=[FileNode(name="f", digest=foreign)]))
    action = Action(
        command_digest=foreign if place == "command" else command,
        input_root_digest=foreign if place == "root" else root,
        salt=os.urandom(8),
    )
    assert await _code_of_execution(client, BuiltAction(put(blobs, action), blobs)) == INVALID_ARGUMENT


async def _code_of_execution(client: Client, action: BuiltAction) -> int:
    try:
        return (await client.execute(action)).response.status.code
    except grpc.aio.AioRpcError as error:
        code: int = error.code().value[0]
        return code


async def test_EXE_32_the_salt_makes_actions_different(client: Client, effects: SideEffects) -> None:
    """The same command with two salts runs twice, with one of them again not at all."""
    script = effects.mark("ran")
    for salt in (b"one", b"two", b"one"):
        assert (await client.execute(shell(script, salt=salt))).result.exit_code == 0
    assert effects.count("ran") == 2


async def test_DIG_16_an_action_is_known_by_the_bytes_it_was_sent_as(client: Client, effects: SideEffects) -> None:
    """Fields we do not know, and in another order: run, cached and served under exactly that digest."""
    blobs: Blobs = {}
    command = Command(arguments=["/bin/sh", "-c", effects.mark("ran")])
    # Field 1000 last and first: no encoder of ours writes either.
    unknown = b"\xc2\x3e\x03abc"
    root, salt = put_tree(blobs, {}), os.urandom(8)
    action = Action(command_digest=put(blobs, unknown + command.SerializeToString()), input_root_digest=root, salt=salt)
    digest = put(blobs, unknown + action.SerializeToString() + unknown)
    built = BuiltAction(digest, blobs)
    first, second = await client.execute(built), await client.execute(built)
    assert (first.response.cached_result, second.response.cached_result) == (False, True)
    assert effects.count("ran") == 1
    assert await client.read(digest) == _bytes_of(built)
