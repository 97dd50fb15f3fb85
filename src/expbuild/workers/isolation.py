"""How far the actions of a host worker are kept from the machine and from each other, and the proof of it at start."""

from __future__ import annotations

import os
from typing import Literal

from expbuild.config_workers import HostWorkerConfig
from expbuild.errors import StartupError

Level = Literal["none", "uid", "namespaces"]
"""none: a process group and an environment of their own. uid: a user per slot beside that. namespaces: a private root,
network, process table and /tmp beside that (as root under the user of the slot, else under our own)."""

SELF_TEST = """
fail() { echo "$1" >&2; exit 1; }
cd "$TMPDIR" && : > self-test || exit
case $1 in
uid | namespaces)
    [ "$(id -u)" != 0 ] || fail "commands run as root"
esac
if [ "$1" = namespaces ]; then
    [ ! -e "$2" ] || fail "the files of the host can be seen"
    [ $$ -lt 100 ] || fail "the processes of the host can be seen"
    while read -r interface _; do
        case $interface in
        Inter-* | face | lo:*) ;;
        *) [ "$3" = True ] || fail "the network interface $interface can be seen" ;;
        esac
    done < /proc/net/dev
elif [ "$1" = uid ]; then
    if cat "$4" > /dev/null 2>&1; then fail "the files of the server can be read"; fi
fi
exit 0
"""
"""Run as every action will be, with: the level, a directory of the host, whether there is to be a network, a file that
only the server can read."""


def levels_to_try(config: HostWorkerConfig) -> tuple[Level, ...]:
    """Return what the configuration allows, the best first. Raises StartupError when it asks for the impossible."""
    is_root = os.geteuid() == 0
    if config.use_chroot or config.isolation == "namespaces":
        return ("namespaces",)
    match config.isolation:
        case "auto":
            return ("namespaces", "uid") if is_root else ("namespaces", "none")
        case "uid":
            if not is_root:
                raise StartupError('isolation = "uid": only a server started as root can switch users')
            return ("uid",)
        case "none":
            if is_root and config.run_as_user is None:
                raise StartupError('isolation = "none": actions do not run as root; set run_as_user, or use "uid"')
            return ("none",)
