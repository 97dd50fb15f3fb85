"""Real Bazel against a store that loses blobs, a server that is restarted, and a store that is too small."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from expbuild.storage.files import MTIME_NS, blob_name
from tests.bazel.client import Bazel, remote_flags
from tests.bazel.workspace import ALL_TARGETS, BINARY, write_workspace
from tests.reliability.load import Refused, content, upload
from tests.support.actions import Blobs, Client, put
from tests.support.files import scratch_directory
from tests.support.require import only_in_full_runs, require_tool
from tests.support.server import Config, ReServer, host_pool_config

pytestmark = [pytest.mark.bazel, pytest.mark.timeout(900)]

_LOSS = 0.05
_LIBRARIES = 8
_ACTIONS_BETWEEN = 4
_STRIKES_PER_KILL = 3
_RETRIES = ("--remote_retries=30",)


def outputs(bazel: Bazel) -> dict[str, str]:
    """Return the hash of every file that a build made, by its name."""
    root = bazel.bin.resolve()
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix in ("", ".o", ".a", ".txt") and ".runfiles" not in str(path)
    }


@pytest.fixture
def scratch() -> Iterator[Path]:
    require_tool("bazel")
    require_tool("g++")
    with scratch_directory("expbuild-loss-") as path:
        yield path


@contextmanager
def bazel_on(directory: Path) -> Iterator[Bazel]:
    bazel = Bazel(write_workspace(directory / "source", libraries=_LIBRARIES), directory / "output")
    try:
        yield bazel
    finally:
        bazel.close()


class Nemesis:
    """Deletes blobs of a running server at random, and kills and starts it, until it is stopped."""

    def __init__(self, server: ReServer, cas: Path, seed: int) -> None:
        self._server = server
        self._cas = cas
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nemesis")
        self._error: BaseException | None = None
        self.lost = self.strikes = self.restarts = 0

    def __enter__(self) -> Nemesis:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        """Strike whenever some actions have ended: by progress, not by time, so that a slow machine gets there too."""
        try:
            struck_at = 0
            while not self._stop.wait(0.1):
                if len(self._server.events("execution.completed")) < struck_at + _ACTIONS_BETWEEN:
                    continue
                self._lose()
                self.strikes += 1
                if self.strikes % _STRIKES_PER_KILL == 0:
                    self._server.kill()
                    self._server.start()
                    self.restarts += 1
                struck_at = len(self._server.events("execution.completed"))
        except BaseException as error:
            self._error = error

    def _lose(self) -> None:
        for path in self._cas.glob("sha256/*/*"):
            if self._rng.random() < _LOSS:
                with suppress(FileNotFoundError):
                    path.unlink()
                    self.lost += 1


def free_port() -> int:
    """Return a port that nobody listens on: a restarted server has to be found where it was."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config_of(root: Path, port: int) -> Config:
    config = host_pool_config(root)
    config["server"]["address"] = f"127.0.0.1:{port}"
    return config


def test_builds_finish_and_are_what_a_local_build_makes(scratch: Path) -> None:
    """5 % of the blobs vanish after every few actions, and the server is killed now and then."""
    with bazel_on(scratch / "local") as bazel:
        bazel.build(ALL_TARGETS).check()
        expected = outputs(bazel)
    assert len(expected) > 2 * _LIBRARIES
    server = ReServer(scratch / "server", config_of(scratch / "state", free_port()), start_timeout_s=120)
    with server, Nemesis(server, scratch / "state" / "cas", 1) as nemesis, bazel_on(scratch / "remote") as bazel:
        bazel.build(*remote_flags(server.address), *_RETRIES, ALL_TARGETS, timeout_s=600).check()
        assert outputs(bazel) == expected
    assert nemesis.lost > 0
    assert nemesis.restarts > 0


class Storm:
    """Uploads blobs that nobody will want any more, one batch after the other, until it is stopped."""

    def __init__(self, server: ReServer, cas: Path) -> None:
        self._address = server.address
        self._cas = cas
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="storm")
        self.uploaded = 0

    def __enter__(self) -> Storm:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        async with Client(self._address) as client:
            while not self._stop.is_set():
                blobs: Blobs = {}
                for _ in range(5):
                    self.uploaded += 1
                    put(blobs, content(self.uploaded, 4_000))
                with suppress(Refused):
                    await upload(client, blobs)
                for digest in blobs:
                    with suppress(FileNotFoundError):
                        os.utime(self._cas / blob_name(digest), ns=(10**9, MTIME_NS))
                await asyncio.sleep(0.05)


@only_in_full_runs
def test_builds_without_the_bytes_work_in_a_store_that_barely_holds_them(scratch: Path) -> None:
    """1.2 times the working set: what others bring makes it evict all the time, and never what a build counts on."""
    with ReServer(scratch / "sizing", host_pool_config(scratch / "sized")) as server, bazel_on(scratch / "a") as bazel:
        bazel.build(*remote_flags(server.address), ALL_TARGETS).check()
        bazel.workspace.change_source(1)
        bazel.build(*remote_flags(server.address), ALL_TARGETS).check()
    working_set = sum(p.stat().st_blocks * 512 + 4096 for p in (scratch / "sized" / "cas").glob("sha256/*/*"))
    config = host_pool_config(scratch / "state")
    config["storage"]["cas"]["max_size_bytes"] = int(1.2 * working_set)
    with ReServer(scratch / "server", config) as server, Storm(server, scratch / "state" / "cas") as storm:
        for number in range(2):
            with bazel_on(scratch / f"storm-{number}") as bazel:
                flags = (*remote_flags(server.address), "--remote_download_minimal", ALL_TARGETS)
                bazel.build(*flags).check()
                bazel.workspace.change_source(1)
                bazel.build(*flags).check()
                bazel.build(*flags, "--remote_download_outputs=all").check()
                assert (bazel.bin / BINARY).exists()
        evicted = sum(int(line["entries"]) for line in server.events("storage.evicted"))
        assert not server.events("storage.promise_broken")
    assert evicted > 0
    assert storm.uploaded > 0
