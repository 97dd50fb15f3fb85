"""The real clients that `tests/install-clients` brings, and the root file system some of them need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent.parent

# Run by the host's shell, with the root as $0 and the command as its arguments. Every step is an exec, so the command
# has the pid of the process we start: it can be signalled, waited for and found like any other.
_ENTER = """
PATH=$PATH:/usr/sbin:/sbin
for directory in /proc /dev "$EXPBUILD_TEST_SHARED"; do
    mkdir -p "$0$directory" && mount --rbind "$directory" "$0$directory" || exit 125
done
exec chroot "$0" /bin/sh -c 'cd "$0" 2>/dev/null || cd /; exec "$@"' "$PWD" "$@"
"""


def clients_directory() -> Path:
    """Where `tests/install-clients` puts what it installs."""
    if (named := os.environ.get("EXPBUILD_TEST_CLIENTS")) is not None:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "expbuild-tests"


def require_client(name: str) -> Path:
    """Return the directory of an installed client; without it skip the running test, naming the client and the reason.

    Also where CI=true: what a registry does not give at the moment is no fault of ours, as long as the report says so.
    """
    directory = clients_directory() / name
    missing = clients_directory() / f"{name}.missing"
    if missing.exists():
        reason = missing.read_text().strip()
        pytest.skip(f"NOT TESTED: client {name} could not be installed (tests/install-clients tries again): {reason}")
    if not directory.is_dir():
        pytest.skip(f"NOT TESTED: client {name} is not installed: run tests/install-clients")
    return directory


@dataclass(frozen=True, slots=True)
class DebianRoot:
    """A root file system with Debian's newest Bazel and a Python of its own.

    Programs in there see the machine's processes, devices and directory for temporary files under their usual names,
    so what a test writes below that directory has the same path on both sides.
    """

    path: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        """What has to come before a command to run it in the root, in the current directory."""
        shared = f"EXPBUILD_TEST_SHARED={tempfile.gettempdir()}"
        unshare = ("unshare", "--mount", "--propagation", "private")
        return ("/usr/bin/env", shared, *unshare, "/bin/sh", "-c", _ENTER, str(self.path))

    def output(self, argv: Sequence[str], *, cwd: Path | None = None, timeout_s: float = 120) -> str:
        """Return the stdout of a command. Raises AssertionError with its stderr when it fails."""
        result = subprocess.run(
            [*self.prefix, *argv],
            cwd=cwd or tempfile.gettempdir(),
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert result.returncode == 0, f"{argv} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def install_expbuild(self, directory: Path) -> ServerCommand:
        """Install this checkout as pip does it for users, with the root's Python, into `directory`."""
        source, site = directory / "source", directory / "site"
        source.mkdir(parents=True)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(_REPOSITORY / name, source)
        shutil.copytree(_REPOSITORY / "src" / "expbuild", source / "src" / "expbuild")
        pip = ["/opt/expbuild/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        self.output([*pip, "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)])
        return ServerCommand((*self.prefix, "/opt/expbuild/bin/python"), {"PYTHONPATH": str(site)})


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start a `re-server`: what `tests.support.server.ReServer` takes. By default the one of this checkout."""

    python: Sequence[str] = (sys.executable,)
    env: Mapping[str, str] | None = None


def require_debian_root() -> DebianRoot:
    """Return the root; skip the running test where there is none, or where we may not enter it."""
    directory = require_client("bazel-sid")
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: client bazel-sid: only root can enter its root file system")
    return DebianRoot(directory)
