"""How long actions took before: what comes first in a build is what is expected to take longest."""

from __future__ import annotations

from collections import OrderedDict

from expbuild.execution.action import ActionSpec

MAX_KNOWN = 100_000
"""So many actions are remembered, a few hundred bytes each; the one not seen for longest is forgotten first."""

DurationKey = tuple[str, str]


class Durations:
    """The last durations of actions, known by instance and first output: these stay when sources change."""

    def __init__(self) -> None:
        self._known: OrderedDict[DurationKey, float] = OrderedDict()

    def expected_s(self, key: DurationKey | None) -> float:
        """Return how long the action took when it last ran; 0 when nobody knows."""
        return 0.0 if key is None else self._known.get(key, 0.0)

    def record(self, key: DurationKey | None, duration_s: float) -> None:
        """Remember how long an action took."""
        if key is None:
            return
        self._known[key] = duration_s
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def duration_key(instance_name: str, spec: ActionSpec) -> DurationKey | None:
    """Return what an action is known by; None for one without outputs."""
    outputs = spec.command.outputs
    return (instance_name, "/".join(outputs[0].location)) if outputs else None
