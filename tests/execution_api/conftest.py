"""Servers that execute, and clients of them. Most tests share one server; their actions never equal one another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.actions import Client, SideEffects
from tests.support.files import scratch_directory
from tests.support.server import Config, ReServer, host_pool_config

StartServer = Callable[[Callable[[Config], None]], ReServer]
"""Starts a server with two host workers whose configuration the given function has changed."""


@pytest.fixture(scope="session")
def server_root() -> Iterator[Path]:
    """What the shared server keeps: configuration, log, stores, work directories."""
    with scratch_directory("expbuild-execution-") as directory:
        yield directory


@pytest.fixture(scope="session")
def server(server_root: Path) -> Iterator[ReServer]:
    """A server with two host workers."""
    with ReServer(server_root / "server", host_pool_config(server_root / "state")) as server:
        yield server


@pytest.fixture
async def client(server: ReServer) -> AsyncIterator[Client]:
    async with Client(server.address) as client:
        yield client


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory("expbuild-execution-") as directory:
        yield directory


@pytest.fixture
def start_server(scratch: Path) -> Iterator[StartServer]:
    """Start servers of a test's own; they are ended with it, and complain if they do not end well."""
    with ExitStack() as servers:

        def start(change: Callable[[Config], None]) -> ReServer:
            config = host_pool_config(scratch / "state")
            change(config)
            return servers.enter_context(ReServer(scratch / "server", config))

        yield start


@pytest.fixture
def effects() -> Iterator[SideEffects]:
    """Where actions leave marks for the test, and gates at which they wait for it."""
    with scratch_directory("expbuild-effects-") as directory:
        yield SideEffects(directory / "effects")
