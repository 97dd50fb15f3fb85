"""moon, a real client of the cache alone: what one checkout built, another one gets."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.relay import relay
from tests.support.clients import require_client
from tests.support.files import scratch_directory
from tests.support.require import require_tool
from tests.support.server import ReServer, host_server

_WORKSPACE = """\
projects: {{app: 'app'}}
telemetry: false
vcs: {{defaultBranch: 'master'}}
remote:
  host: 'grpc://{address}'
  cache: {{compression: '{compression}'}}
"""
_PROJECT = """\
tasks:
  build:
    command: 'sh make.sh'
    inputs: ['make.sh']
    outputs: ['out']
    toolchains: ['system']
"""
_LINES = 900_000
"""Numbers in the large output: more bytes than fit into a batch, and they compress well."""
_SCRIPT = f"""\
echo it ran >> ran.log
mkdir -p out/deep
echo hello > out/small.txt
seq 1 {_LINES} > out/deep/large.txt
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory("expbuild-moon-") as path:
        yield path


@pytest.fixture
def re_server(scratch: Path) -> Iterator[ReServer]:
    with host_server(scratch / "server") as server:
        yield server


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_outputs_come_back_from_the_cache(scratch: Path, re_server: ReServer, compression: str) -> None:
    """The second checkout does not run the task, and has the same outputs, small and large."""
    moon = require_client("moon-2.5.5") / "moon"
    require_tool("git")
    with relay(re_server.address) as wire:
        first = _checkout(scratch / "first", wire.address, compression)
        assert "1 completed\n" in _moon(moon, first)
        assert (first / "app" / "ran.log").read_text() == "it ran\n"

        second = _checkout(scratch / "second", wire.address, compression)
        assert "1 completed (1 cached)" in _moon(moon, second)
    assert not (second / "app" / "ran.log").exists()
    large = "".join(f"{n}\n" for n in range(1, _LINES + 1))
    for checkout in (first, second):
        assert (checkout / "app" / "out" / "small.txt").read_text() == "hello\n"
        assert (checkout / "app" / "out" / "deep" / "large.txt").read_text() == large
    for sent in (wire.from_client, wire.from_server):
        assert (len(sent) < len(large)) == (compression == "zstd")
    assert (b"compressed-blobs/zstd/" in wire.from_client) == (compression == "zstd")


def _checkout(directory: Path, address: str, compression: str) -> Path:
    """Write a workspace into a git repository of its own."""
    files = {
        ".moon/workspace.yml": _WORKSPACE.format(address=address, compression=compression),
        "app/moon.yml": _PROJECT,
        "app/make.sh": _SCRIPT,
        ".gitignore": "out\nran.log\n",
    }
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "--quiet", "--initial-branch=master"], ["add", "."], ["commit", "--quiet", "-m", "All"]):
        subprocess.run([*git, *command], cwd=directory, env=_environment(directory), check=True, timeout=60)
    return directory


def _moon(moon: Path, checkout: Path) -> str:
    """Run the task as a developer would (in CI moon does not use a cache on loopback); return what moon says."""
    result = subprocess.run(
        [moon, "run", "app:build"],
        cwd=checkout,
        env=_environment(checkout),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 0, f"moon ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _environment(checkout: Path) -> dict[str, str]:
    """Nothing of this machine's configuration, and nothing that outlives the test."""
    home = checkout.with_name(f"{checkout.name}-home")
    home.mkdir(exist_ok=True)
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "MOON_HOME": str(home / "moon"),
        "PROTO_HOME": str(home / "proto"),
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_SYSTEM": "/dev/null",
    }
