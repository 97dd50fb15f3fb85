"""A declared output that was not written: what was written instead, for people who look for a misspelt name."""

from __future__ import annotations

import os
from collections.abc import Sequence

from expbuild.execution.action import Components, OutputRequest
from expbuild.execution.input_tree import InputTree
from expbuild.workers.work_dir import OPEN_DIRECTORY

_NAMED = 3
_NAMES = 8
_ENTRIES = 1000
_NAME_CHARS = 100


def describe_missing(
    root_fd: int, tree: InputTree, declared: Sequence[OutputRequest], missing: Sequence[OutputRequest]
) -> str:
    """Return a sentence; "" when nothing is missing. Blocks. What cannot be looked at is left out.

    root_fd: the input root, where nothing runs any more.
    """
    if not missing:
        return ""
    # The outputs that were written, and the directories that were made for them.
    expected = {output.location[:depth] for output in declared for depth in range(1, len(output.location) + 1)}
    sentences = [
        f"declared output {request.path[:1000]!r} was not written{_instead(root_fd, tree, request.location, expected)}"
        for request in missing[:_NAMED]
    ]
    if len(missing) > _NAMED:
        sentences.append(f"nor were {len(missing) - _NAMED} more of them")
    return "; ".join(sentences)


def _instead(root_fd: int, tree: InputTree, location: Components, expected: set[Components]) -> str:
    """Tell what its directory holds that was not there before."""
    parent = location[:-1]
    where = repr("/".join(parent)) if parent else "the input root"
    try:
        fd = _open(root_fd, parent)
    except OSError:
        return f" ({where} does not exist)"
    try:
        before = tree.directory_at(parent)
        known = {path[-1] for path in expected if path[:-1] == parent}
        if before is not None:
            known |= {file.name for file in before.files} | before.symlinks.keys() | before.directories.keys()
        new = _new_names(fd, known)
    finally:
        os.close(fd)
    if not new:
        return f" ({where} holds nothing new)"
    names = ", ".join(repr(name[:_NAME_CHARS]) for name in new[:_NAMES])
    more = f" and {len(new) - _NAMES} more" if len(new) > _NAMES else ""
    return f" ({where} holds {names}{more} instead)"


def _open(root_fd: int, path: Components) -> int:
    fd = os.dup(root_fd)
    for name in path:
        try:
            child = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = child
    return fd


def _new_names(fd: int, known: set[str]) -> list[str]:
    names: list[str] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.name not in known:
                names.append(entry.name)
                if len(names) >= _ENTRIES:
                    break
    return sorted(names)
