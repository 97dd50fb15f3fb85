"""Every call that changes the disk, of an upload, a cache write and an eviction, fails once, or is where the end comes.

strace makes the N-th call fail (EIO, ENOSPC) or kills the process at it, for every N there is. Whatever happens, the
store holds afterwards what it held, or the new entry whole; nothing acknowledged is gone, and the step works again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expbuild.digest import DigestFunction
from expbuild.errors import BlobNotFound
from expbuild.reapi import ActionResult
from expbuild.storage.base import read_blob, write_blob
from tests.reliability.faulty import ACKNOWLEDGED, FAILED, KEY, LARGE, OLD, SMALL, do, open_stores
from tests.support.require import require_tool
from tests.support.server import wait_until

SHA256 = DigestFunction.SHA256

_CALLS = ("write", "fsync", "linkat", "renameat", "fchmod", "utimensat", "unlinkat", "mkdirat")
"""What changes a disk, as Python calls it."""

_KILL = "signal=KILL"


class Stepper:
    """The process that does the steps, and strace on each of its children."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.faulty"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def step(self, root: Path, step: str, *injection: str) -> int:
        """Do a step with a fault; returns its exit code, negative for a signal."""
        pid = int(self._ask(f"{root} {step}"))
        tracer = None
        if injection:
            options = [option for what in injection for option in ("-e", what)]
            command = [require_tool("strace"), "-f", "-qq", "-o", "/dev/null", *options, "-p", str(pid)]
            tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            wait_until(lambda: _is_traced(pid), timeout_s=60, what="strace is attached")
        os.kill(pid, signal.SIGCONT)
        code = int(self._ask("wait"))
        if tracer is not None:
            tracer.wait(timeout=60)
        return code

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


@pytest.fixture(scope="module")
def stepper() -> Iterator[Stepper]:
    require_tool("strace")
    stepper = Stepper()
    yield stepper
    stepper.close()


async def prepare(root: Path) -> None:
    """Make a store that holds a blob and a result."""
    with ThreadPoolExecutor(1) as executor:
        blobs, cache = open_stores(root, executor)
        await write_blob(blobs, SHA256.digest_of(OLD), OLD)
        await cache.put(KEY, ActionResult(exit_code=1))
        os.utime(root / "cas" / _path(OLD), ns=(10**9, (root / "cas" / _path(OLD)).stat().st_mtime_ns))
        blobs.root.close()
        cache.root.close()


def _path(data: bytes) -> str:
    digest = SHA256.digest_of(data)
    return f"sha256/{digest.hash[:2]}/{digest.hash}-{digest.size_bytes}"


async def check(root: Path, step: str, code: int) -> None:
    """Hold the store against what may be true after a step that ended with `code`; then do it without a fault."""
    with ThreadPoolExecutor(1) as executor:
        blobs, cache = open_stores(root, executor)
        assert not list((root / "cas" / "tmp").iterdir())
        assert not list((root / "ac" / "tmp").iterdir())
        held = {data: await _read(blobs, data) for data in (OLD, SMALL, LARGE)}
        assert all(found in (None, data) for data, found in held.items())
        if step != "evict":
            assert held[OLD] == OLD
        result = await cache.get(KEY)
        assert result is not None
        assert result.exit_code in ((1, 2) if step == "result" else (1,))
        new = {"small": SMALL, "large": LARGE}.get(step)
        if code == ACKNOWLEDGED:
            assert new is None or held[new] == new
            assert step != "result" or result.exit_code == 2
        elif code == FAILED and new is not None:
            assert held[new] is None, "what was refused is not there"
        await do(step, blobs, cache)
        assert new is None or await _read(blobs, new) == new
        blobs.root.close()
        cache.root.close()


async def _read(blobs: object, data: bytes) -> bytes | None:
    try:
        return await read_blob(blobs, SHA256.digest_of(data))  # type: ignore[arg-type]  # a blob store
    except BlobNotFound:
        return None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["error=EIO", "error=ENOSPC", _KILL])
@pytest.mark.parametrize("step", ["small", "large", "result", "evict"])
async def test_every_call_fails_once(stepper: Stepper, tmp_path: Path, step: str, fault: str) -> None:
    points = 0
    for call in _CALLS:
        for number in range(1, 50):
            root = tmp_path / f"{call}-{number}"
            root.mkdir()
            await prepare(root)
            code = stepper.step(root, step, f"trace={call}", f"inject={call}:{fault}:when={number}")
            assert code in (ACKNOWLEDGED, FAILED, -signal.SIGKILL), f"{call} number {number}"
            await check(root, step, code)
            # There is no N-th call, except where a failure is of no consequence: then there may be another.
            if code == ACKNOWLEDGED and (call != "unlinkat" or number > 1):
                break
            points += code != ACKNOWLEDGED
    assert points >= 5, "the faults have missed their target"


async def test_a_write_cut_short_fails_the_upload(stepper: Stepper, tmp_path: Path) -> None:
    await prepare(tmp_path)
    assert stepper.step(tmp_path, "short") == FAILED
    await check(tmp_path, "large", FAILED)
