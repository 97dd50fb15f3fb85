"""Running Bazel so that neither the machine's configuration nor an earlier run can change the outcome."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bazel.releases import Release, debian_release
from tests.bazel.workspace import Workspace

_SUMMARY = re.compile(r"^INFO: (\d+) process(?:es)?(?:: (.*))?\.$", re.MULTILINE)
_ELAPSED = re.compile(r"^INFO: Elapsed time: ([\d.]+)s", re.MULTILINE)
_TEST_STATUS = re.compile(r"^(//\S+)\s+(?:\(cached\) )?([A-Z][A-Z ]*[A-Z])\b(?: in | *$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class BazelResult:
    """What one Bazel command did. Bazel's own messages are all in `stderr`."""

    exit_code: int
    stdout: str
    stderr: str
    duration_s: float
    """Wall time of the whole command, the start of its JVM included."""
    elapsed_s: float | None = field(init=False)
    """Bazel's own figure, without the start of its JVM; None when it did not get so far."""
    processes: Mapping[str, int] = field(init=False)
    """The summary line as counts: `{"remote cache hit": 3, "internal": 5, "remote": 49}`; empty when there is none."""
    tests: Mapping[str, str] = field(init=False)
    """Test target → `PASSED`, `FAILED`, `TIMEOUT`, `NO STATUS`, …"""

    def __post_init__(self) -> None:
        elapsed = _ELAPSED.search(self.stderr)
        object.__setattr__(self, "elapsed_s", float(elapsed[1]) if elapsed else None)
        object.__setattr__(self, "processes", _parse_summary(self.stderr))
        object.__setattr__(self, "tests", dict(_TEST_STATUS.findall(self.stdout + self.stderr)))

    def check(self) -> Self:
        """Return self; raise AssertionError with all Bazel said when it did not succeed."""
        if self.exit_code != 0:
            raise AssertionError(f"bazel ended with {self.exit_code}\n{self.stdout}\n{self.stderr}")
        return self


class Bazel:
    """One output base, used by one command after the other.

    `directory` takes everything Bazel writes and need not exist; a new directory is an empty output base.
    With `batch` every command is one JVM, our direct child. Otherwise a Bazel server lives from the first command to
    `close`, and at most a minute longer should that never be called. `release` is by default the one on PATH.
    """

    def __init__(
        self,
        workspace: Workspace,
        directory: Path,
        *,
        release: Release | None = None,
        startup_options: Sequence[str] = (),
        batch: bool = True,
        heap_mb: int = 1024,
    ) -> None:
        self.workspace = workspace
        self._release = debian_release() if release is None else release
        self._extra_startup_options = tuple(startup_options)
        self._directory = directory
        self._output_base = directory / "base"
        self._batch = batch
        self._heap_mb = heap_mb
        (directory / "home").mkdir(parents=True, exist_ok=True)
        # Refuses every download before a connection is tried: what needs one fails at once and by name.
        self._no_downloads = directory / "no-downloads.cfg"
        self._no_downloads.write_text("block *\n")

    @property
    def bin(self) -> Path:
        """Where the outputs of the last build are."""
        return self._directory / "bazel-bin"

    def build(self, *args: str, timeout_s: float = 300) -> BazelResult:
        return self.run("build", *args, timeout_s=timeout_s)

    def test(self, *args: str, timeout_s: float = 300) -> BazelResult:
        return self.run("test", *args, timeout_s=timeout_s)

    def run(self, command: str, *args: str, timeout_s: float = 300) -> BazelResult:
        """Run one Bazel command with `args` after the options that every command of ours has.

        Raises TimeoutError with what Bazel said so far, after killing it.
        """
        argv = [*self._release.command, *self._startup_options(), command]
        if command in ("build", "test"):
            argv += self._build_options()
        argv += args
        started = time.monotonic()
        process = subprocess.Popen(
            argv,
            cwd=self.workspace.root,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self._kill_server()
            stdout, stderr = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"bazel {command} took more than {timeout_s} s\n{stdout}\n{stderr}") from error
            raise
        return BazelResult(process.returncode, stdout, stderr, time.monotonic() - started)

    def close(self) -> None:
        """End the Bazel server if there is one."""
        if self._server_pid() is None:
            return
        try:
            self.run("shutdown", timeout_s=30)
        finally:
            self._kill_server()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _environment(self) -> dict[str, str]:
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self._directory / "home"), "LC_ALL": "C.UTF-8"}
        if not self._release.blocks_downloads:
            environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
        return environment

    def _startup_options(self) -> list[str]:
        return [
            f"--output_base={self._output_base}",
            f"--output_user_root={self._directory / 'user-root'}",
            "--nosystem_rc",
            "--nohome_rc",
            "--noworkspace_rc",
            f"--host_jvm_args=-Xmx{self._heap_mb}m",
            "--host_jvm_args=-XX:+UseParallelGC",
            # Most of these JVMs live for seconds: what the optimising compiler would win, it would also cost.
            "--host_jvm_args=-XX:TieredStopAtLevel=1",
            "--max_idle_secs=60",
            "--batch" if self._batch else "--nobatch",
            *self._release.startup_options,
            *self._extra_startup_options,
        ]

    def _build_options(self) -> list[str]:
        repositories = {**self.workspace.repositories, **self._release.repositories}
        return [
            *self._release.build_options,
            *(f"--override_repository={name}={path}" for name, path in repositories.items()),
            *([f"--experimental_downloader_config={self._no_downloads}"] if self._release.blocks_downloads else []),
            "--incompatible_strict_action_env",
            # Outside the workspace, where `//...` would take another output base's tree for packages.
            f"--symlink_prefix={self._directory / 'bazel-'}",
            "--color=no",
            "--curses=no",
            "--noshow_progress",
        ]

    def _server_pid(self) -> int | None:
        """The pid of a living Bazel server of this output base."""
        try:
            pid = int((self._output_base / "server" / "server.pid.txt").read_text())
            cmdline = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self._output_base) in cmdline else None

    def _kill_server(self) -> None:
        pid = self._server_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def remote_flags(address: str, *, jobs: int = 16) -> tuple[str, ...]:
    """The options that make Bazel run every action on the server at `address`, and never on this machine.

    With the executor alone an action that cannot run remotely would quietly run here: Bazel's default is a list of
    strategies. A list of one makes that an error, and `--noremote_local_fallback` does it for remote failures.
    """
    return (
        f"--remote_executor=grpc://{address}",
        "--spawn_strategy=remote",
        "--genrule_strategy=remote",
        "--noremote_local_fallback",
        "--remote_timeout=60",
        "--remote_retries=2",
        f"--jobs={jobs}",
    )


def local_flags(strategies: Sequence[str] = ("linux-sandbox",)) -> tuple[str, ...]:
    """The options that make Bazel run every action here by the first of `strategies` that is able to."""
    joined = ",".join(strategies)
    return (f"--spawn_strategy={joined}", f"--genrule_strategy={joined}")


def _parse_summary(output: str) -> dict[str, int]:
    lines = _SUMMARY.findall(output)
    if not lines or not lines[-1][1]:
        return {}
    parts = (part.split(" ", 1) for part in lines[-1][1].split(", "))
    return {kind: int(count) for count, kind in parts}
