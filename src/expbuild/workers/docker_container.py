"""What a container of ours is created as: a closed list of rights that no configuration and no image can widen."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expbuild.config_workers import DockerWorkerConfig
from expbuild.workers.base import DEFAULT_PATH, Run
from expbuild.workers.docker_agent import AGENT_DIR, CAPABILITIES
from expbuild.workers.docker_image import Image

WORKSPACE = "/workspace"
"""Where a container sees the input root: the same for every action, so that paths in outputs do not differ."""

TMPDIR = "/tmp"
"""Where a container sees the temporary directory of its action."""

RESERVED = (WORKSPACE, TMPDIR, AGENT_DIR)
"""Where no volume can be."""

_PIDS_LIMIT = 4096
_CPU_PERIOD_US = 100_000


def hostname(config: DockerWorkerConfig) -> str:
    """Constant, as it is part of the environment. Without a network only "localhost" resolves."""
    return "localhost" if config.network_mode == "none" else "expbuild"


def environment(run: Run, image: Image) -> dict[str, str]:
    """Return the variables we set; the image's own lie below."""
    return {"PATH": image.path or DEFAULT_PATH, "TMPDIR": TMPDIR, **run.environment}


def fresh_container(config: DockerWorkerConfig, image: Image, run: Run, *, use_init: bool) -> dict[str, Any]:
    """Return the container for one command."""
    return {
        **_container(config, image),
        "Entrypoint": list(run.arguments),  # not Cmd: the image's own entry point would come before it
        "Env": [f"{name}={value}" for name, value in environment(run, image).items()],
        "WorkingDir": posixpath.join(WORKSPACE, run.working_directory),
        "User": f"{image.uid}:{image.gid}",
        "HostConfig": {**_host_config(config, run.workspace, use_init=use_init), "CapDrop": ["ALL"]},
    }


def warm_container(
    config: DockerWorkerConfig, image: Image, directory: Path, agent: Sequence[str], *, use_init: bool
) -> dict[str, Any]:
    """Return the container for many commands. directory: holds `root`, `tmp`, and `agent` with the agent's files."""
    host_config = _host_config(config, directory, use_init=use_init)
    host_config["Mounts"].append(_bind(directory / "agent", AGENT_DIR, read_only=True))
    return {
        **_container(config, image),
        "Entrypoint": list(agent),
        "Env": [],
        "WorkingDir": "/",
        "User": "0:0",
        # When we die, the agent reads the end of its input, and the container ends.
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "HostConfig": {**host_config, "CapDrop": ["ALL"], "CapAdd": list(CAPABILITIES)},
    }


def _container(config: DockerWorkerConfig, image: Image) -> dict[str, Any]:
    return {
        "Image": image.id,
        "Cmd": [],
        "StopSignal": "SIGKILL",  # whoever ends it early leaves no result that could pass for one
        "Hostname": hostname(config),
        "Healthcheck": {"Test": ["NONE"]},
    }


def _host_config(config: DockerWorkerConfig, directory: Path, *, use_init: bool) -> dict[str, Any]:
    mounts = [
        _bind(directory / "root", WORKSPACE, read_only=False),
        _bind(directory / "tmp", TMPDIR, read_only=False),
        *(_bind(v.host_path, str(v.container_path), read_only=v.read_only) for v in config.volumes),
    ]
    limits: dict[str, Any] = {"PidsLimit": _PIDS_LIMIT}
    if config.memory_limit is not None:
        limits |= {"Memory": config.memory_limit, "MemorySwap": config.memory_limit}
    if config.cpu_limit is not None:  # not NanoCpus: it is refused on machines with fewer cores
        limits |= {"CpuPeriod": _CPU_PERIOD_US, "CpuQuota": round(config.cpu_limit * _CPU_PERIOD_US)}
    return {
        "AutoRemove": False,  # the state has to be read before it goes
        "Init": use_init,
        "IpcMode": "private",
        "LogConfig": {"Type": "none"},
        "Mounts": mounts,
        "NetworkMode": config.network_mode,
        "Privileged": False,
        "RestartPolicy": {"Name": "no"},
        "SecurityOpt": ["no-new-privileges"],
        **limits,
    }


def _bind(source: Path, target: str, *, read_only: bool) -> dict[str, Any]:
    """Return a mount. (Unlike an entry of `Binds` it may contain colons, and its source is never created.)"""
    return {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": read_only}
