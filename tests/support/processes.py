"""Looking at processes through /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """One line of /proc/PID/stat. `pid` and `start_ticks` together name a process even after the pid is reused."""

    pid: int
    parent: int
    state: str
    start_ticks: int
    own_cpu_s: float
    reaped_cpu_s: float
    """CPU time of its children that have ended and that it has waited for, and of theirs."""

    def is_alive(self) -> bool:
        now = read_stat(self.pid)
        return now is not None and now.start_ticks == self.start_ticks and now.state not in "ZX"


def read_stat(pid: int) -> ProcessStat | None:
    """Return what the kernel says about a process; None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may itself hold spaces and parentheses; what follows the last one is numbers.
    fields = text[text.rindex(")") + 2 :].split()
    user, system, reaped_user, reaped_system = (int(f) / _TICKS_PER_SECOND for f in fields[11:15])
    return ProcessStat(pid, int(fields[1]), fields[0], int(fields[19]), user + system, reaped_user + reaped_system)


def process_tree(pid: int) -> list[ProcessStat]:
    """Return the process and all that descend from it, parents first. Empty when it is gone."""
    children: dict[int, list[ProcessStat]] = {}
    root = read_stat(pid)
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := read_stat(int(name))) is not None:
            children.setdefault(found.parent, []).append(found)
    tree = [] if root is None else [root]
    for process in tree:  # grows while we walk it
        tree.extend(children.get(process.pid, ()))
    return tree
