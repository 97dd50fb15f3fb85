"""A server for the fakes of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.files import scratch_directory
from tests.support.server import ReServer, host_server


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with scratch_directory("expbuild-clients-") as path:
        yield path


@pytest.fixture(scope="module")
def re_server(scratch: Path) -> Iterator[ReServer]:
    with host_server(scratch / "server") as server:
        yield server
