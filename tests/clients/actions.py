"""Actions as a client prepares them: the messages, and every blob that has to be on the server first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from expbuild.reapi import (
    Action,
    ActionResult,
    Command,
    DigestMessage,
    Directory,
    DirectoryNode,
    ExecuteResponse,
    FileNode,
    Platform,
)

Hash = Callable[[bytes], str]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blake3_256(data: bytes) -> str:
    return blake3(data).hexdigest()


def platform(properties: Mapping[str, str]) -> Platform:
    """Return platform properties, sorted as the API wants them."""
    return Platform(properties=[Platform.Property(name=name, value=properties[name]) for name in sorted(properties)])


@dataclass(eq=False)
class Blobs:
    """Blobs by digest. `hash_of` is the digest function of the client they belong to."""

    hash_of: Hash = sha256
    content: dict[str, bytes] = field(default_factory=dict)

    def add(self, data: bytes) -> DigestMessage:
        digest = DigestMessage(hash=self.hash_of(data), size_bytes=len(data))
        self.content[digest.hash] = data
        return digest

    def digests(self) -> list[DigestMessage]:
        return [DigestMessage(hash=hash_text, size_bytes=len(data)) for hash_text, data in self.content.items()]

    def add_directory(self, files: Mapping[str, bytes]) -> DigestMessage:
        """Add a tree given as path → content, and return its root. Names in .sh are executable."""
        below: dict[str, dict[str, bytes]] = {}
        directory = Directory()
        for path in sorted(files):
            name, _, rest = path.partition("/")
            if rest:
                below.setdefault(name, {})[rest] = files[path]
            else:
                node = FileNode(name=name, digest=self.add(files[path]), is_executable=name.endswith(".sh"))
                directory.files.append(node)
        for name in sorted(below):
            directory.directories.append(DirectoryNode(name=name, digest=self.add_directory(below[name])))
        return self.add(directory.SerializeToString(deterministic=True))


@dataclass(frozen=True)
class Prepared:
    """An action that is ready to be sent."""

    digest: DigestMessage
    blobs: Blobs


def prepare(
    command: Command, files: Mapping[str, bytes] | None = None, *, timeout_s: int = 0, hash_of: Hash = sha256
) -> Prepared:
    """Return an action that runs `command` on an input tree of `files`. Its platform is that of the command."""
    blobs = Blobs(hash_of)
    action = Action(command_digest=blobs.add(command.SerializeToString(deterministic=True)))
    action.input_root_digest.CopyFrom(blobs.add_directory(files or {}))
    if command.HasField("platform"):
        action.platform.CopyFrom(command.platform)
    if timeout_s:
        action.timeout.seconds = timeout_s
    return Prepared(blobs.add(action.SerializeToString(deterministic=True)), blobs)


def shell(script: str, outputs: Sequence[str] = (), **fields: object) -> Command:
    """Return the command that runs a script; `fields` are more of the Command's own."""
    return Command(arguments=["/bin/sh", "-c", script], output_paths=outputs, **fields)  # type: ignore[arg-type]


class ClientError(Exception):
    """What a client tells its user when it gives up; `response` is the server's where there was one."""

    def __init__(self, reason: str, response: ExecuteResponse | None = None) -> None:
        super().__init__(reason)
        self.response = response


def output_files(result: ActionResult) -> dict[str, DigestMessage]:
    return {file.path: file.digest for file in result.output_files}
