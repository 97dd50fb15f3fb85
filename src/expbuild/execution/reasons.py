"""Why an action waits, in a word for programs and a sentence for people. Every queued action has one, at any time."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


class WaitKind(enum.Enum):
    """What an action waits for. The values are what clients, log and `re-server why` see."""

    NO_IDLE_WORKER = "no_idle_worker"
    WORKER_OFFLINE = "worker_offline"
    IMAGE_PULLING = "image_pulling"
    WAITING_FOR_MEMORY = "waiting_for_memory"
    WAITING_FOR_CPU = "waiting_for_cpu"
    DRAINING = "draining"
    PREPARING = "preparing"


@dataclass(frozen=True, slots=True)
class WaitReason:
    """Why one action waits now. position: its place among all that wait, from 1; 0 where there is no order."""

    kind: WaitKind
    text: str
    position: int = 0


@dataclass(frozen=True, slots=True)
class SlotView:
    """One worker that could run the action: whose build it works for ("" when idle), or why it cannot be used."""

    worker: str
    build: str = ""
    offline_reason: str = ""
    is_pulling: bool = False


def explain_wait(
    slots: Sequence[SlotView], *, position: int, queued: int, short_of: str, wanted: str, used: str, draining: bool
) -> WaitReason:
    """Return why an action waits.

    slots: the workers that satisfy it. short_of: "cpu" or "memory" when the pool lacks it, with the amounts in words.
    """
    if draining:
        return WaitReason(WaitKind.DRAINING, "the server is shutting down: it ends what runs and starts nothing new")
    offline = [slot for slot in slots if slot.offline_reason]
    if len(offline) == len(slots):
        return _all_offline(offline, position)
    place = f"position {position} of {queued} in the queue"
    if short_of:
        kind = WaitKind.WAITING_FOR_MEMORY if short_of == "memory" else WaitKind.WAITING_FOR_CPU
        text = f"it asks for {wanted}, and running actions hold {used} of the pool's; {place}"
        return WaitReason(kind, text, position)
    busy = Counter(slot.build or "a build without a name" for slot in slots if not slot.offline_reason)
    builds = ", ".join(f"{name}: {count}" for name, count in busy.most_common(5))
    more = f" and {len(busy) - 5} more builds" if len(busy) > 5 else ""
    away = f"; {len(offline)} more offline ({offline[0].worker}: {offline[0].offline_reason})" if offline else ""
    workers = _count(len(slots) - len(offline), "matching worker")
    text = f"no idle worker: {workers} taken ({builds}{more}){away}; {place}"
    return WaitReason(WaitKind.NO_IDLE_WORKER, text, position)


def _all_offline(offline: Sequence[SlotView], position: int) -> WaitReason:
    pulling = next((slot for slot in offline if slot.is_pulling), None)
    if pulling is not None:
        return WaitReason(WaitKind.IMAGE_PULLING, f"{pulling.worker}: {pulling.offline_reason}", position)
    first = offline[0]
    workers = _count(len(offline), "matching worker")
    text = f"{workers} offline, tried again every few seconds; {first.worker}: {first.offline_reason}"
    return WaitReason(WaitKind.WORKER_OFFLINE, text, position)


def _count(number: int, noun: str) -> str:
    return f"the only {noun} is" if number == 1 else f"all {number} {noun}s are"
