"""Directories of our own below a configured path: checked, created, locked, removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from pathlib import Path

from expbuild.errors import StartupError

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a directory is opened that somebody else may have had his hands on."""


def make_work_dir(path: Path, mode: int) -> None:
    """Create a directory, and its parents (0755), unless others could exchange what lies on the way to it.

    Refused with StartupError: a symbolic link anywhere in the path; a directory everybody can write to, unless it is
    sticky as /tmp is; in a sticky one, a directory of another user; a last directory that is another user's.
    """
    for parent in (*reversed(path.parents), path):
        try:
            found = parent.lstat()
        except FileNotFoundError:
            _make(parent, mode if parent == path else 0o755)
        except OSError as error:
            raise StartupError(f"work_dir {path}: cannot look at {parent}: {error.strerror}") from error
        else:
            _check(path, parent, found)


def _make(path: Path, mode: int) -> None:
    try:
        path.mkdir(mode)
        path.chmod(mode)  # whatever our umask says
    except FileExistsError:
        _check(path, path, path.lstat())
    except OSError as error:
        raise StartupError(f"work_dir {path}: cannot be created: {error.strerror}") from error


def _check(path: Path, part: Path, found: os.stat_result) -> None:
    is_ours = found.st_uid in (0, os.geteuid())
    if stat.S_ISLNK(found.st_mode):
        raise StartupError(f"work_dir {path}: {part} is a symbolic link; name the real path {os.path.realpath(path)}")
    if not stat.S_ISDIR(found.st_mode):
        raise StartupError(f"work_dir {path}: {part} is not a directory")
    if found.st_mode & stat.S_IWOTH and not (found.st_mode & stat.S_ISVTX and part != path):
        raise StartupError(f"work_dir {path}: everybody can write to {part}")
    if not is_ours and (part == path or part.parent.stat().st_mode & stat.S_IWOTH):
        raise StartupError(f"work_dir {path}: {part} belongs to another user (uid {found.st_uid})")


def lock_work_dir(path: Path) -> int:
    """Lock the directory against other servers; return the descriptor that holds the lock.

    The lock is a file beside the directory, so that the directory itself can be removed. Raises StartupError when
    another process holds it: wiping would take the ground from under its actions.
    """
    lock = path.with_name(path.name + ".lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise StartupError(f"work_dir {path} is in use by another server") from error
    return fd


def remove_tree(path: Path) -> None:
    """Delete a directory and all below it, whatever an action made of it. Nothing there may be running any more.

    Works at constant depth: sub-directories are moved up to the top, then emptied there, so neither deep nesting nor
    overlong paths stop it. Follows no link. Raises OSError only when something cannot be deleted at all.
    """
    try:
        top_fd = os.open(path, OPEN_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        while names := _subdirectories(top_fd):
            for name in names:
                _hoist(top_fd, name)
    finally:
        os.close(top_fd)
    path.rmdir()


def _subdirectories(fd: int) -> list[str]:
    """Delete everything in a directory but its sub-directories; return those."""
    names = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                names.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=fd)
    return names


def _hoist(top_fd: int, name: str) -> None:
    """Empty the directory `name`, moving its sub-directories to the top, then delete it."""
    with contextlib.suppress(PermissionError):
        os.chmod(name, 0o700, dir_fd=top_fd)
    fd = os.open(name, OPEN_DIRECTORY, dir_fd=top_fd)
    try:
        for child in _subdirectories(fd):
            with contextlib.suppress(PermissionError):
                os.chmod(child, 0o700, dir_fd=fd)
            os.rename(child, secrets.token_hex(16), src_dir_fd=fd, dst_dir_fd=top_fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=top_fd)
