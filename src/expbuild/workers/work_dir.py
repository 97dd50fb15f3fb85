"""Directories of our own below a configured path: checked, created, locked, removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path

from expbuild.errors import StartupError


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
    """Remove a directory and all below it, also where the owner has taken away his own permissions.

    Nobody else may be at work in it. Missing is fine. Symbolic links are removed, not followed.
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except PermissionError:
        _open_up(path)
        shutil.rmtree(path)


def _open_up(path: Path) -> None:
    path.chmod(0o700)
    for directory, names, _ in os.walk(path):
        for name in names:
            below = os.path.join(directory, name)
            if not os.path.islink(below):
                os.chmod(below, 0o700)  # before walk goes there
