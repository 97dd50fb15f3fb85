"""From the stored Action and Command to a checked description of what to run.

The blobs are the client's, so nothing in them is believed: every path, name, number and count is checked here, before
anything is queued. Whatever leaves this module can be run.
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import BlobNotFound, InvalidArgument, MissingBlobs
from expbuild.platform_properties import PropertyList
from expbuild.reapi import Action, Command, DigestMessage, Platform
from expbuild.storage.base import BlobStore, read_blob

MAX_MESSAGE_BYTES = 16 << 20
"""Largest Action, Command or Directory blob that is looked into."""

INLINE_BYTES = 64 << 10
"""Larger messages are taken apart in a thread: millions of small things fit into one, and the loop must stay free."""

MAX_DEPTH = 512
"""Deepest nesting of an input tree, of an output's path and of an output directory."""

MAX_OUTPUTS = 100_000
"""Most outputs one command may declare."""

_MAX_PATH_CHARS = MAX_DEPTH * 256

M = TypeVar("M", bound=Message)
Components = tuple[str, ...]
"""A path below the input root, name by name; no "", ".", ".."."""


class OutputKind(enum.Enum):
    """What a declared output may be."""

    ANY = "path"
    FILE = "file"
    DIRECTORY = "directory"


@dataclass(frozen=True, slots=True)
class OutputRequest:
    """One declared output: `path` as the client wrote it, and where that is below the input root."""

    path: str
    location: Components
    kind: OutputKind


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """A checked Command.

    working_directory: below the input root; that it exists is known only once the input tree is.
    wants_directories: the client asked for outputs as single Directory blobs too (OutputDirectoryFormat).
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    working_directory: Components
    outputs: tuple[OutputRequest, ...]
    wants_directories: bool


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """A checked Action with its Command. timeout_s is what will apply, the server's default included."""

    digest: Digest
    command: CommandSpec
    input_root: Digest
    timeout_s: float
    do_not_cache: bool
    platform: PropertyList


@dataclass(frozen=True, slots=True)
class TimeoutPolicy:
    """The time limits of actions: `default_s` where the action names none, nothing beyond `max_s`."""

    default_s: float
    max_s: float


async def load_action(blobs: BlobStore, digest: Digest, timeouts: TimeoutPolicy) -> ActionSpec:
    """Read and check an action and its command.

    Raises MissingBlobs when either is not stored, InvalidArgument with everything that is wrong about them first found.
    """
    action_bytes = await _load(blobs, digest, "Action")
    action = parse_message(Action(), action_bytes, digest)
    command_digest = required_digest(action, "command_digest", digest.function, "Action")
    command_bytes = await _load(blobs, command_digest, "Command")

    def check() -> ActionSpec:
        command = parse_message(Command(), command_bytes, command_digest)
        platform = action.platform if action.HasField("platform") else command.platform
        return ActionSpec(
            digest=digest,
            command=check_command(command),
            input_root=required_digest(action, "input_root_digest", digest.function, "Action"),
            timeout_s=_timeout(action.timeout if action.HasField("timeout") else None, timeouts),
            do_not_cache=action.do_not_cache,
            platform=_properties(platform),
        )

    return await asyncio.to_thread(check) if len(command_bytes) > INLINE_BYTES else check()


def parse_message(message: M, data: bytes, digest: Digest) -> M:
    """Parse a blob into the message given, and return it. Raises InvalidArgument."""
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidArgument(f"blob {digest} is not a valid {message.DESCRIPTOR.name} message") from error
    return message


def shown(text: str) -> str:
    """Return a text from a client as it may stand in a message: quoted, and not longer than people read."""
    return repr(text) if len(text) <= 200 else f"{text[:200]!r}…"


def required_digest(message: Message, field: str, function: DigestFunction, owner: str) -> Digest:
    """Return a digest field of a message; an unset one is an error, never the empty blob. Raises InvalidArgument."""
    if not message.HasField(field):
        raise InvalidArgument(f"{owner}.{field} is not set")
    value: DigestMessage = getattr(message, field)
    return Digest.parse(value.hash, value.size_bytes, function)


def check_command(command: Command) -> CommandSpec:
    """Check a Command. Raises InvalidArgument."""
    if not command.arguments:
        raise InvalidArgument("Command.arguments is empty: there is nothing to run")
    if not command.arguments[0]:
        raise InvalidArgument("Command.arguments[0] is empty: it names the program to run")
    for argument in command.arguments:
        if "\0" in argument:
            raise InvalidArgument("Command.arguments: an argument contains a NUL byte, which no program can receive")
    if command.output_node_properties:
        name = command.output_node_properties[0]
        raise InvalidArgument(
            f"Command.output_node_properties: {shown(name)} is not supported (see supported_node_properties)"
        )
    working_directory = _resolve(command.working_directory, (), "Command.working_directory")
    return CommandSpec(
        arguments=tuple(command.arguments),
        environment=_environment(command.environment_variables),
        working_directory=working_directory,
        outputs=_outputs(command, working_directory),
        wants_directories=command.output_directory_format
        in (Command.OutputDirectoryFormat.DIRECTORY_ONLY, Command.OutputDirectoryFormat.TREE_AND_DIRECTORY),
    )


async def _load(blobs: BlobStore, digest: Digest, name: str) -> bytes:
    if digest.size_bytes > MAX_MESSAGE_BYTES:
        raise InvalidArgument(f"{name} {digest} is larger than {MAX_MESSAGE_BYTES} bytes")
    try:
        return await read_blob(blobs, digest)
    except BlobNotFound as error:
        raise MissingBlobs([digest]) from error


_ENVIRONMENT_NAME = re.compile(r"[^=\0]+")


def _environment(variables: Iterable[Command.EnvironmentVariable]) -> dict[str, str]:
    environment: dict[str, str] = {}
    for variable in variables:
        if _ENVIRONMENT_NAME.fullmatch(variable.name) is None:
            name = shown(variable.name)
            raise InvalidArgument(f"Command.environment_variables: {name} is not a name a variable can have")
        if "\0" in variable.value:
            name = shown(variable.name)
            raise InvalidArgument(f"Command.environment_variables: the value of {name} contains a NUL byte")
        environment[variable.name] = variable.value
    return environment


def _outputs(command: Command, working_directory: Components) -> tuple[OutputRequest, ...]:
    """Return the declared outputs, each path once. The newer list replaces both older ones (REAPI 2.1)."""
    if command.output_paths:
        kinds = dict.fromkeys(command.output_paths, OutputKind.ANY)
        field = "output_paths"
    else:
        kinds = dict.fromkeys(command.output_files, OutputKind.FILE)
        for path in command.output_directories:
            # Some clients name each output in both lists when they do not know what it will be.
            kinds[path] = OutputKind.ANY if path in kinds else OutputKind.DIRECTORY
        field = "output_files/output_directories"
    if len(kinds) > MAX_OUTPUTS:
        raise InvalidArgument(f"Command.{field}: {len(kinds)} outputs are declared, at most {MAX_OUTPUTS} are possible")
    outputs = []
    for path, kind in kinds.items():
        location = _resolve(path, working_directory, f"Command.{field}")
        if kind is OutputKind.FILE and location == working_directory[: len(location)]:
            raise InvalidArgument(
                f"Command.output_files: {shown(path)} names the working directory or one above it, which is no file"
            )
        outputs.append(OutputRequest(path, location, kind))
    _check_nesting(outputs)
    return tuple(outputs)


def _check_nesting(outputs: list[OutputRequest]) -> None:
    """Refuse outputs below something that can only be a file."""
    files = {output.location: output.path for output in outputs if output.kind is OutputKind.FILE}
    for output in outputs:
        for length in range(len(output.location)):
            if (parent := files.get(output.location[:length])) is not None:
                raise InvalidArgument(
                    f"Command.output_files: {shown(parent)} is declared a file and a parent of {shown(output.path)}"
                )


def _resolve(path: str, base: Components, field: str) -> Components:
    """Return where a relative path leads below the input root, by its text alone. Raises InvalidArgument."""
    if path.startswith("/"):
        raise InvalidArgument(f"{field}: {shown(path)} is absolute; paths are relative")
    if "\0" in path:
        raise InvalidArgument(f"{field}: {shown(path)} contains a NUL byte")
    if len(path) > _MAX_PATH_CHARS:
        raise InvalidArgument(f"{field}: {shown(path)} is longer than a path can be")
    components = list(base)
    for segment in path.split("/") if path else ():
        if segment == "":
            raise InvalidArgument(f"{field}: {shown(path)} has an empty segment or a trailing slash")
        if segment == "..":
            if not components:
                raise InvalidArgument(f"{field}: {shown(path)} leads out of the input root")
            components.pop()
        elif segment != ".":
            if len(segment.encode()) > 255:
                raise InvalidArgument(f"{field}: a name in {shown(path)} is longer than 255 bytes")
            components.append(segment)
    if len(components) > MAX_DEPTH:
        raise InvalidArgument(f"{field}: {shown(path)} is nested deeper than {MAX_DEPTH} directories")
    return tuple(components)


def _timeout(timeout: Duration | None, policy: TimeoutPolicy) -> float:
    if timeout is None:
        return policy.default_s
    seconds = timeout.seconds + timeout.nanos / 1e9
    if seconds < 0 or not -(10**9) < timeout.nanos < 10**9:
        raise InvalidArgument(
            f"Action.timeout: {timeout.seconds} s {timeout.nanos} ns is not a duration an action can take"
        )
    if seconds > policy.max_s:
        raise InvalidArgument(
            f"Action.timeout: {seconds:g} s is more than this server allows: {policy.max_s:g} s "
            "(execution.pool.max_task_timeout_seconds)"
        )
    return seconds or policy.default_s


def _properties(platform: Platform) -> PropertyList:
    return tuple((item.name, item.value) for item in platform.properties)
