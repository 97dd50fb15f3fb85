"""The `[[execution.pool.workers]]` tables of the configuration: one model per kind of worker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic import ValidationInfo as Info

from expbuild.config_directories import default_work_dir
from expbuild.config_problems import Expect
from expbuild.config_text import shown
from expbuild.config_types import (
    LIST,
    NAME_OR_ID,
    AbsolutePath,
    Count,
    Platform,
    Table,
    UserOrId,
    pattern,
    require,
    rule,
)

MemoryLimit = Annotated[int, Field(ge=6 << 20, lt=1 << 63), Expect("at least 6291456 bytes")]
CpuLimit = Annotated[float, Field(ge=0.01, le=100_000), Expect("a number of cores of at least 0.01")]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _check_run_as_group(group: str | None, info: Info) -> str | None:
    if group is not None and "run_as_user" in info.data and info.data["run_as_user"] is None:
        raise rule(f"expected run_as_user beside it, got only {shown(group)}")
    return group


def _check_isolation(isolation: str, info: Info) -> str:
    if info.data.get("use_chroot") and isolation not in ("auto", "namespaces"):
        raise rule(f'expected "namespaces" or "auto" beside use_chroot, got {shown(isolation)}')
    return isolation


def _check_chroot_root(chroot_root: str | None, info: Info) -> str | None:
    if chroot_root is not None and not info.data.get("use_chroot"):
        raise rule(f"expected use_chroot = true beside it, got only {shown(chroot_root)}")
    return chroot_root


SlotUid = Annotated[int, Field(ge=1000, lt=2**32 - 1), Expect("an integer from 1000 to 4294967294")]


class HostWorkerConfig(Table):
    """`[[execution.pool.workers]]` with `type = "host"`: commands run as processes of this machine."""

    type: Literal["host"] = "host"
    count: Count = Field(default_factory=_cores)
    """How many actions run at once; by default as many as there are cores."""
    work_dir: AbsolutePath = Field(default_factory=lambda: default_work_dir("host"))
    """Where input roots are prepared; best on the file system of the CAS. Never inside a store, or around one."""
    use_chroot: bool = False
    """Give each action a private root made of namespaces; the server does not start where that is impossible."""
    isolation: Annotated[Literal["auto", "none", "uid", "namespaces"], AfterValidator(_check_isolation)] = "auto"
    """How far actions are kept from this machine and from each other; `auto` is the best that works here.

    `uid`: a user for each slot (as root). `namespaces`: beside that, where there is one, a private root with a
    read-only system, no network, own processes and /tmp. What is named but cannot be kept stops the start.
    """
    chroot_root: Annotated[Literal["input"] | None, AfterValidator(_check_chroot_root)] = None
    """`input`, beside `use_chroot`: the input root is all there is, as /; nothing of this system is in it."""
    network: bool = False
    """With namespaces: whether actions have the network of this machine. Without them, they always have."""
    read_only_paths: Annotated[tuple[AbsolutePath, ...], LIST] = (Path("/opt"),)
    """With namespaces: what actions see beside the system's programs and libraries, where it exists."""
    slot_uids: Annotated[
        tuple[SlotUid, SlotUid], LIST, require(lambda ends: ends[0] <= ends[1]), Expect("the first and the last number")
    ] = (60800, 61183)
    """As root: the users, and groups, of slots without `run_as_user`, one each. They need no accounts."""
    env_whitelist: Annotated[
        tuple[Annotated[str, pattern("[A-Za-z_][A-Za-z0-9_]*"), Expect("the name of an environment variable")], ...],
        LIST,
    ] = ()
    """Variables of the server passed on to commands, below those of the command itself."""
    run_as_user: UserOrId | None = None
    """The user commands run as; needs the right to switch users."""
    run_as_group: Annotated[UserOrId | None, AfterValidator(_check_run_as_group)] = None
    """The group commands run as; without it the primary group of `run_as_user`."""
    memory_limit: MemoryLimit | None = None
    """Bytes of memory an action may use, all its processes together; unlimited by default."""
    cpu_limit: CpuLimit | None = None
    """Cores an action may use; unlimited by default."""
    max_processes: Annotated[int, Field(ge=16, le=4_000_000), Expect("an integer of at least 16")] = 4096
    """Processes and threads an action may have at once."""
    max_open_files: Annotated[int, Field(ge=64, le=1 << 20), Expect("an integer from 64 to 1048576")] = 65536
    """Files each process of an action may have open."""
    platform: Platform = Field(default_factory=dict)
    """Platform properties declared beside OSFamily and Arch."""


class VolumeConfig(Table):
    """`[[execution.pool.workers.volumes]]`: a directory of this machine that containers see."""

    host_path: AbsolutePath
    """The directory here."""
    container_path: Annotated[
        AbsolutePath, require(lambda path: path != Path("/")), Expect('an absolute path other than "/"')
    ]
    """Where containers see it."""
    read_only: bool = True
    """Whether commands can change it. What they write there is shared by all of them."""


def _check_volumes(volumes: tuple[VolumeConfig, ...]) -> tuple[VolumeConfig, ...]:
    targets = [volume.container_path for volume in volumes]
    for target in targets:
        if targets.count(target) > 1:
            raise rule(f"expected a different container_path in each, got {shown(target)} twice")
    return volumes


class DockerWorkerConfig(Table):
    """`[[execution.pool.workers]]` with `type = "docker"`: commands run in containers of one image."""

    type: Literal["docker"] = "docker"
    count: Count = 1
    """How many actions run at once."""
    image: Annotated[str, pattern(r"[A-Za-z0-9][^\s]*"), Expect("the name of a container image")]
    """The image; it is also the value of the declared property `container-image`."""
    always_pull: bool = False
    """Ask the registry at every start; otherwise only when the image is not there."""
    cpu_limit: CpuLimit | None = None
    """Cores a container may use; unlimited by default."""
    memory_limit: MemoryLimit | None = None
    """Bytes of memory a container may use; unlimited by default. (Docker accepts nothing below 6 MiB.)"""
    network_mode: Literal["none", "bridge", "host"] = "none"
    """The network containers see."""
    user: Annotated[str, pattern(f"{NAME_OR_ID}(:{NAME_OR_ID})?"), Expect('"user" or "user:group"')] | None = None
    """Whom commands run as, by names of the image or by number; by default whom the image says."""
    volumes: Annotated[tuple[VolumeConfig, ...], LIST, AfterValidator(_check_volumes)] = ()
    """Directories of this machine that containers see."""
    reuse: bool = True
    """Run actions one after the other in a warm container; false: a fresh container for each."""
    actions_per_container: Count = 200
    """After so many actions a warm container is renewed, if nothing doubtful has ended it before."""
    work_dir: AbsolutePath = Field(default_factory=lambda: default_work_dir("docker"))
    """Where input roots are prepared; the Docker daemon must see the same directory under the same name."""
    docker_host: (
        Annotated[
            str,
            pattern(r"unix:///\S+|tcp://[^\s/:]+(:[0-9]{1,5})?/?|tcp://\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?/?"),
            Expect('"unix:///path" or "tcp://host:port"'),
        ]
        | None
    ) = None
    """The Docker daemon; by default the one DOCKER_HOST names, else the standard socket."""
    platform: Platform = Field(default_factory=dict)
    """Platform properties declared beside OSFamily, Arch, container and container-image."""


WorkerConfig = Annotated[HostWorkerConfig | DockerWorkerConfig, Field(discriminator="type")]
