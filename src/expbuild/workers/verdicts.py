"""How a command ended, in plain words for people. Clients show them beside the result; none is ever compared."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from expbuild.workers.base import Run

_FULL_BYTES = 1 << 20


def timed_out(run: Run) -> str:
    """Say after how long, and for how long it had been silent; called right after the end."""
    silence = _silence(run)
    return f"timed out after {run.timeout_s:g} s{f'; {silence}' if silence else ''}"


def out_of_memory(limit_bytes: int, peak_bytes: int | None = None) -> str:
    """Say what was used and what was allowed."""
    peak = "" if peak_bytes is None else f"; it had used {human_bytes(peak_bytes)}"
    return f"out of memory: a process was killed at the memory limit of {human_bytes(limit_bytes)} (memory_limit){peak}"


def killed_by(number: int, *, file_bytes: int | None = None) -> str:
    """Name the signal; file_bytes: the largest file that was allowed."""
    text = f"killed by signal {number} ({signal_name(number)})"
    if number == signal.SIGXFSZ and file_bytes is not None:
        return f"{text}: it wrote a file larger than {human_bytes(file_bytes)} (max_output_bytes)"
    return text


def too_much_output(stream: str, limit_bytes: int, *, exit_code: int) -> str:
    """Say which of stdout and stderr it was; who does not end by itself in time is killed for it."""
    end = ", and the command was killed" if exit_code else ""
    return f"more than {human_bytes(limit_bytes)} written to {stream} (max_log_bytes): the rest was cut{end}"


def disk_full(directory: Path) -> str:
    """Say that the disk is full, when it is; "" otherwise. For commands that failed. Blocks, but not for long."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return ""
    if found.f_bavail * found.f_frsize < _FULL_BYTES:
        return "the disk of the worker's directories is full"
    if found.f_files and not found.f_favail:
        return "the file system of the worker's directories has no inode left"
    return ""


def signal_name(number: int) -> str:
    """Return SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def human_bytes(size_bytes: int) -> str:
    """Return a size as people say it: exact below a KiB, else to one decimal."""
    size = float(size_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f}".removesuffix(".0") + f" {unit}"
        size /= 1024
    return f"{size:.1f}".removesuffix(".0") + " TiB"


def _silence(run: Run) -> str:
    """Say for how long nothing had been written to stdout and stderr."""
    try:
        written = [found.st_mtime for path in (run.stdout, run.stderr) if (found := path.stat()).st_size]
    except OSError:
        return ""
    if not written:
        return "it wrote nothing to stdout or stderr"
    silent_s = min(max(0.0, time.time() - max(written)), run.timeout_s or 0.0)
    return f"silent for the last {silent_s:.3g} s" if silent_s >= 1 else "it was still writing output"
