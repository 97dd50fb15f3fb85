"""Files of the tests' own."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.require import require_tool, unavailable


def remove_tree(path: Path) -> None:
    """Remove a directory tree that may hold read-only directories; nothing happens when there is none.

    Bazel takes the write permission from directories it got from an action, and only root can empty those.
    """
    if not path.exists():
        return
    for directory, _, _ in os.walk(path):
        mode = os.lstat(directory).st_mode
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(directory, mode | stat.S_IRWXU)
    shutil.rmtree(path)


@contextmanager
def scratch_directory(prefix: str = "expbuild-test-") -> Iterator[Path]:
    """Make a directory and remove it at the end.

    In place of pytest's `tmp_path` where another user must reach what is inside (a server that gives up root, an
    action with a uid of its own: `tmp_path` is below a directory only its owner can enter), or where it gets big
    (`tmp_path` outlives three test runs).
    """
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        path.chmod(0o755)
        yield path
    finally:
        remove_tree(path)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """Mount a file system of `size` (as mount(8) writes it) at a new directory `path`."""
    path.mkdir(parents=True)
    mount = [require_tool("mount"), "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        unavailable(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run([require_tool("umount"), "-l", str(path)], check=True, timeout=30)
