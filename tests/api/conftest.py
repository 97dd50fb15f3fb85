"""Real servers on free ports, one of each kind for the whole run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio
from hypothesis import settings

from expbuild.digest import DigestFunction
from tests.api.client import Client
from tests.support.files import scratch_directory
from tests.support.server import Config, ReServer

# No limit of time for one example: machines that run tests are busy.
settings.register_profile("expbuild", deadline=None)
settings.load_profile("expbuild")


class StartServer(Protocol):
    def __call__(self, name: str, *, backend: str = "filesystem", **tables: Any) -> ReServer: ...


def cache_config(root: Path, backend: str = "filesystem", **tables: dict[str, Any]) -> Config:
    """Return the configuration of a cache, with a host worker for `exec_enabled`.

    `tables` add keys to its tables `server` and `capabilities`, or are the whole of others.
    """

    def store(name: str) -> dict[str, str]:
        return {"backend": backend} | ({"root_dir": str(root / name)} if backend == "filesystem" else {})

    others = {name: table for name, table in tables.items() if name not in ("server", "capabilities")}
    return {
        **others,
        "server": {"address": "127.0.0.1:0", **tables.get("server", {})},
        "storage": {"cas": store("cas"), "action_cache": store("action-cache")},
        "execution": {"pool": {"workers": [{"type": "host", "count": 1, "work_dir": str(root / "work")}]}},
        "capabilities": {"exec_enabled": False, **tables.get("capabilities", {})},
    }


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    with scratch_directory("expbuild-api-") as path:
        yield path


@pytest.fixture(scope="session")
def start_server(scratch: Path) -> Iterator[StartServer]:
    """Starts a server for the rest of the session, or returns the one that was started under this name."""
    running: dict[str, ReServer] = {}
    with ExitStack() as servers:

        def start(name: str, *, backend: str = "filesystem", **tables: Any) -> ReServer:
            if name not in running:
                config = cache_config(scratch / name / "state", backend, **tables)
                running[name] = servers.enter_context(ReServer(scratch / name, config))
            return running[name]

        yield start


@pytest.fixture(scope="session", params=["filesystem", "memory"])
def server(request: pytest.FixtureRequest, start_server: StartServer) -> ReServer:
    """A cache that accepts SHA256 and BLAKE3, with each kind of storage."""
    backend: str = request.param
    return start_server(f"mixed-{backend}", backend=backend, capabilities={"digest_functions": ["SHA256", "BLAKE3"]})


@pytest.fixture
def function(server: ReServer, request: pytest.FixtureRequest) -> DigestFunction:
    """The digest function of `client`: another one for each kind of storage, which does not care."""
    backend: str = request.node.callspec.params["server"]
    return {"filesystem": DigestFunction.SHA256, "memory": DigestFunction.BLAKE3}[backend]


@pytest_asyncio.fixture
async def client(server: ReServer, function: DigestFunction) -> AsyncIterator[Client]:
    """A client of `server` in the default instance."""
    client = Client(server.address, function)
    yield client
    await client.close()


@pytest_asyncio.fixture
async def sha256_client(server: ReServer) -> AsyncIterator[Client]:
    """A client of `server` for what has nothing to do with digest functions."""
    client = Client(server.address)
    yield client
    await client.close()
