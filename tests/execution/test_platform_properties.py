"""Platform properties: strict semantics, tolerant spelling."""

from __future__ import annotations

import pytest

from expbuild.platform_properties import PropertyList, WorkerProperties, describe, docker_properties, host_properties

LINUX = WorkerProperties([("OSFamily", "linux"), ("Arch", "x86_64"), ("Pool", "big"), ("Pool", "gpu")])
DOCKER = WorkerProperties([("OSFamily", "linux"), ("container-image", "org/image:1"), ("container", "docker")])


@pytest.mark.parametrize(
    ("worker", "requested"),
    [
        pytest.param(LINUX, [], id="nothing"),
        pytest.param(LINUX, [("OSFamily", "linux")], id="as-declared"),
        pytest.param(LINUX, [("osfamily", "Linux")], id="case"),
        pytest.param(LINUX, [("Arch", "x86-64")], id="arch-dash"),
        pytest.param(LINUX, [("ISA", "amd64")], id="arch-as-ISA"),
        pytest.param(LINUX, [("cpu_arch", "X64")], id="arch-as-cpu_arch"),
        pytest.param(LINUX, [("Pool", "gpu")], id="one-of-several-values"),
        pytest.param(LINUX, [("Pool", "big"), ("Pool", "gpu")], id="CMD-16-repeated-all-hold"),
        pytest.param(LINUX, [("choose-queue", "big")], id="pool-synonym"),
        pytest.param(LINUX, [("Pool", "default"), ("pool", "")], id="unset-pool"),
        pytest.param(LINUX, [("container-image", "none")], id="unset-image"),
        pytest.param(LINUX, [("persistentWorkerKey", "abc"), ("cache-silo", "x")], id="ignored-names"),
        pytest.param(DOCKER, [("container-image", "docker://org/image:1")], id="image-as-url"),
        pytest.param(DOCKER, [("docker-image", "org/image:1")], id="image-synonym"),
    ],
)
def test_satisfied(worker: WorkerProperties, requested: PropertyList) -> None:
    """What asks for no more than there is, however it is spelled, runs."""
    assert worker.mismatches(tuple(requested)) == []


@pytest.mark.parametrize(
    ("worker", "requested", "reasons"),
    [
        pytest.param(LINUX, [("OSFamily", "windows")], ["OSFamily=windows differs from linux"], id="other-value"),
        pytest.param(LINUX, [("gpu", "1")], ["gpu=1 is not declared"], id="CMD-15-unknown-name"),
        pytest.param(LINUX, [("Pool", "GPU")], ["Pool=GPU differs from big|gpu"], id="CMD-17-values-are-exact"),
        pytest.param(
            LINUX,
            [("ISA", "x86-64"), ("ISA", "arm-a64")],
            ["ISA=arm-a64 differs from x86_64"],
            id="CMD-16-repeated-one-fails",
        ),
        pytest.param(LINUX, [("OSFamily", "")], ["OSFamily= differs from linux"], id="empty-value"),
        pytest.param(
            LINUX, [("container-image", "x")], ["container-image=x is not declared"], id="CMD-18-image-not-ignored"
        ),
        pytest.param(
            DOCKER,
            [("container-image", "docker://org/image:2")],
            ["container-image=docker://org/image:2 differs from org/image:1"],
            id="other-image",
        ),
    ],
)
def test_not_satisfied_with_the_reason(worker: WorkerProperties, requested: PropertyList, reasons: list[str]) -> None:
    """Each property that differs is told, as the client wrote it."""
    assert [str(mismatch) for mismatch in worker.mismatches(tuple(requested))] == reasons
    assert not worker.satisfies(tuple(requested))


def test_workers_declare_their_kind_and_what_is_configured() -> None:
    """Host and Docker workers of one machine differ in the container."""
    host, docker = host_properties({"Pool": "x"}), docker_properties("org/image", {})
    assert host.satisfies((("OSFamily", "linux"), ("Pool", "x")))
    assert not host.satisfies((("container", "docker"),))
    assert docker.satisfies((("container", "docker"), ("container-image", "org/image")))


def test_describe_is_short_whatever_was_asked_for() -> None:
    """It travels in a header."""
    assert describe(()) == "(none)"
    assert describe((("a", "1"), ("b", ""))) == "a=1, b="
    assert len(describe(tuple((f"name-{i}" * 1000, "x" * 10_000) for i in range(1000)))) < 3000
