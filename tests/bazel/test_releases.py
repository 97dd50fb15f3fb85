"""The oldest and the newest Bazel that can be had: build, test, hit the cache. (test_build.py has Debian's 4.2.3.)"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bazel.client import Bazel, BazelResult
from tests.bazel.lab import Lab, lab, without_internal
from tests.bazel.releases import Release, require_release
from tests.bazel.workspace import ALL_TARGETS, FAILING_TEST, FAILING_TEST_MESSAGE, LISTING, PASSING_TESTS
from tests.support.require import require_tool

pytestmark = [pytest.mark.bazel, pytest.mark.timeout(600)]

_TESTS_FAILED = 3
"""Bazel's exit code for a build that worked and tests that did not."""


@pytest.fixture(scope="module", params=["bazel-2.1.0", "bazel-sid"])
def release(request: pytest.FixtureRequest) -> Release:
    require_tool("g++")
    return require_release(request.param)


@pytest.fixture(scope="module")
def bazel_lab(release: Release) -> Iterator[Lab]:
    with lab(release) as made:
        yield made


@pytest.fixture(scope="module")
def first_build(bazel_lab: Lab) -> tuple[Bazel, BazelResult]:
    """A build of everything, with nothing cached anywhere. The test that comes first pays for it."""
    bazel = bazel_lab.new_bazel()
    return bazel, bazel.build(*bazel_lab.flags, "--remote_download_outputs=all", ALL_TARGETS).check()


def test_first_build_runs_every_action_remotely(bazel_lab: Lab, first_build: tuple[Bazel, BazelResult]) -> None:
    """Every action is `remote`, none is local, and what they made is right."""
    bazel, result = first_build
    assert without_internal(result) == {"remote": bazel.workspace.actions}
    assert bazel_lab.output_of_binary(bazel) == bazel.workspace.expected_output
    assert (bazel.bin / LISTING).read_text() == bazel.workspace.expected_listing


@pytest.mark.usefixtures("first_build")
def test_second_build_from_empty_output_base_is_all_cache_hits(bazel_lab: Lab) -> None:
    """Nothing runs again, and the outputs are fetched."""
    bazel = bazel_lab.new_bazel()
    result = bazel.build(*bazel_lab.flags, "--remote_download_outputs=all", ALL_TARGETS).check()
    assert without_internal(result) == {"remote cache hit": bazel.workspace.actions}
    assert bazel_lab.output_of_binary(bazel) == bazel.workspace.expected_output


def test_tests_pass_or_fail_remotely(bazel_lab: Lab, first_build: tuple[Bazel, BazelResult]) -> None:
    """sh_test and cc_test pass; one that fails is reported with its log."""
    bazel, _ = first_build
    passing = bazel.test(*bazel_lab.flags, *PASSING_TESTS).check()
    assert passing.tests == dict.fromkeys(PASSING_TESTS, "PASSED")
    assert set(passing.processes) <= {"remote", "remote cache hit", "internal"}

    failing = bazel.test(*bazel_lab.flags, "--test_output=errors", FAILING_TEST)
    assert failing.exit_code == _TESTS_FAILED, failing.stderr
    assert failing.tests == {FAILING_TEST: "FAILED"}
    assert FAILING_TEST_MESSAGE in failing.stdout + failing.stderr
