"""What only a new Bazel can ask for: compression, BLAKE3, builds without the bytes, executions kept alive."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest

from tests.bazel.client import Bazel
from tests.bazel.lab import Lab, lab, without_internal
from tests.bazel.releases import require_release
from tests.bazel.workspace import ALL_TARGETS, BINARY
from tests.support.require import only_in_full_runs
from tests.support.server import wait_until

pytestmark = [pytest.mark.bazel, pytest.mark.timeout(300)]

_LIBRARIES = 8
_BINARY_TARGET = f"//{BINARY.replace('/', ':')}"
_CHANGED_LIBRARY = 5
_BLAKE3 = ("--digest_function=blake3",)
_ZSTD = ("--remote_cache_compression",)


@pytest.fixture(scope="module")
def bazel_lab() -> Iterator[Lab]:
    """A server that takes BLAKE3 as well, in the root of the newest Bazel."""
    with lab(require_release("bazel-sid"), digest_functions=("SHA256", "BLAKE3")) as made:
        yield made


@pytest.mark.parametrize(
    ("startup_options", "options", "names", "foreign_names"),
    [
        pytest.param((), _ZSTD, b"compressed-blobs/zstd/", b"blake3", id="zstd", marks=only_in_full_runs),
        pytest.param(_BLAKE3, (), b"blobs/blake3/", b"compressed-blobs", id="blake3", marks=only_in_full_runs),
        pytest.param(_BLAKE3, _ZSTD, b"compressed-blobs/zstd/blake3/", None, id="blake3-zstd"),
    ],
)
def test_build_and_cache_hits(
    bazel_lab: Lab,
    request: pytest.FixtureRequest,
    startup_options: Sequence[str],
    options: Sequence[str],
    names: bytes,
    foreign_names: bytes | None,
) -> None:
    """Built remotely, then hit from an empty output base; Bazel's own log says that blobs went the way asked for."""
    for expected in ("remote", "remote cache hit"):
        bazel, instance = _fresh(bazel_lab, request, startup_options)
        log = bazel_lab.new_file("grpc.log")
        flags = (*bazel_lab.flags, *instance, *options, f"--remote_grpc_log={log}", "--remote_download_outputs=all")
        result = bazel.build(*flags, ALL_TARGETS).check()
        assert without_internal(result) == {expected: bazel.workspace.actions}
        assert bazel_lab.output_of_binary(bazel) == bazel.workspace.expected_output
        said = log.read_bytes()
        assert names in said
        assert foreign_names is None or foreign_names not in said


@pytest.mark.parametrize("mode", [pytest.param("minimal", marks=only_in_full_runs), "toplevel"])
def test_build_without_the_bytes(bazel_lab: Lab, request: pytest.FixtureRequest, mode: str) -> None:
    """Outputs stay on the server, and later actions and builds use them from there."""
    bazel, instance = _fresh(bazel_lab, request)
    flags = (*bazel_lab.flags, *instance, f"--remote_download_outputs={mode}")
    bazel.build(*flags, _BINARY_TARGET).check()
    assert (bazel.bin / BINARY).exists() == (mode == "toplevel")
    assert not list((bazel.bin / "lib").rglob("*.o"))

    expected_output = bazel.workspace.change_source(_CHANGED_LIBRARY)
    result = bazel.build(*flags, "--remote_download_outputs=toplevel", _BINARY_TARGET).check()
    assert result.processes["remote"] > 0
    assert set(result.processes) <= {"remote", "remote cache hit", "internal"}
    assert not list((bazel.bin / "lib").rglob("*.o"))
    assert bazel_lab.output_of_binary(bazel) == expected_output


@only_in_full_runs
def test_lost_blobs_are_made_again(bazel_lab: Lab, request: pytest.FixtureRequest) -> None:
    """Bazel counts on outputs it never fetched. When they are gone it starts over and gets them."""
    bazel, instance = _fresh(bazel_lab, request, batch=False)
    flags = (*bazel_lab.flags, *instance, "--experimental_remote_cache_eviction_retries=2")
    bazel.build(*flags, "--remote_download_outputs=minimal", _BINARY_TARGET).check()
    for blob in bazel_lab.cas.rglob("*"):
        if blob.is_file():
            blob.unlink()
    expected_output = bazel.workspace.change_source(_CHANGED_LIBRARY)
    bazel.build(*flags, "--remote_download_outputs=toplevel", _BINARY_TARGET).check()
    assert bazel_lab.output_of_binary(bazel) == expected_output


def test_execution_keepalive_outlives_the_remote_timeout(bazel_lab: Lab) -> None:
    """Bazel ends its own Execute calls after `--remote_timeout` and comes back: the action runs once, to its end."""
    bazel = bazel_lab.new_bazel(libraries=_LIBRARIES)
    slow = bazel.workspace.root / "slow"
    slow.mkdir()
    command = "echo started; sleep 8; echo slow > $@"
    (slow / "BUILD").write_text(f'genrule(name = "slow", outs = ["slow.txt"], cmd = "{command}")\n')
    before = len(bazel_lab.server.events("execution.completed"))
    flags = (*bazel_lab.flags, "--experimental_remote_execution_keepalive", "--remote_timeout=3")
    result = bazel.build(*flags, "--remote_download_outputs=all", "//slow").check()
    assert without_internal(result) == {"remote": 1}
    assert (bazel.bin / "slow" / "slow.txt").read_text() == "slow\n"
    assert len(bazel_lab.server.events("execution.completed")) == before + 1
    wait_until(
        lambda: bazel_lab.completed_rpcs("Execution/WaitExecution") > 0, timeout_s=10, what="Bazel waited with Wait"
    )


def _fresh(
    bazel_lab: Lab, request: pytest.FixtureRequest, startup_options: Sequence[str] = (), *, batch: bool = True
) -> tuple[Bazel, tuple[str, ...]]:
    """Return a Bazel, and the flag that makes the server's action cache one of this test's own.

    Blobs are shared by all instances: one source that differs makes sure that something is uploaded.
    """
    bazel = bazel_lab.new_bazel(libraries=_LIBRARIES, startup_options=startup_options, batch=batch)
    header = bazel.workspace.root / "lib" / "lib_000.h"
    header.write_text(f"{header.read_text()}// {request.node.name}\n" + "// so long that it is worth compressing\n" * 9)
    instance = re.sub(r"\W+", "-", request.node.name).strip("-")
    return bazel, (f"--remote_instance_name={instance}",)
