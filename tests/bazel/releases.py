"""The Bazels that the tests know, and what each needs on its command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.clients import DebianRoot, require_client, require_debian_root
from tests.support.require import require_tool

# Debian's packages keep Bazel's own files here instead of inside the executable. /etc/bazel/bazelrc says so, which is
# exactly what --nosystem_rc keeps Bazel from reading.
_DEBIAN_INSTALL_BASE = "/usr/share/bazel"


@dataclass(frozen=True, slots=True)
class Release:
    """One Bazel.

    command: what comes before its options. startup_options, build_options: beside those that all of them get.
    repositories: what it brings in place of downloads; wins over the workspace's own.
    blocks_downloads: whether it takes a downloader configuration; one that does not is given a dead proxy.
    root: the root file system it runs in, with the server; None where that is the machine's own.
    """

    name: str
    command: tuple[str, ...]
    startup_options: tuple[str, ...] = ()
    build_options: tuple[str, ...] = ()
    repositories: Mapping[str, Path] = field(default_factory=dict)
    blocks_downloads: bool = True
    root: DebianRoot | None = None


def debian_release() -> Release:
    """Return the `bazel` on PATH, of Debian's package: 4.2.3 on Debian 12. Does not look whether there is one."""
    debian = Path(_DEBIAN_INSTALL_BASE, "install_base_key").exists()
    return Release(
        "bazel",
        ("bazel",),
        (f"--install_base={_DEBIAN_INSTALL_BASE}", "--trust_install_base") if debian else (),
        ("--host_javabase=@local_jdk//:jdk",),
    )


def require_release(name: str) -> Release:
    """Return a release by name, or skip or fail the running test, as for every tool that may be missing."""
    match name:
        case "bazel":  # Debian's package, which CI has to have
            require_tool("bazel")
            return debian_release()
        case "bazel-2.1.0":
            return _bazel_2(require_client(name))
        case "bazel-sid":
            return _bazel_7()
        case _:
            raise ValueError(f"no such Bazel release: {name!r}")


def _bazel_2(directory: Path) -> Release:
    """The oldest client worth keeping alive, from npm: it speaks REAPI 2.0 and nothing else."""
    return Release(
        "bazel-2.1.0",
        (os.fspath(directory / "bazel"),),
        (f"--install_base={directory / 'install'}",),
        ("--host_javabase=@local_jdk//:jdk",),
        blocks_downloads=False,
    )


def _bazel_7() -> Release:
    """The newest Bazel that Debian has (7.7.1 when this was written), in a root of its own.

    Debian patched it to find its modules on the disk; the options are those it takes to do without them as well.
    """
    root = require_debian_root()
    base = Path(_DEBIAN_INSTALL_BASE)
    rules = {f"rules_{name}": base / "rules" / name for name in ("cc", "java", "license", "proto", "python")}
    tools = {"bazel_skylib": "skylib", "bazel_features": "features", "platforms": "platforms"}
    return Release(
        "bazel-sid",
        (*root.prefix, "bazel"),
        (
            f"--install_base={_DEBIAN_INSTALL_BASE}",
            "--trust_install_base",
            # Where Debian has the native half of zstd-jni; Bazel looks into its install base alone.
            "--host_jvm_args=-Djava.library.path=/usr/lib/x86_64-linux-gnu",
        ),
        ("--noenable_bzlmod", "--enable_workspace"),
        {**rules, **{name: base / "tools" / directory for name, directory in tools.items()}},
        root=root,
    )
