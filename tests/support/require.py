"""What to do about a tool the machine does not have."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

only_in_full_runs = pytest.mark.skipif(os.environ.get("EXPBUILD_TEST_FULL") != "1", reason="only in `make test-full`")
"""Marks a test that takes long and is for the thorough: what it shows, a shorter one shows in part."""


def require_tool(name: str) -> str:
    """Return the path of the program `name`; without it do what `unavailable` does."""
    # Daemons are in sbin, which not every root shell has on its PATH.
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        unavailable(f"there is no {name} on PATH: run tests/install-deps as root")
    return path


def unavailable(reason: str) -> NoReturn:
    """Skip the running test, saying why; fail it when CI=true, where a skipped test would go unnoticed."""
    if os.environ.get("CI", "").strip().lower() in ("1", "true", "yes"):
        pytest.fail(f"{reason} (CI is set, so this is a failure)", pytrace=False)
    pytest.skip(f"NOT TESTED: {reason}")
