"""Power cuts: nothing damaged is served after one, and with `strict` nothing that was acknowledged is gone."""

from __future__ import annotations

import pytest

from tests.reliability.power import Report, run
from tests.support.files import scratch_directory
from tests.support.require import only_in_full_runs


async def cut(cuts: int, seed: int, durability: str) -> Report:
    with scratch_directory("expbuild-power-") as directory:
        report = await run(directory, cuts, seed, durability)
    assert not any(report.history.faults.values()), f"{report}\n{report.history.faults}"
    assert report.at_risk == report.cuts == cuts
    assert report.acknowledged > 0
    return report


@pytest.mark.timeout(600)
async def test_strict_keeps_what_was_acknowledged() -> None:
    assert (await cut(4, 1, "strict")).gone == 0


@pytest.mark.timeout(600)
async def test_none_serves_nothing_damaged() -> None:
    await cut(3, 2, "none")


@only_in_full_runs
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("durability", ["none", "ordered", "strict"])
async def test_many_cuts(durability: str) -> None:
    report = await cut(40, 3, durability)
    assert durability != "strict" or report.gone == 0
