"""Which queued action runs on which idle worker: a pure function of what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expbuild.errors import NoMatchingWorker
from expbuild.platform_properties import PropertyList, WorkerProperties, describe, explain


@dataclass(frozen=True, slots=True)
class QueuedAction:
    """What the scheduler knows of a queued execution."""

    id: str
    platform: PropertyList
    priority: int
    sequence: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the scheduler knows of a worker."""

    name: str
    properties: WorkerProperties


@dataclass(frozen=True, slots=True)
class Assignment:
    """This action runs on this worker, now."""

    execution: str
    worker: str


def assign(queued: Sequence[QueuedAction], idle: Sequence[WorkerView]) -> list[Assignment]:
    """Give idle workers to queued actions.

    Lower priority numbers first, then in order of arrival. Among the idle workers that satisfy an action's platform it
    gets the first in configuration order. An action no idle worker satisfies does not hold up those behind it.
    """
    free = list(idle)
    assignments = []
    satisfied: dict[tuple[PropertyList, int], bool] = {}
    for action in sorted(queued, key=lambda action: (action.priority, action.sequence)):
        if not free:
            break
        for worker in free:
            key = (action.platform, id(worker.properties))
            if key not in satisfied:
                satisfied[key] = worker.properties.satisfies(action.platform)
            if satisfied[key]:
                assignments.append(Assignment(action.id, worker.name))
                free.remove(worker)
                break
    return assignments


def check_satisfiable(requested: PropertyList, workers: Sequence[WorkerView]) -> None:
    """Raise NoMatchingWorker when none of the configured workers could ever run an action that asks for this."""
    if not workers:
        raise NoMatchingWorker("no workers are configured (execution.pool.workers), so nothing can be executed here")
    nearest = min(workers, key=lambda worker: len(worker.properties.mismatches(requested)))
    mismatches = nearest.properties.mismatches(requested)
    if not mismatches:
        return
    raise NoMatchingWorker(
        f"no configured worker satisfies the platform properties {describe(requested)}. The nearest is {nearest.name} "
        f"({nearest.properties}), but {explain(mismatches)}. "
        "Change exec_properties of the action or the workers of the server."
    )
