"""The image of a Docker worker: had, pinned, and asked whom its commands run as."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerError

from expbuild.config_workers import DockerWorkerConfig
from expbuild.errors import WorkerFailed
from expbuild.workers.docker_daemon import Daemon

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Image:
    """The image as it was when the worker started; what runs is this id, wherever its tag has moved since.

    uid, gid: whom commands run as. variables: those the image sets.
    """

    id: str
    uid: int
    gid: int
    variables: Mapping[str, str]

    @property
    def path(self) -> str:
        """The PATH the image sets, "" when it sets none."""
        return self.variables.get("PATH", "")


async def resolve_image(
    daemon: Daemon, config: DockerWorkerConfig, known: Image | None, pull_timeout_s: float
) -> Image:
    """Return the configured image, pulled when there is need to.

    known: what an earlier call returned; it stays as long as the daemon has it. Raises WorkerFailed when the image or
    its user cannot be had.
    """
    name = config.image.removeprefix("docker://")
    if known is None and config.always_pull:
        await _pull(daemon, name, pull_timeout_s)
    found = await _inspect(daemon, known.id if known else name)
    if found is None:
        await _pull(daemon, name, pull_timeout_s)
        found = await _inspect(daemon, name)
    if found is None:
        raise WorkerFailed(f"the image {name} was pulled, but the Docker daemon does not know it")
    settings = found.get("Config") or {}
    user = config.user or settings.get("User") or ""
    uid, gid = await _resolve_user(daemon, found["Id"], user)
    variables = dict(entry.partition("=")[::2] for entry in settings.get("Env") or ())
    return Image(found["Id"], uid, gid, variables)


async def _inspect(daemon: Daemon, reference: str) -> dict[str, Any] | None:
    async with daemon.call(f"look up the image {reference}"):
        try:
            return await daemon.client.images.inspect(reference)
        except DockerError as error:
            if error.status == 404:
                return None
            raise


async def _pull(daemon: Daemon, name: str, timeout_s: float) -> None:
    log.info("image.pull_started", image=name)
    async with daemon.call_within(timeout_s, f"pull the image {name}"):
        await daemon.client.images.pull(name)


async def _resolve_user(daemon: Daemon, image_id: str, user: str) -> tuple[int, int]:
    """Return the uid and gid of `user`, resolved as Docker does it: by the passwd and group files of the image.

    "" is the server's own user: it owns the workspace, and a root without capabilities could not write there.
    """
    if not user:
        return os.geteuid(), os.getegid()
    if re.fullmatch(r"\d+:\d+", user, re.ASCII):
        uid, _, gid = user.partition(":")
        return int(uid), int(gid)
    container = await daemon.create({"Image": image_id, "Entrypoint": ["/never-started"]})
    try:
        passwd = await _read_file(daemon, container, "/etc/passwd")
        group = await _read_file(daemon, container, "/etc/group")
    finally:
        await daemon.remove(container)
    numbers = numeric_user(user, passwd, group)
    if numbers is None:
        raise WorkerFailed(f"the image has no user {user!r}; set user to numbers, uid:gid")
    return numbers


async def _read_file(daemon: Daemon, container: DockerContainer, path: str) -> str:
    """Return the text of a file in the container; "" when there is none."""
    async with daemon.call(f"read {path} of the image"):
        try:
            archive = await container.get_archive(path)
        except DockerError as error:
            if error.status == 404:
                return ""
            raise
    with archive:
        member = archive.next()
        file = archive.extractfile(member) if member is not None and member.isfile() else None
        return file.read().decode("utf-8", "replace") if file is not None else ""


def numeric_user(user: str, passwd: str, group: str) -> tuple[int, int] | None:
    """Return the uid and gid of `user`: a name or number, or two of them with a colon. None when a name is unknown.

    A user without a group has its primary group, and group 0 where passwd does not know it (as Docker has it).
    """
    who, _, of_group = user.partition(":")
    users = [fields for line in passwd.splitlines() if len(fields := line.split(":")) >= 4]
    entry = next((fields for fields in users if who in (fields[0], fields[2])), None)
    uid = entry[2] if entry is not None else who
    gid = entry[3] if entry is not None else "0"
    if of_group:
        groups = [fields for line in group.splitlines() if len(fields := line.split(":")) >= 3]
        gid = next((fields[2] for fields in groups if fields[0] == of_group), of_group)
    return (int(uid), int(gid)) if uid.isdecimal() and gid.isdecimal() else None
