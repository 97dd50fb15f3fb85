"""The same Bazel build, on this machine's own and through a fresh `re-server` on it, in alternation.

    python -m benchmarks.bazel_remote_vs_local --rounds 3

from the top of the repository; it needs Bazel 4 and g++ (`tests/install-deps`).

Each round times three builds of a generated C++ workspace, every one from an empty output base:

- local:  every action in Bazel's sandbox, which is what remote execution has to compete with;
- remote: every action through a server whose cache is empty, with Bazel's own local execution forbidden;
- cached: the same through the same server, so that every action is a cache hit.

Odd rounds begin with local, even ones with remote. What is timed is Bazel's execution phase: its server has started
and has analysed the workspace before, as it would have on a developer's machine. Server and client share the cores,
so a remote build cannot win here; the ratios say what going through the server costs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bazel.client import Bazel, BazelResult, local_flags, remote_flags
from tests.bazel.workspace import ALL_TARGETS, Workspace, action_count, write_workspace
from tests.support.files import scratch_directory
from tests.support.server import ReServer, host_pool_config


@dataclass(frozen=True, slots=True)
class Options:
    rounds: int
    libraries: int
    headers: tuple[str, ...]
    workers: int
    jobs: int


@dataclass(frozen=True, slots=True)
class LocalRun:
    wall_s: float
    strategy: str
    """What Bazel's own choice of a sandbox came to: `linux-sandbox`, or `processwrapper-sandbox` without namespaces."""


@dataclass(frozen=True, slots=True)
class RemoteRun:
    wall_s: float
    cached_wall_s: float
    server_cpu_s: float
    """Of the server itself during both builds, actions not counted."""
    total_cpu_s: float
    """The same with the actions."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    actions = action_count(options.libraries)
    print(
        f"{options.libraries} libraries, {actions} actions; {options.workers} host workers, "
        f"{os.cpu_count()} cores, --jobs={options.jobs} for remote builds"
    )
    _run_local(Options(1, 2, options.headers, options.workers, options.jobs))  # the compiler into the page cache
    print("round   local s  remote s  cached s  server CPU s  with actions s")
    local: list[LocalRun] = []
    remote: list[RemoteRun] = []
    for number in range(1, options.rounds + 1):
        if number % 2:
            local.append(_run_local(options))
            remote.append(_run_remote(options))
        else:
            remote.append(_run_remote(options))
            local.append(_run_local(options))
        here, there = local[-1], remote[-1]
        print(
            f"{number:5}  {here.wall_s:8.2f}  {there.wall_s:8.2f}  {there.cached_wall_s:8.2f}  "
            f"{there.server_cpu_s:12.2f}  {there.total_cpu_s:14.2f}",
            flush=True,
        )
    local_s = median(run.wall_s for run in local)
    server_ms = 1000 * median(run.server_cpu_s for run in remote) / actions
    print(f"local strategy: {', '.join(sorted({run.strategy for run in local}))}")
    print(f"remote/local: {median(run.wall_s for run in remote) / local_s:.2f}   (medians of {options.rounds} rounds)")
    print(f"cached/local: {median(run.cached_wall_s for run in remote) / local_s:.2f}")
    print(f"server CPU per action, run once and hit once: {server_ms:.1f} ms")
    return 0


def _run_local(options: Options) -> LocalRun:
    with scratch_directory("expbuild-benchmark-") as directory:
        result = _timed_build(_write(directory, options), directory / "bazel", local_flags(("sandboxed",)))
        kinds = set(result.processes) - {"internal"}
        if len(kinds) != 1 or not next(iter(kinds)).endswith("sandbox"):
            raise SystemExit(f"expected every action in one kind of sandbox, got {dict(result.processes)}")
        return LocalRun(result.duration_s, kinds.pop())


def _run_remote(options: Options) -> RemoteRun:
    with scratch_directory("expbuild-benchmark-") as directory:
        config = host_pool_config(directory / "state", workers=options.workers)
        with ReServer(directory / "server", config) as server:
            workspace = _write(directory, options)
            flags = remote_flags(server.address, jobs=options.jobs)
            own_before, total_before = server.own_cpu_seconds(), server.cpu_seconds()
            first = _timed_build(workspace, directory / "first", flags)
            _expect_only(first, "remote")
            second = _timed_build(workspace, directory / "second", flags)
            _expect_only(second, "remote cache hit")
            return RemoteRun(
                wall_s=first.duration_s,
                cached_wall_s=second.duration_s,
                server_cpu_s=server.own_cpu_seconds() - own_before,
                total_cpu_s=server.cpu_seconds() - total_before,
            )


def _timed_build(workspace: Workspace, directory: Path, flags: Sequence[str]) -> BazelResult:
    """Return the build from an empty output base below `directory`, loading and analysis already done."""
    with Bazel(workspace, directory, batch=False) as bazel:
        bazel.build(*flags, "--nobuild", ALL_TARGETS).check()
        return bazel.build(*flags, ALL_TARGETS, timeout_s=3600).check()


def _write(directory: Path, options: Options) -> Workspace:
    return write_workspace(directory / "source", libraries=options.libraries, headers=options.headers)


def _expect_only(result: BazelResult, kind: str) -> None:
    if set(result.processes) - {"internal"} != {kind}:
        raise SystemExit(f"expected every action as '{kind}', got {dict(result.processes)}")


def _parse(argv: Sequence[str] | None) -> Options:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bazel_remote_vs_local",
        description="Time the same Bazel build locally, remotely and from the cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=_positive, default=3, help="how often each build is timed")
    parser.add_argument("--libraries", type=_positive, default=40, help="libraries of three actions each; at least 2")
    parser.add_argument(
        "--headers",
        default="algorithm,map,memory,string,vector",
        help="standard headers each source file includes: more of them make heavier compilations",
    )
    parser.add_argument("--workers", type=_positive, default=cores, help="host workers of the server")
    parser.add_argument("--jobs", type=_positive, default=16, help="actions Bazel has in flight remotely")
    given = parser.parse_args(argv)
    if given.libraries < 2:
        parser.error("--libraries: at least 2")
    headers = tuple(header for header in given.headers.split(",") if header)
    return Options(given.rounds, given.libraries, headers, given.workers, given.jobs)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a positive integer")
    return value


if __name__ == "__main__":
    sys.exit(main())
