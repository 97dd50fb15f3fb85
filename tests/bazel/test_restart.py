"""A server that is stopped and started again in the middle of a Bazel build: the build does not notice."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bazel.client import Bazel, BazelResult, remote_flags
from tests.bazel.workspace import ALL_TARGETS, BINARY, write_workspace
from tests.support.files import scratch_directory
from tests.support.require import require_tool
from tests.support.server import ReServer, host_pool_config, wait_until

pytestmark = [pytest.mark.bazel, pytest.mark.timeout(600)]

_EXECUTED_BEFORE = 5
"""So many actions are done when the server is told to stop: the build is well under way, and far from its end."""

_RETRIES = "--remote_retries=12"
"""About half a minute. The default makes some three seconds, less than a busy machine takes for a start."""


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory("expbuild-restart-") as directory:
        yield directory


@pytest.fixture
def server(scratch: Path) -> Iterator[ReServer]:
    """A server on a port that it finds again, with two workers."""
    require_tool("bazel")
    require_tool("g++")
    config = host_pool_config(scratch / "state")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config["server"] |= {"address": f"127.0.0.1:{probe.getsockname()[1]}", "drain_timeout_seconds": 60}
    with ReServer(scratch / "server", config) as server:
        yield server


def test_a_restart_in_the_middle_of_a_build_does_not_break_it(server: ReServer, scratch: Path) -> None:
    """Every action still runs remotely, the outputs are right, and no action that ran was reported as failed."""
    bazel = Bazel(write_workspace(scratch / "source"), scratch / "output")
    results: list[BazelResult] = []

    def build() -> None:
        results.append(bazel.build(*remote_flags(server.address), _RETRIES, ALL_TARGETS))

    with bazel:
        building = threading.Thread(target=build)
        building.start()
        try:
            wait_until(
                lambda: len(server.events("execution.completed")) >= _EXECUTED_BEFORE or not building.is_alive(),
                timeout_s=240,
                what=f"{_EXECUTED_BEFORE} actions done",
            )
            server.terminate(timeout_s=120)
            before = len(server.events("execution.completed"))
            server.start()
        finally:
            building.join()
        result = results[0].check()
        assert before < bazel.workspace.actions, "the build was over before the restart"
        assert server.events("execution.completed"), "nothing ran after the restart"
        assert not {"local", "linux-sandbox", "processwrapper-sandbox"} & set(result.processes)
        assert (bazel.bin / BINARY).exists()
