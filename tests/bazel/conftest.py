"""A server and a first build through it, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.bazel.client import Bazel, BazelResult, remote_flags
from tests.bazel.workspace import ALL_TARGETS, write_workspace
from tests.support.files import scratch_directory
from tests.support.require import require_tool
from tests.support.server import ReServer, host_server

NewBazel = Callable[[], Bazel]
"""Makes a Bazel on a freshly written workspace, with an empty output base."""


@pytest.fixture(scope="module", params=[(), ("--remote_download_minimal",)], ids=["download-all", "download-minimal"])
def download_flags(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """What Bazel fetches of the outputs. Every test and the first build run once with each."""
    flags: tuple[str, ...] = request.param
    return flags


@pytest.fixture(scope="module")
def scratch(download_flags: tuple[str, ...]) -> Iterator[Path]:
    with scratch_directory("expbuild-bazel-") as path:
        yield path


@pytest.fixture(scope="module")
def re_server(scratch: Path) -> Iterator[ReServer]:
    """A server with an empty cache and two host workers, for both cores of a small machine."""
    require_tool("bazel")
    require_tool("g++")
    with host_server(scratch / "server", workers=2) as server:
        yield server


@pytest.fixture(scope="module")
def flags(re_server: ReServer, download_flags: tuple[str, ...]) -> tuple[str, ...]:
    """The options of a remote build."""
    return (*remote_flags(re_server.address), *download_flags)


@pytest.fixture(scope="module")
def new_bazel(scratch: Path) -> Iterator[NewBazel]:
    numbers = count()
    made: list[Bazel] = []

    def make() -> Bazel:
        directory = scratch / f"bazel-{next(numbers)}"
        made.append(Bazel(write_workspace(directory / "source"), directory / "output"))
        return made[-1]

    yield make
    for bazel in made:
        bazel.close()


@pytest.fixture(scope="module")
def first_build(new_bazel: NewBazel, flags: tuple[str, ...]) -> tuple[Bazel, BazelResult]:
    """A build of everything, with nothing cached anywhere. The test that comes first pays for it."""
    bazel = new_bazel()
    return bazel, bazel.build(*flags, ALL_TARGETS).check()
