"""No test of a duty can be passed by doing nothing.

Every one is run, in a process of its own, against a server that answers OK and an empty message to everything.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.conformance import verdicts
from tests.conformance.duties import ROOT, read_cases
from tests.conformance.hollow import start_hollow_server


@pytest.mark.timeout(900)
async def test_against_a_server_that_does_nothing_every_test_of_a_duty_fails(tmp_path: Path) -> None:
    tests = [case.test for case in read_cases()]
    server, address = await start_hollow_server()
    file = tmp_path / "verdicts"
    env = {**os.environ, "EXPBUILD_TEST_HOLLOW": address, verdicts.FILE: str(file)}
    env.pop("EXPBUILD_TEST_FULL", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "--no-header", "-p", verdicts.__name__]
    command += ["-p", "no:cacheprovider", "-m", "not docker", "--timeout=20", *tests]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    await server.stop(0)
    said = output.decode(errors="replace")
    assert process.returncode == 1, said[-5000:]
    ends = [tuple(line.split(" ", 2)) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [test for outcome, phase, test in ends if outcome == "passed"] == [], "these are passed by doing nothing"
    failed = {test.partition("[")[0] for outcome, _, test in ends if outcome == "failed"}
    assert len(failed) > len(tests) * 0.9, said[-5000:]
    assert {test for outcome, phase, test in ends if outcome == "failed" and phase == "setup"} == set()
