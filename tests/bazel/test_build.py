"""Bazel builds and tests a C++ workspace through a real server: all of it remotely, and none of it twice."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.bazel.client import Bazel, BazelResult
from tests.bazel.conftest import NewBazel
from tests.bazel.workspace import (
    ALL_TARGETS,
    BINARY,
    FAILING_TEST,
    FAILING_TEST_MESSAGE,
    LISTING,
    PASSING_TESTS,
    TREE,
    UNDECLARED_DIRECTORY,
    UNDECLARED_TREE,
)

pytestmark = [pytest.mark.bazel, pytest.mark.timeout(600)]

# Uses others, is used by fifteen others, and the cc_test does not link it.
_INNER_LIBRARY = 5
# The one the cc_test is about; nothing but the binary uses it otherwise.
_LIBRARY_UNDER_TEST = 39

_TESTS_FAILED = 3
"""Bazel's exit code for a build that worked and tests that did not."""
_REMOTE_EXECUTION_FAILED = 34
"""Bazel's exit code for a remote executor that does not do what it was asked to."""


def test_first_build_runs_every_action_remotely(first_build: tuple[Bazel, BazelResult]) -> None:
    """All compile, archive, link and other actions are `remote`; none is local in any of Bazel's ways."""
    bazel, result = first_build
    assert _without_internal(result) == {"remote": bazel.workspace.actions}


def test_outputs_are_what_the_actions_made(first_build: tuple[Bazel, BazelResult], flags: tuple[str, ...]) -> None:
    """The binary runs here; the directory output arrived whole, with executable files; its consumer saw it all."""
    bazel, _ = first_build
    result = bazel.build(*flags, "--remote_download_outputs=all", ALL_TARGETS).check()
    assert "remote" not in result.processes
    assert _output_of(bazel.bin / BINARY) == bazel.workspace.expected_output
    assert (bazel.bin / LISTING).read_text() == bazel.workspace.expected_listing
    assert _output_of(bazel.bin / TREE / "hello.sh") == "from the tree\n"
    assert (bazel.bin / TREE / "part_1" / "deep" / "data.txt").read_text() == "file 1\n"


@pytest.mark.usefixtures("first_build")
def test_second_build_from_empty_output_base_is_all_cache_hits(
    new_bazel: NewBazel, flags: tuple[str, ...], download_flags: tuple[str, ...]
) -> None:
    """Nothing runs again, here or remotely; Bazel fetches the outputs only when it was asked to."""
    bazel = new_bazel()
    result = bazel.build(*flags, ALL_TARGETS).check()
    assert _without_internal(result) == {"remote cache hit": bazel.workspace.actions}
    if download_flags:
        assert not (bazel.bin / BINARY).exists()
    else:
        assert _output_of(bazel.bin / BINARY) == bazel.workspace.expected_output


@pytest.mark.usefixtures("first_build")
@pytest.mark.parametrize("library", [_INNER_LIBRARY, _LIBRARY_UNDER_TEST])
def test_changed_source_rebuilds_only_what_depends_on_it(
    library: int, new_bazel: NewBazel, flags: tuple[str, ...]
) -> None:
    """A changed .cc file: its own compilation and what is linked from it run; all others are hits."""
    bazel = new_bazel()
    expected_output = bazel.workspace.change_source(library)
    result = bazel.build(*flags, ALL_TARGETS).check()
    changed = bazel.workspace.actions_after_source_change(library)
    assert _without_internal(result) == {
        "remote": changed,
        "remote cache hit": bazel.workspace.actions - changed,
    }
    bazel.build(*flags, "--remote_download_outputs=all", f"//{BINARY.replace('/', ':')}").check()
    assert _output_of(bazel.bin / BINARY) == expected_output


def test_changed_header_recompiles_what_includes_it_in_the_same_output_base(
    new_bazel: NewBazel, flags: tuple[str, ...]
) -> None:
    """After a comment in a header its includers are compiled again; equal objects mean that nothing is linked again."""
    bazel = new_bazel()
    bazel.build(*flags, ALL_TARGETS).check()
    bazel.workspace.comment_header(_INNER_LIBRARY)
    result = bazel.build(*flags, ALL_TARGETS).check()
    assert result.processes.get("remote") == bazel.workspace.actions_after_header_comment(_INNER_LIBRARY)
    assert set(result.processes) <= {"remote", "remote cache hit", "internal"}


def test_passing_tests_pass_and_are_not_run_twice(
    first_build: tuple[Bazel, BazelResult], new_bazel: NewBazel, flags: tuple[str, ...]
) -> None:
    """sh_test and cc_test pass remotely; from an empty output base their results are cache hits."""
    bazel, _ = first_build
    result = bazel.test(*flags, *PASSING_TESTS).check()
    assert result.tests == dict.fromkeys(PASSING_TESTS, "PASSED")
    assert set(result.processes) <= {"remote", "remote cache hit", "internal"}
    assert result.processes["remote"] >= len(PASSING_TESTS)

    again = new_bazel().test(*flags, *PASSING_TESTS).check()
    assert again.tests == dict.fromkeys(PASSING_TESTS, "PASSED")
    assert set(again.processes) <= {"remote cache hit", "internal"}


def test_failing_test_is_reported_with_its_log_and_runs_again(
    first_build: tuple[Bazel, BazelResult], flags: tuple[str, ...]
) -> None:
    """A nonzero exit is a result: Bazel says FAILED and shows the log. It is not cached, so the next time it runs."""
    bazel, _ = first_build
    for _ in range(2):
        result = bazel.test(*flags, "--test_output=errors", FAILING_TEST)
        assert result.exit_code == _TESTS_FAILED, result.stderr
        assert result.tests == {FAILING_TEST: "FAILED"}
        assert FAILING_TEST_MESSAGE in result.stdout + result.stderr
        assert result.processes["remote"] >= 1
        assert set(result.processes) <= {"remote", "remote cache hit", "internal"}


def test_genrule_whose_output_is_a_directory(new_bazel: NewBazel, flags: tuple[str, ...]) -> None:
    """A genrule can only declare files; Bazel takes a directory under that name if the server returns it as one.

    Only when it downloads outputs: otherwise Bazel 4 looks among the output files alone, and says so.
    """
    bazel = new_bazel()
    result = bazel.build(*flags, "--remote_download_outputs=all", UNDECLARED_DIRECTORY).check()
    assert set(result.processes) <= {"remote", "remote cache hit", "internal"}
    assert "is a directory" in result.stderr
    assert (bazel.bin / UNDECLARED_TREE / "one.txt").read_text() == "one\n"
    assert (bazel.bin / UNDECLARED_TREE / "deep" / "two.txt").read_text() == "two\n"


def test_action_that_no_worker_can_run_fails_with_the_reason_and_not_locally(
    new_bazel: NewBazel, flags: tuple[str, ...]
) -> None:
    """Refused at once, naming the property; the build ends there instead of carrying on here."""
    result = new_bazel().build(*flags, "--remote_default_exec_properties=OSFamily=plan9", ALL_TARGETS)
    assert result.exit_code == _REMOTE_EXECUTION_FAILED, result.stderr
    assert "plan9" in result.stderr
    assert set(result.processes) <= {"internal"}


def _without_internal(result: BazelResult) -> dict[str, int]:
    """The summary without what Bazel does itself (symlinks, written files): how many depends on its version."""
    return {kind: count for kind, count in result.processes.items() if kind != "internal"}


def _output_of(program: Path) -> str:
    assert os.access(program, os.X_OK)
    return subprocess.run([program], check=True, capture_output=True, text=True, timeout=30).stdout
