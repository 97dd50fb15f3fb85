"""Collecting what an action left at its declared outputs.

Nothing the action left behind is believed: everything is reached through directory descriptors, component by component,
and no link is followed. By the time this runs, everything the action started is dead.
All functions here block; they run in worker threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field

from expbuild.digest import Digest, DigestFunction
from expbuild.errors import InvalidArgument, OutputRejected
from expbuild.execution.action import MAX_DEPTH, CommandSpec, OutputKind, OutputRequest
from expbuild.execution.usage import Traffic
from expbuild.reapi import (
    ActionResult,
    DigestMessage,
    Directory,
    DirectoryNode,
    FileNode,
    OutputDirectory,
    OutputSymlink,
    SymlinkNode,
)
from expbuild.storage.base import BlobStore
from expbuild.workers.base import Owner
from expbuild.workers.verdicts import human_bytes
from expbuild.workers.work_dir import OPEN_DIRECTORY

_NOT_A_DIRECTORY = frozenset({errno.ENOTDIR, errno.ELOOP})

MAX_ENTRIES = 2_000_000
"""Most files, directories and symlinks the output directories of one action may hold together."""


@dataclass
class CollectedOutputs:
    """The outputs found: `result` has the output lists filled, `blobs` holds messages still to be stored.

    missing: what was declared and does not exist; complaint: a sentence about that, for people. traffic: the files.
    """

    result: ActionResult = field(default_factory=ActionResult)
    blobs: dict[Digest, bytes] = field(default_factory=dict)
    missing: list[OutputRequest] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    complaint: str = ""


class OutputCollector:
    """Collects the outputs of one action.

    root_fd: the input root the action ran in, open. owner: whom it ran as, None for our own user.
    absolute_symlinks: whether symlinks may have absolute targets.
    accepts_directories: whether a directory may be returned where a file was declared.
    max_bytes: the most that all output files together may hold, by the sizes they claim.
    """

    def __init__(
        self,
        blobs: BlobStore,
        root_fd: int,
        function: DigestFunction,
        command: CommandSpec,
        *,
        owner: Owner | None,
        absolute_symlinks: bool,
        accepts_directories: bool,
        max_bytes: int = 32 << 30,
    ) -> None:
        self._blobs = blobs
        self._root_fd = root_fd
        self._function = function
        self._command = command
        self._owner = owner
        self._entries = 0
        self._absolute_symlinks = absolute_symlinks
        self._accepts_directories = accepts_directories
        self._max_bytes = max_bytes
        self._found = CollectedOutputs()

    def collect(self) -> CollectedOutputs:
        """Store every declared output that exists; one that does not is left out.

        Raises OutputRejected or InvalidArgument for what cannot be returned, StorageFull, StorageUnavailable.
        """
        for request in self._command.outputs:
            self._collect(request)
        result = self._found.result
        for outputs in (
            result.output_files,
            result.output_directories,
            result.output_symlinks,
            result.output_file_symlinks,
            result.output_directory_symlinks,
        ):
            outputs.sort(key=lambda output: output.path)
        return self._found

    def _collect(self, request: OutputRequest) -> None:
        if not request.location:
            self._add_directory(request, os.open(".", OPEN_DIRECTORY, dir_fd=self._root_fd))
            return
        parent_fd = self._open_parent(request)
        if parent_fd is None:
            self._found.missing.append(request)
            return
        try:
            self._collect_from(parent_fd, request, request.location[-1])
        finally:
            os.close(parent_fd)

    def _open_parent(self, request: OutputRequest) -> int | None:
        """Open the directory an output lies in; None when it does not exist, hence neither does the output."""
        fd = os.dup(self._root_fd)
        for name in request.location[:-1]:
            try:
                child = _open_directory(name, fd)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in _NOT_A_DIRECTORY:
                    raise
                raise OutputRejected(
                    f"output {request.path!r}: its parent {name!r} is not a directory (symlinks are not followed)"
                ) from error
            finally:
                os.close(fd)
            fd = child
        return fd

    def _collect_from(self, parent_fd: int, request: OutputRequest, name: str) -> None:
        try:
            mode = os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            self._found.missing.append(request)
            return
        if stat.S_ISLNK(mode):
            self._add_symlink(request, parent_fd, name)
        elif stat.S_ISDIR(mode):
            if request.kind is OutputKind.FILE and not self._accepts_directories:
                raise OutputRejected(f"output {request.path!r} is declared a file, but the action made a directory")
            self._add_directory(request, _open_directory(name, parent_fd))
        elif stat.S_ISREG(mode):
            if request.kind is OutputKind.DIRECTORY:
                raise OutputRejected(f"output {request.path!r} is declared a directory, but the action made a file")
            digest, executable = self._store_file(name, parent_fd)
            self._found.result.output_files.add(path=request.path, digest=_message(digest), is_executable=executable)
        else:
            raise InvalidArgument(f"output {request.path!r} is neither a file, a directory nor a symlink")

    def _add_symlink(self, request: OutputRequest, parent_fd: int, name: str) -> None:
        """Return a symlink as one, in the lists that this client's generation reads."""
        target = self._read_link(name, parent_fd)
        link = OutputSymlink(path=request.path, target=target)
        to_directory = _is_directory(name, parent_fd)
        if request.kind is OutputKind.FILE and to_directory:
            raise OutputRejected(f"output {request.path!r} is declared a file, but is a symlink to a directory")
        if request.kind is OutputKind.DIRECTORY and to_directory is False:
            raise OutputRejected(f"output {request.path!r} is declared a directory, but is a symlink to a file")
        result = self._found.result
        if request.kind is OutputKind.ANY:
            result.output_symlinks.append(link)
        if to_directory or (request.kind is OutputKind.DIRECTORY):
            result.output_directory_symlinks.append(link)
        else:
            result.output_file_symlinks.append(link)

    def _add_directory(self, request: OutputRequest, fd: int) -> None:
        """Store a directory as a Tree; as single Directory blobs too when the client asked for those."""
        nodes = self._walk(fd, request.path)
        tree = b"".join(length_delimited(1 if index == 0 else 2, data) for index, data in enumerate(nodes.values()))
        tree_digest = self._function.digest_of(tree)
        self._found.blobs[tree_digest] = tree
        output = OutputDirectory(path=request.path, tree_digest=_message(tree_digest), is_topologically_sorted=True)
        if self._command.wants_directories:
            self._found.blobs.update(nodes)
            output.root_directory_digest.CopyFrom(_message(next(iter(nodes))))
        self._found.result.output_directories.append(output)

    def _walk(self, top_fd: int, path: str) -> dict[Digest, bytes]:
        """Return the Directory messages of a tree by digest, each once, parents before their children."""
        finished: list[tuple[Digest, bytes]] = []
        stack = [_Level(top_fd, "")]
        try:
            while True:
                level = stack[-1]
                if level.pending is None:
                    level.pending = self._scan(level, path)
                if level.pending:
                    if len(stack) >= MAX_DEPTH:
                        raise OutputRejected(f"output {path!r} is nested deeper than {MAX_DEPTH} directories")
                    name = level.pending.pop()
                    stack.append(_Level(_open_directory(name, level.fd), name))
                    continue
                data = level.message()
                digest = self._function.digest_of(data)
                finished.append((digest, data))
                os.close(stack.pop().fd)
                if not stack:
                    break
                stack[-1].directories.append(DirectoryNode(name=level.name, digest=_message(digest)))
        finally:
            for level in stack:
                os.close(level.fd)
        # Directories finish after all they contain. So the first copy of each stands before every parent that names it,
        # and the reverse of that is what `is_topologically_sorted` promises.
        ordered: dict[Digest, bytes] = {}
        for digest, data in finished:
            ordered.setdefault(digest, data)
        return dict(reversed(ordered.items()))

    def _scan(self, level: _Level, path: str) -> list[str]:
        """Store the files and note the symlinks of one directory; return the names of its sub-directories."""
        names = []
        with os.scandir(level.fd) as entries:
            for entry in entries:
                self._entries += 1
                if self._entries > MAX_ENTRIES:
                    raise OutputRejected(f"output {path!r}: more than {MAX_ENTRIES} entries in the output directories")
                name = _utf8(entry.name, path)
                if entry.is_symlink():
                    level.symlinks.append(SymlinkNode(name=name, target=self._read_link(name, level.fd)))
                elif entry.is_dir(follow_symlinks=False):
                    names.append(name)
                elif entry.is_file(follow_symlinks=False):
                    digest, executable = self._store_file(name, level.fd)
                    level.files.append(FileNode(name=name, digest=_message(digest), is_executable=executable))
        names.sort(reverse=True)  # the walk takes them from the end; its order is that of the Tree's bytes
        return names

    def _store_file(self, name: str, dir_fd: int) -> tuple[Digest, bool]:
        fd = _open_file(name, dir_fd)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OutputRejected(f"output file {name!r} is not a regular file")
            if self._owner is not None and not _may_read(self._owner, found):
                raise OutputRejected(f"output file {name!r} is a link to a file that the action could not read itself")
            traffic = self._found.traffic
            traffic.add(found.st_size)
            if traffic.size_bytes > self._max_bytes:
                raise OutputRejected(
                    f"output file {name!r} of {human_bytes(found.st_size)}: the outputs are larger than "
                    f"{human_bytes(self._max_bytes)} together (max_output_bytes)"
                )
            return self._blobs.ingest(fd, self._function), bool(found.st_mode & 0o111)
        finally:
            os.close(fd)

    def _read_link(self, name: str, dir_fd: int) -> str:
        target = _utf8(os.readlink(name, dir_fd=dir_fd), name)
        if target.startswith("/") and not self._absolute_symlinks:
            raise OutputRejected(
                f"output symlink {name!r} has the absolute target {target!r}, which symlink_absolute_path_strategy "
                "DISALLOWED forbids"
            )
        return target


class _Level:
    """One directory of the walk: open, partly read."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.pending: list[str] | None = None
        self.files: list[FileNode] = []
        self.directories: list[DirectoryNode] = []
        self.symlinks: list[SymlinkNode] = []

    def message(self) -> bytes:
        """Return the canonical bytes of this Directory."""
        return Directory(
            files=sorted(self.files, key=lambda node: node.name),
            directories=sorted(self.directories, key=lambda node: node.name),
            symlinks=sorted(self.symlinks, key=lambda node: node.name),
        ).SerializeToString(deterministic=True)


def _open_directory(name: str, dir_fd: int) -> int:
    try:
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)
    except PermissionError:
        # The action took away its own right to look; it is dead, and what it left is ours to open up.
        os.chmod(name, 0o700, dir_fd=dir_fd)
        return os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)
    if not os.fstat(fd).st_mode & stat.S_IXUSR:
        with contextlib.suppress(PermissionError):
            os.fchmod(fd, 0o700)  # it can be listed, but nothing in it reached
    return fd


def _open_file(name: str, dir_fd: int) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=dir_fd)
    except PermissionError:
        os.chmod(name, os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode | 0o400, dir_fd=dir_fd)
        return os.open(name, flags, dir_fd=dir_fd)


def _may_read(owner: Owner, found: os.stat_result) -> bool:
    """Whether an action could read a file: its own, or one that is open to it.

    A hard link needs no right to read its file (unless fs.protected_hardlinks is set), and we may be root.
    """
    if found.st_uid == owner.uid:
        return True
    return bool(found.st_mode & (stat.S_IRGRP if found.st_gid == owner.gid else stat.S_IROTH))


def _is_directory(name: str, dir_fd: int) -> bool | None:
    """Tell whether a symlink leads to a directory; None when it leads nowhere."""
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=dir_fd).st_mode)
    except OSError:
        return None


def _utf8(name: str, where: str) -> str:
    """Refuse a name that is not UTF-8: the protocol cannot carry it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise OutputRejected(f"output {where!r}: the name {os.fsencode(name)!r} is not valid UTF-8") from None
    return name


def _message(digest: Digest) -> DigestMessage:
    return DigestMessage(hash=digest.hash, size_bytes=digest.size_bytes)


def length_delimited(number: int, data: bytes) -> bytes:
    """Return `data` as length-delimited field `number`: a Tree is made of its Directories' own bytes."""
    encoded = bytearray([number << 3 | 2])
    length = len(data)
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded) + data
