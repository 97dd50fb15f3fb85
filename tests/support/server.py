"""The real `re-server` as a process of its own, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.processes import ProcessStat, process_tree, read_stat

Config = dict[str, Any]
"""A configuration as the TOML file has it: tables are dicts, arrays of tables lists of dicts."""

TRANSPORT = os.environ.get("EXPBUILD_TEST_TRANSPORT")
"""The `server.transport` of every server whose configuration names none: a whole suite runs on the one or the other."""

HOLLOW = os.environ.get("EXPBUILD_TEST_HOLLOW")
"""The address of a server that answers OK and nothing to everything: all tests then talk to that one, and none may
pass (tests/conformance/test_hollow.py)."""

_POLL_S = 0.02
_LOG_TAIL_CHARS = 20_000


def host_pool_config(root: Path, *, workers: int = 2) -> Config:
    """Return a configuration with file system storage and host workers, all of whose state is below `root`.

    Actions see this machine's files, as tests need them to: a user per slot as root, else our own user.
    A fresh dict each time, to be changed at will before it is handed to `ReServer`.
    """
    return {
        "server": {"address": "127.0.0.1:0"},
        "storage": {
            "cas": {"backend": "filesystem", "root_dir": str(root / "cas")},
            "action_cache": {"backend": "filesystem", "root_dir": str(root / "action-cache")},
        },
        "execution": {
            "backend": "pool",
            "pool": {
                "workers": [
                    {
                        "type": "host",
                        "count": workers,
                        "work_dir": str(root / "work"),
                        "isolation": "uid" if os.geteuid() == 0 else "none",
                    }
                ]
            },
        },
    }


def to_toml(config: Config) -> str:
    """Return the configuration as TOML text, every table inside the top-level ones written inline."""
    return "".join(
        f"[{name}]\n" + "".join(f"{_toml_key(key)} = {_toml_value(value)}\n" for key, value in table.items()) + "\n"
        for name, table in config.items()
    )


class ReServer:
    """A running server, started from a configuration and ended with the context.

    `directory` takes the configuration file and the log; a second server on it appends to the log of the first.
    `python` is the command that is given `-m expbuild`, for one that lives in another root.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        *,
        args: Sequence[str] = (),
        python: Sequence[str] = (sys.executable,),
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 30,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # Tests end servers amid actions, and have no minute for each. Those about the drain say how long it may take.
        config = {**config, "server": {"drain_timeout_seconds": 0, **config.get("server", {})}}
        if TRANSPORT is not None:
            config = {**config, "server": {"transport": TRANSPORT, **config.get("server", {})}}
        self._config_file = directory / "expbuild.toml"
        self._config_file.write_text(to_toml(config))
        self.config = config
        self._log_file = directory / "re-server.log"
        self._args = tuple(args)
        self._python = tuple(python)
        self._env = {**os.environ, **(env or {})}
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._address: str | None = None

    @property
    def address(self) -> str:
        """Where it listens, as `HOST:PORT`."""
        assert self._address is not None, "the server was never started"
        return self._address

    @property
    def config_file(self) -> Path:
        """What it is started with."""
        return self._config_file

    @property
    def pid(self) -> int:
        return os.getpid() if HOLLOW else self._running().pid

    def start(self) -> Self:
        """Start the server and return when it listens. Raises AssertionError with its log when it does not."""
        assert self._process is None, "the server runs already"
        if HOLLOW:
            self._address = HOLLOW
            return self
        with self._log_file.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [*self._python, "-m", "expbuild", "--config", str(self._config_file), *self._args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )
        try:
            self._address = self._wait_for_address()
        except BaseException:
            self.kill()
            raise
        return self

    def log_text(self) -> str:
        """Return all it has said since it was last started."""
        if HOLLOW:
            return ""
        with self._log_file.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def log_lines(self) -> list[dict[str, Any]]:
        """Return its log as parsed JSON, oldest first, without what is no JSON object (a half-written line)."""
        lines: list[dict[str, Any]] = []
        for line in self.log_text().splitlines():
            with contextlib.suppress(ValueError):
                parsed = json.loads(line)
                if isinstance(parsed, dict):
                    lines.append(parsed)
        return lines

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        return [line for line in self.log_lines() if line.get("event") == name]

    def cpu_seconds(self) -> float:
        """Return the CPU time of the server and everything it has started, actions included."""
        return sum(process.own_cpu_s + process.reaped_cpu_s for process in process_tree(self.pid))

    def own_cpu_seconds(self) -> float:
        """Return the CPU time of the processes that live now: while no action runs, that is the server itself.

        Helpers that have ended are not in it.
        """
        return sum(process.own_cpu_s for process in process_tree(self.pid))

    def terminate(self, *, timeout_s: float = 30, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end with a signal. Raises AssertionError unless it ends with exit code 0 and leaves no process."""
        if HOLLOW:
            return
        process, started = self._running(), self._descendants()
        process.send_signal(number)
        try:
            exit_code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"still running {timeout_s} s after {number.name}; its log:\n{self._log_tail()}"
            ) from None
        self._process = None
        survivors = _wait_until_gone(started)
        _kill(survivors)
        assert exit_code == 0, f"ended with {exit_code} after {number.name}; its log:\n{self._log_tail()}"
        assert not survivors, f"processes outlived the server: {survivors}; its log:\n{self._log_tail()}"

    def kill(self) -> None:
        """End it and all it started with SIGKILL; nothing happens when it does not run."""
        if self._process is None:
            return
        descendants = self._descendants()
        self._process.kill()
        self._process.wait()
        self._process = None
        _kill(descendants)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:  # the test has ended it itself
            return
        if kind is not None:  # what went wrong is known; a second complaint would hide it
            self.kill()
        else:
            self.terminate()

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server does not run"
        return self._process

    def _descendants(self) -> list[ProcessStat]:
        pid = self._running().pid
        return [process for process in process_tree(pid) if process.pid != pid]

    def _wait_for_address(self) -> str:
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            exit_code = self._running().poll()
            for line in self.events("server.listening"):
                return str(line["address"])
            if exit_code is not None:
                raise AssertionError(f"ended with {exit_code} before it listened; its log:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not listening after {self._start_timeout_s} s; its log:\n{self._log_tail()}")
            time.sleep(_POLL_S)

    def _log_tail(self) -> str:
        return self.log_text()[-_LOG_TAIL_CHARS:] or "(empty)"


def patience(timeout_s: float) -> float:
    """Return how long to wait for something: hardly at all, when no test is expected to pass."""
    return min(timeout_s, 0.5) if HOLLOW else timeout_s


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Return as soon as `condition` holds. Raises AssertionError naming `what` when it does not in time."""
    deadline = time.monotonic() + patience(timeout_s)
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(_POLL_S)


@contextlib.contextmanager
def host_server(directory: Path, *, workers: int = 2) -> Iterator[ReServer]:
    """Run a server with host workers whose configuration, log and state are all below `directory`."""
    with ReServer(directory, host_pool_config(directory / "state", workers=workers)) as server:
        yield server


def _wait_until_gone(processes: Sequence[ProcessStat], timeout_s: float = 5) -> list[ProcessStat]:
    """Return those that are still there after `timeout_s`."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not any(p.is_alive() for p in processes), timeout_s=timeout_s, what="gone")
    return [process for process in processes if process.is_alive()]


def _kill(processes: Sequence[ProcessStat]) -> None:
    for process in processes:
        now = read_stat(process.pid)
        if now is not None and now.start_ticks == process.start_ticks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _toml_key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "a").replace("-", "a").isalnum() else _toml_value(key)


def _toml_value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return "[" + ", ".join(_toml_value(item) for item in value) + "]"
        case dict():
            return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
        case _:
            raise TypeError(f"not a TOML value: {value!r}")
