"""Platform properties: what actions ask for, what workers declare, and when the one satisfies the other.

Strict semantics, tolerant spelling: an action that names a property runs only where it is satisfied. Names compare
case-insensitively, and the values of the operating system and the processor with their usual synonyms. A few names
that clients add for their own purposes say nothing about the machine and are ignored.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

PropertyList = tuple[tuple[str, str], ...]
"""What an action asks for: (name, value) pairs as the client wrote them; names may repeat, all must hold."""

_NAME_SYNONYMS = {
    "isa": "arch",
    "cpu_arch": "arch",
    "docker-image": "container-image",
    "container_image": "container-image",
    "choose-queue": "pool",
}

_VALUE_SYNONYMS = {
    "osfamily": {"darwin": "macos"},
    "arch": {
        "x86_64": "x86-64",
        "amd64": "x86-64",
        "x64": "x86-64",
        "aarch64": "arm-a64",
        "arm64": "arm-a64",
    },
}

_UNSET_VALUES = {
    "pool": frozenset({"", "default"}),
    "container-image": frozenset({"", "none"}),
}
"""Values that ask for nothing: the same as leaving the property out."""

IGNORED_NAMES = frozenset(
    {
        "cache-silo",
        "jdk_symlink",
        "lre-rs",
        "persistent-workers",
        "persistentworkercommand",
        "persistentworkerkey",
        "persistentworkerprotocol",
        "persistentworkertool",
        "reproxy-version",
        "requires-worker-protocol",
        "supports-workers",
    }
)
"""Names (lower case) that clients add for themselves: cache salts and hints for persistent workers."""

RESOURCE_NAMES = frozenset(
    {"resources:cpu", "resources:memory", "estimatedcpu", "estimatedmemory", "min-cores", "min-mem"}
)
"""Names (lower case) of amounts an action asks for; the queue counts them, no worker has to declare them."""

_SHOWN = 8
"""So many properties are named in a message."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One requested property a worker does not satisfy. `offered` is empty when the worker does not know the name."""

    name: str
    requested: str
    offered: tuple[str, ...]

    def __str__(self) -> str:
        wanted = f"{_short(self.name)}={_short(self.requested)}"
        return f"{wanted} differs from {'|'.join(self.offered)}" if self.offered else f"{wanted} is not declared"


class WorkerProperties:
    """The properties a worker declares."""

    def __init__(self, declared: Iterable[tuple[str, str]]) -> None:
        self.declared: PropertyList = tuple(declared)
        self._values: dict[str, set[str]] = {}
        for name, value in self.declared:
            key = _canonical_name(name)
            self._values.setdefault(key, set()).add(_canonical_value(key, value))

    def mismatches(self, requested: PropertyList) -> list[Mismatch]:
        """Return the requested properties this worker does not satisfy; none means it can run the action."""
        found = []
        for name, value in requested:
            key = _canonical_name(name)
            wanted = _canonical_value(key, value)
            if key in IGNORED_NAMES or key in RESOURCE_NAMES or wanted.lower() in _UNSET_VALUES.get(key, ()):
                continue
            if wanted not in self._values.get(key, ()):
                offered = tuple(v for n, v in self.declared if _canonical_name(n) == key)
                found.append(Mismatch(name, value, offered))
        return found

    def satisfies(self, requested: PropertyList) -> bool:
        """Whether a worker with these properties may run an action that asks for `requested`."""
        return not self.mismatches(requested)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.declared)


def host_properties(extra: Mapping[str, str]) -> WorkerProperties:
    """Return what a worker on this machine declares: its operating system and processor, plus `extra`."""
    return WorkerProperties((("OSFamily", platform.system().lower()), ("Arch", platform.machine()), *extra.items()))


def docker_properties(image: str, extra: Mapping[str, str]) -> WorkerProperties:
    """Return what a Docker worker of this machine declares, plus `extra`."""
    return WorkerProperties(
        (
            ("OSFamily", "linux"),
            ("Arch", platform.machine()),
            ("container", "docker"),
            ("container-image", image),
            *extra.items(),
        )
    )


def describe(requested: PropertyList) -> str:
    """Return the requested properties as one line for people: short, for it travels in a header."""
    return _listed([f"{_short(name)}={_short(value)}" for name, value in requested], ", ") or "(none)"


def explain(mismatches: Sequence[Mismatch]) -> str:
    """Return why properties are not satisfied as one line for people."""
    return _listed([str(mismatch) for mismatch in mismatches], "; ")


def _listed(parts: Sequence[str], separator: str) -> str:
    more = [f"{len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return separator.join([*parts[:_SHOWN], *more])


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:120]}…"


def _canonical_name(name: str) -> str:
    lowered = name.lower()
    return _NAME_SYNONYMS.get(lowered, lowered)


def _canonical_value(key: str, value: str) -> str:
    if key == "container-image":
        return value.removeprefix("docker://")
    synonyms = _VALUE_SYNONYMS.get(key)
    if synonyms is None:
        return value
    lowered = value.lower()
    return synonyms.get(lowered, lowered)
