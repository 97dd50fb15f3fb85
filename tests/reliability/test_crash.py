"""Kills and power cuts at random moments: what was promised is there and right, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.crash import Report, run
from tests.support.files import scratch_directory
from tests.support.require import only_in_full_runs


async def _run(kills: int, seed: int, durability: str) -> Report:
    with scratch_directory("expbuild-crash-") as directory:
        report = await run(Path(directory), kills, seed, durability)
    assert report.is_clean, f"{report}\n{report.history.faults}"
    assert report.kills == kills
    return report


@pytest.mark.timeout(900)
async def test_fifty_kills_lose_and_corrupt_nothing() -> None:
    report = await _run(50, 1, "none")
    assert report.kills_inside_a_write >= 40, f"most kills should land inside something: {report}"
    assert report.history.blobs
    assert report.history.actions


@only_in_full_runs
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("durability", ["ordered", "strict"])
async def test_kills_in_the_other_modes(durability: str) -> None:
    await _run(60, 2, durability)
