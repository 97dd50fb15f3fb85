"""`re-server` as a service: what it tells the service manager, how fast it starts, and the unit we ship."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from expbuild.config import ServerConfig
from expbuild.sd_notify import ServiceManager
from tests.support.files import scratch_directory
from tests.support.require import require_tool
from tests.support.server import ReServer, host_pool_config, patience

UNIT = Path(__file__).parents[1] / "packaging" / "expbuild.service"
PATIENCE_S = patience(60)
START_BOUND_S = 20
"""The goal is 2 s; a machine that does five other things at a time may take longer."""


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory("expbuild-service-") as directory:
        yield directory


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A service manager's socket, not bound yet."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        yield listener


def _next(listener: socket.socket) -> list[str]:
    """Return the lines of the next message. Raises AssertionError when none comes."""
    listener.settimeout(PATIENCE_S)
    try:
        return listener.recv(4096).decode().split("\n")
    except TimeoutError:
        raise AssertionError("no message to the service manager") from None


def _until(listener: socket.socket, assignment: str) -> list[str]:
    """Return the first message with this assignment."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if assignment in (message := _next(listener)):
            return message
    raise AssertionError(f"no {assignment} to the service manager")


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_the_service_manager_hears_of_start_life_and_end(
    scratch: Path, listener: socket.socket, abstract: bool
) -> None:
    """READY with the address once it listens, WATCHDOG again and again, STOPPING at SIGTERM."""
    name = f"@expbuild-test-{secrets.token_hex(8)}" if abstract else str(scratch / "notify")
    listener.bind(name.replace("@", "\0"))
    env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "300000"}
    with ReServer(scratch / "server", host_pool_config(scratch / "state"), env=env) as server:
        assert _next(listener) == ["READY=1", f"STATUS=Serving on {server.address}"]
        for _ in range(3):
            assert _next(listener) == ["WATCHDOG=1"]
        server.terminate()
        assert _until(listener, "STOPPING=1") == ["STOPPING=1", "STATUS=Stopping"]


def test_a_service_manager_that_is_gone_is_no_reason_to_fail(scratch: Path) -> None:
    """The server serves, and its log says whom it could not reach."""
    env = {"NOTIFY_SOCKET": str(scratch / "nobody")}
    with ReServer(scratch / "server", host_pool_config(scratch / "state"), env=env) as server:
        server.terminate()
        assert server.events("service_manager.unreachable")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, None, id="nobody-asks"),
        pytest.param({"WATCHDOG_USEC": "1000000"}, None, id="no-socket"),
        pytest.param({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1500000"}, 1.5, id="watched"),
        pytest.param({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None, id="another"),
        pytest.param({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, None, id="nonsense"),
    ],
)
def test_the_watchdog_is_fed_only_when_it_is_ours(environment: dict[str, str], expected: float | None) -> None:
    assert ServiceManager(environment).watchdog_s == expected


def test_it_listens_soon_after_it_was_started(scratch: Path) -> None:
    """So that clients that retry for a few seconds outlive a restart."""
    started = time.monotonic()
    with ReServer(scratch / "server", host_pool_config(scratch / "state")):
        assert time.monotonic() - started < START_BOUND_S


def test_systemd_accepts_the_unit(scratch: Path) -> None:
    """No warning, no error, but for the program, which is not installed where the unit says."""
    unit = scratch / "expbuild.service"
    nothing = f"ExecStart={require_tool('true')}"
    text, count = re.subn(r"(?m)^ExecStart=\S+", nothing, UNIT.read_text())
    assert count == 1
    unit.write_text(text)
    command = [require_tool("systemd-analyze"), "verify", "--man=no", str(unit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    complaints = [line for line in (result.stdout + result.stderr).splitlines() if unit.name in line]
    assert (result.returncode, complaints) == (0, [])


def test_the_unit_waits_longer_than_a_drain_and_takes_no_rights_away() -> None:
    """What makes a service kill its actions early, or breaks how actions are run, is not in the unit."""
    settings = dict(
        line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")
    )
    assert float(settings["TimeoutStopSec"]) > ServerConfig().drain_timeout_seconds + 10
    expected = {"Type": "notify", "NotifyAccess": "main", "KillMode": "mixed", "Delegate": "yes"}
    assert expected.items() <= settings.items()
    assert (settings["StateDirectory"], settings["Restart"]) == ("expbuild", "on-failure")
    assert not settings.keys() & {"User", "Group", "DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectSystem"}
