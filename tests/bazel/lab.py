"""One server and any number of Bazels of one release, all of it in one directory."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from tests.bazel.client import Bazel, BazelResult, remote_flags
from tests.bazel.releases import Release
from tests.bazel.workspace import BINARY, write_workspace
from tests.support.clients import ServerCommand
from tests.support.files import scratch_directory
from tests.support.server import ReServer, host_pool_config


class Lab:
    """What `lab` yields."""

    def __init__(self, release: Release, server: ReServer, directory: Path) -> None:
        self.release = release
        self.server = server
        self._directory = directory
        self._numbers = count()
        self._bazels: list[Bazel] = []

    @property
    def flags(self) -> tuple[str, ...]:
        """The options of a build that is remote or fails."""
        return remote_flags(self.server.address)

    @property
    def cas(self) -> Path:
        """The directory of the server's blobs."""
        return self._directory / "server" / "state" / "cas"

    def new_bazel(self, *, libraries: int = 40, startup_options: Sequence[str] = (), batch: bool = True) -> Bazel:
        """Return a Bazel on a freshly written workspace, with an empty output base."""
        directory = self._directory / f"bazel-{next(self._numbers)}"
        workspace = write_workspace(directory / "source", libraries=libraries)
        output = directory / "output"
        bazel = Bazel(workspace, output, release=self.release, startup_options=startup_options, batch=batch)
        self._bazels.append(bazel)
        return bazel

    def new_file(self, name: str) -> Path:
        """Return the path of a file that nobody else uses."""
        return self._directory / f"{next(self._numbers)}-{name}"

    def output_of_binary(self, bazel: Bazel) -> str:
        """Run the binary it built, where it was built."""
        argv = [str(bazel.bin / BINARY)]
        if self.release.root is not None:
            return self.release.root.output(argv)
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout

    def completed_rpcs(self, method: str) -> int:
        """How many calls of `Service/Method` the server has logged as finished, whatever came of them."""
        return sum(str(line["rpc"]).endswith(method) for line in self.server.events("rpc.completed"))

    def close(self) -> None:
        for bazel in self._bazels:
            bazel.close()


@contextmanager
def lab(release: Release, *, digest_functions: Sequence[str] = ("SHA256",)) -> Iterator[Lab]:
    """Run a server with an empty cache where the release runs, and end it and every Bazel afterwards."""
    with scratch_directory("expbuild-bazel-") as directory:
        where = ServerCommand() if release.root is None else release.root.install_expbuild(directory / "expbuild")
        config = host_pool_config(directory / "server" / "state", workers=2)
        config["execution"]["pool"]["workers"][0]["isolation"] = "auto"  # as in a server that nobody has configured
        config["capabilities"] = {"digest_functions": list(digest_functions)}
        with ReServer(directory / "server", config, python=where.python, env=where.env) as server:
            made = Lab(release, server, directory)
            try:
                yield made
            finally:
                made.close()


def without_internal(result: BazelResult) -> dict[str, int]:
    """The summary without what Bazel does itself (symlinks, written files): how many depends on its version."""
    return {kind: number for kind, number in result.processes.items() if kind != "internal"}
