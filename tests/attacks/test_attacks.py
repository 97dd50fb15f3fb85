"""Every attack of the threat tables T, C and R, on a server of each level; docs/security.md is the table of it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

import pytest

from tests.attacks import table
from tests.attacks.arena import SLOTS, arena, poison_files, processes_of
from tests.attacks.attack import LEVELS, Level
from tests.attacks.kit import ATTACKS, run_all
from tests.support.actions import eventually


def _inodes(state: Path) -> dict[Path, tuple[int, ...]]:
    """Return what can be seen of the files attacked."""
    found: dict[Path, tuple[int, ...]] = {}
    for path in poison_files(state):
        status = path.stat()
        found[path] = (status.st_mode, status.st_mtime_ns, status.st_uid, status.st_gid, status.st_ino)
    return found


def _damaged(cas: Path) -> list[str]:
    """Return the blobs that are not what their name says, or have special bits."""
    wrong = []
    for path in cas.rglob("*"):
        digest = re.search(r"[0-9a-f]{64}", path.name)
        if path.is_file() and digest is not None:
            is_special = path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX | 0o222)
            if is_special or hashlib.sha256(path.read_bytes()).hexdigest() != digest[0]:
                wrong.append(str(path))
    return wrong


@pytest.mark.parametrize("level", LEVELS)
async def test_nothing_succeeds_but_what_the_level_admits(level: Level) -> None:
    """What is admitted is written beside each attack; neither more nor less succeeds, and nothing is left."""
    async with arena(level) as (target, server):
        before = _inodes(target.state)
        assert len(before) == (1 if level == "user" else 2)  # where inputs are copies, no second form is stored
        ended = await run_all(target)
        admitted = {attack.id for attack in ATTACKS if level in attack.admitted}
        otherwise = [f"{key}: {end.outcome}" for key, end in ended.items() if end.succeeded != (key in admitted)]
        assert not otherwise, "\n".join(otherwise)
        assert len(ended) == len(ATTACKS)
        assert _inodes(target.state) == before
        assert _damaged(target.state / "cas") == []
        work = target.state / "work"
        await eventually(
            lambda: not any(os.listdir(work / f"host-{n}") for n in (0, 1)), "no workspace is left", timeout_s=60
        )
        if level != "user":
            await eventually(lambda: not processes_of(SLOTS), "no process of a slot is left")
        assert server.events("internal_error") == []


def test_there_are_over_a_hundred_attacks_each_once() -> None:
    """And every row that has a payload is in the table."""
    assert len({attack.id for attack in ATTACKS}) == len(ATTACKS) > 100


def test_the_table_in_the_documentation_is_current() -> None:
    """`python -m tests.attacks.table` writes it."""
    assert table.DOCUMENT.read_text() == table.updated(table.DOCUMENT.read_text())
