"""What actions ask for beside a slot: cores and memory, of what the pool was given."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from expbuild.errors import InvalidArgument, NoMatchingWorker
from expbuild.platform_properties import PropertyList

_CPU_NAMES = frozenset({"resources:cpu", "estimatedcpu", "min-cores"})
_MEMORY_NAMES = frozenset({"resources:memory", "estimatedmemory", "min-mem"})
_MEBIBYTES = frozenset({"min-mem", "resources:memory"})
"""Properties whose plain numbers count MiB (Bazel and the servers that know min-mem); elsewhere they are bytes."""

_CPU = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(m?)", re.ASCII)
_MEMORY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*(?:([kmgt])(i?)b?|b)?", re.ASCII | re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Resources:
    """Cores and bytes of memory."""

    cpu_cores: float = 0.0
    memory_bytes: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(round(self.cpu_cores + other.cpu_cores, 6), self.memory_bytes + other.memory_bytes)

    def __str__(self) -> str:
        parts = [f"{self.cpu_cores:g} cores"] if self.cpu_cores else []
        parts += [f"{self.memory_bytes / 2**20:.0f} MiB of memory"] if self.memory_bytes else []
        return " and ".join(parts) or "nothing"


NOTHING = Resources()


@dataclass(frozen=True, slots=True)
class Capacity:
    """What all running actions may take together; None where nobody counts."""

    cpu_cores: float | None = None
    memory_bytes: int | None = None

    def short_of(self, used: Resources, wanted: Resources) -> str:
        """Return what `wanted` lacks beside `used`: "cpu", "memory", or "" when it fits."""
        total = used + wanted
        if wanted.memory_bytes and self.memory_bytes is not None and total.memory_bytes > self.memory_bytes:
            return "memory"
        if wanted.cpu_cores and self.cpu_cores is not None and total.cpu_cores > self.cpu_cores + 1e-9:
            return "cpu"
        return ""

    def check(self, wanted: Resources) -> None:
        """Raise NoMatchingWorker for what the whole pool does not have."""
        match self.short_of(NOTHING, wanted):
            case "memory":
                asked, has = wanted.memory_bytes, self.memory_bytes
                raise NoMatchingWorker(
                    f"the action asks for {asked} bytes of memory, and the whole pool has {has} "
                    "(execution.pool.memory_bytes); ask for less, or give the pool more"
                )
            case "cpu":
                raise NoMatchingWorker(
                    f"the action asks for {wanted.cpu_cores:g} cores, and the whole pool has {self.cpu_cores:g} "
                    "(execution.pool.cpu_cores); ask for fewer, or give the pool more"
                )


def requested_resources(platform: PropertyList) -> Resources:
    """Return what an action asks for; of several spellings the largest. Raises InvalidArgument."""
    cpu_cores, memory_bytes = 0.0, 0
    for name, value in platform:
        key = name.lower()
        if key in _CPU_NAMES:
            cpu_cores = max(cpu_cores, _cores(name, value))
        elif key in _MEMORY_NAMES:
            memory_bytes = max(memory_bytes, _bytes(name, value, unit=2**20 if key in _MEBIBYTES else 1))
    return Resources(cpu_cores, memory_bytes)


def _cores(name: str, value: str) -> float:
    match = _CPU.fullmatch(value.strip())
    if match is None:
        raise InvalidArgument(
            f'platform property {name[:80]}: expected a number of cores such as "2", "0.5" or "500m", '
            f"got {value[:80]!r}"
        )
    return float(match[1]) / (1000 if match[2] else 1)


def _bytes(name: str, value: str, *, unit: int) -> int:
    match = _MEMORY.fullmatch(value.strip())
    if match is None:
        raise InvalidArgument(
            f'platform property {name[:80]}: expected an amount of memory such as "512M", "4GB" or "1GiB", '
            f"got {value[:80]!r}"
        )
    if match[2] is not None:
        unit = (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]
    elif value.strip().lower().endswith("b"):
        unit = 1
    return math.ceil(float(match[1]) * unit)
