"""Whom the actions of a host slot run as."""

from __future__ import annotations

import grp
import os
import pwd

from expbuild.config_workers import HostWorkerConfig
from expbuild.errors import StartupError
from expbuild.workers.base import Owner

_HIGHEST_ID = 2**32 - 2  # the one above means "leave it as it is" to the kernel


# Why slot_uids is 60800 to 61183 by default: accounts of people end at 60000, systemd hands out 60001-60513 and
# 61184-65519; these lie between, and below 65536, so that they exist in containers too.


def resolve_owner(config: HostWorkerConfig, slot: int) -> Owner | None:
    """Return whom commands of this slot run as, None for the server's own user.

    A server that may switch users never lets an action run as root: without `run_as_user` every slot has a user of its
    own. Slots that share a `run_as_user` are not protected from each other. Raises StartupError.
    """
    if os.geteuid() != 0:
        for key, value in (("run_as_user", config.run_as_user), ("run_as_group", config.run_as_group)):
            if value is not None:
                raise StartupError(f"{key} = {value!r}: only a server started as root can switch users")
        return None
    if config.run_as_user is not None:
        uid, gid = _user(config.run_as_user)
    else:
        first, last = config.slot_uids
        uid = gid = first + slot
        if uid > last:
            raise StartupError(
                f"slot_uids = [{first}, {last}] are users for {last - first + 1} host slots only; widen it, or set "
                "run_as_user for the others"
            )
    if config.run_as_group is not None:
        gid = _group(config.run_as_group)
    if gid == 0:
        raise StartupError(f"run_as_user = {config.run_as_user!r}: its group is root's; set run_as_group to another")
    return Owner(uid, gid)


def _user(name: str) -> tuple[int, int]:
    try:
        entry = pwd.getpwuid(_number("run_as_user", name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        if not name.isdecimal():
            raise StartupError(f"run_as_user = {name!r}: there is no such user") from None
        return int(name), int(name)  # a user needs no account
    if entry.pw_uid == 0:
        raise StartupError(f"run_as_user = {name!r}: actions do not run as root")
    return entry.pw_uid, entry.pw_gid


def _group(name: str) -> int:
    try:
        gid = _number("run_as_group", name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise StartupError(f"run_as_group = {name!r}: there is no such group") from None
    if gid == 0:
        raise StartupError(f"run_as_group = {name!r}: actions do not run with root's group")
    return gid


def _number(key: str, text: str) -> int:
    number = int(text)
    if number > _HIGHEST_ID:
        raise StartupError(f"{key} = {text!r}: no number above {_HIGHEST_ID} is possible")
    if number == 0:
        raise StartupError(f"{key} = {text!r}: actions do not run as root")
    return number
