"""A pytest plugin that writes down how each test ended, a line each: the outcome, the phase, the test's id."""

from __future__ import annotations

import os

import pytest

FILE = "EXPBUILD_TEST_VERDICTS"
"""The environment variable that names the file."""


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        with open(os.environ[FILE], "a", encoding="utf-8") as file:
            file.write(f"{report.outcome} {report.when} {report.nodeid}\n")
