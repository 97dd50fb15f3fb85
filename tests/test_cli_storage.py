"""`re-server storage`, as a process of its own, beside a running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expbuild.digest import Digest
from expbuild.storage.files import MTIME_NS, blob_name
from tests.support.actions import Client, from_message, shell
from tests.support.files import scratch_directory
from tests.support.server import ReServer, host_pool_config, to_toml


class Kit:
    """A server and the command line that looks into its stores."""

    def __init__(self, directory: Path) -> None:
        config = host_pool_config(directory / "state")
        config["storage"]["cas"]["min_free_bytes"] = 0
        self.server = ReServer(directory / "server", config)
        self.config = directory / "storage.toml"
        self.config.write_text(to_toml(config))
        self.cas = directory / "state" / "cas"
        self.action_cache = directory / "state" / "action-cache"

    def run(self, *args: str, exit_code: int = 0) -> str:
        """Return what the command says."""
        command = [sys.executable, "-m", "expbuild", "--config", str(self.config), "storage", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == exit_code, done.stdout + done.stderr
        return done.stdout if "--json" in args or exit_code == 0 else done.stdout + done.stderr

    def lines(self, *args: str, exit_code: int = 0) -> list[dict[str, Any]]:
        """Return what the command says with --json."""
        return [json.loads(line) for line in self.run(*args, "--json", exit_code=exit_code).splitlines()]

    def age(self, digest: Digest, age_s: float) -> None:
        os.utime(self.cas / blob_name(digest), ns=(time.time_ns() - int(age_s * 10**9), MTIME_NS))


@pytest.fixture
def kit() -> Iterator[Kit]:
    with scratch_directory("expbuild-cli-") as directory:
        kit = Kit(directory)
        with kit.server:
            yield kit


async def test_everything_beside_a_running_server(kit: Kit) -> None:
    """One test, because each step costs a process: what is shown, and what is removed, is what the server has."""
    async with Client(kit.server.address) as client:
        action = shell("cat in in > out", inputs={"in": b"input"}, output_paths=["out"])
        result = (await client.execute(action)).result
        output = from_message(result.output_files[0].digest)

        cas, cache = kit.lines("stats")
        assert (cas["store"], cache["store"]) == ("cas", "action_cache")
        assert cas["entries"] == len(action.blobs) + 1
        assert (cas["in_use"], cas["at_risk"], cas["quarantined"]) == (True, False, 0)
        assert cache["entries"] == 1
        text = kit.run("stats")
        assert f"cas: {kit.cas} (a server uses it)\n  {cas['entries']} entries in {cas['files']} files, " in text

        (listed,) = kit.lines("ac", "list")
        assert listed["action"] == f"sha256/{action.digest.hash}/{action.digest.size_bytes}"
        assert (listed["exit_code"], listed["outputs"], listed["instance_name"]) == (0, 1, "")
        (shown,) = kit.lines("ac", "show", action.digest.hash[:12])
        assert shown["result"]["outputFiles"][0]["path"] == "out"
        assert 'path: "out"' in kit.run("ac", "show", action.digest.hash)
        assert kit.lines("ac", "list", "--older-than", "1h") == []
        assert kit.lines("ac", "list", "--invocation", "none") == []

        assert [line["bad"] for line in kit.lines("verify")] == [0, 0]
        path = kit.cas / blob_name(output)
        path.chmod(0o600)
        path.write_bytes(b"wrong")
        assert {"store": "cas", "damaged": blob_name(output)} in kit.lines("verify", exit_code=1)
        assert await client.cached(action) is None
        await client.execute(action)
        assert await client.cached(action) is not None

        for digest in action.blobs:
            kit.age(digest, 100 * 3600)
        dry = kit.lines("gc", "--dry-run", "--older-than", "2d")
        assert dry[-2]["entries"] == len(action.blobs)
        assert await client.find_missing([output]) == []
        assert kit.run("gc", "--older-than", "2d").startswith(f"cas: {len(action.blobs)} entries removed, ")
        assert len(await client.find_missing(action.blobs)) == len(action.blobs)
        assert await client.find_missing([output]) == []

        assert (
            kit.run("rm", f"{output.hash}/{output.size_bytes}") == f"removed blob {output.hash}/{output.size_bytes}\n"
        )
        assert await client.find_missing([output]) != []
        assert "is not in the CAS" in kit.run("rm", f"sha256/{output.hash}/{output.size_bytes}", exit_code=1)
        assert kit.run("ac", "rm", "--action", action.digest.hash) == "1 results removed\n"
        assert kit.lines("ac", "list") == []


def test_mistakes_are_explained(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    assert f"storage.cas.root_dir: cannot use {kit.cas}: No such file or directory" in kit.run("stats", exit_code=1)
    assert "expected a number and one of s, m, h, d, w" in kit.run("gc", "--older-than", "soon", exit_code=2)
    assert "say which: --action, --invocation, --older-than or --all" in kit.run("ac", "rm", exit_code=2)
    kit.cas.mkdir(parents=True)
    assert "expected a digest as HASH/SIZE" in kit.run("rm", "nonsense", exit_code=2)
