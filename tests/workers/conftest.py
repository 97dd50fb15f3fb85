"""Fixtures of the worker tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.docker import DockerDaemon, busybox_image, docker_daemon
from tests.support.files import remove_tree


@pytest.fixture
def base_dir() -> Iterator[Path]:
    """A directory that every user can pass through, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="expbuild-test-"))
    path.chmod(0o711)
    yield path
    remove_tree(path)


@pytest.fixture(scope="session")
def docker() -> Iterator[DockerDaemon]:
    """A Docker daemon; skips loudly where there can be none."""
    with docker_daemon() as daemon:
        yield daemon


@pytest.fixture(scope="session")
def busybox(docker: DockerDaemon) -> str:
    """The name of an image with the usual small tools."""
    return busybox_image(docker.host)


@pytest.fixture(scope="session")
def busybox_without_path(docker: DockerDaemon, busybox: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same image without any setting, so without a PATH of its own."""
    name = f"{busybox.partition(':')[0]}-bare:{busybox.partition(':')[2]}"
    archive = tmp_path_factory.mktemp("image") / "root.tar"
    container = docker.run("create", busybox).strip()
    try:
        docker.run("export", "--output", str(archive), container)
        docker.run("import", str(archive), name)
    finally:
        docker.run("rm", container)
    return name
