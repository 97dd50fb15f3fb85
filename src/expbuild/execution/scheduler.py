"""Which queued action runs on which idle worker. No I/O and no clock: time comes in as a number.

The order. A lower priority number goes first. Among equal ones builds take turns, so that one with a thousand actions
waiting and one with a single action get the next slots alternately; within a build the action expected to take longest
goes first, then the one that came first. Every fourth turn belongs to the action that has waited longest, if that is
over OVERDUE_S: nothing waits forever, whatever the priorities. For an overdue action that lacks cores or memory these
are kept together: until it starts, others that ask for any do not.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from expbuild.errors import NoMatchingWorker
from expbuild.execution.resources import NOTHING, Capacity, Resources
from expbuild.platform_properties import PropertyList, WorkerProperties, describe, explain

OVERDUE_S = 60.0
"""Who has waited longer than this gets every OVERDUE_TURN-th turn."""

OVERDUE_TURN = 4

_Rank = tuple[int, float, int]


@dataclass(frozen=True, slots=True)
class QueuedAction:
    """What the scheduler knows of a queued execution.

    build: whose it is; builds take turns. queued_at_s: since when it waits. expected_s: how long it took before, 0 when
    unknown. avoid: workers that failed under it; they are taken only when there is no other.
    """

    id: str
    platform: PropertyList
    priority: int
    sequence: int
    build: str = ""
    queued_at_s: float = 0.0
    expected_s: float = 0.0
    resources: Resources = NOTHING
    avoid: frozenset[str] = frozenset()

    @property
    def rank(self) -> _Rank:
        """Its place in its build: what sorts first goes first."""
        return (self.priority, -self.expected_s, self.sequence)


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


_Demand = tuple[PropertyList, Resources, frozenset[str]]


@dataclass(slots=True)
class _Line:
    """The queued actions of one build that ask for the same: in their order, and in order of arrival."""

    ranks: list[_Rank] = field(default_factory=list)
    arrivals: deque[QueuedAction] = field(default_factory=deque)


@dataclass(slots=True)
class _Build:
    last_turn: int = 0
    lines: dict[_Demand, _Line] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(line.ranks) for line in self.lines.values())


class Scheduler:
    """The queue of the pool, and who is next.

    workers: every configured worker, in order of preference. capacity: what running actions may take together.
    """

    def __init__(self, workers: Sequence[WorkerView], capacity: Capacity) -> None:
        self._workers = list(workers)
        self._capacity = capacity
        self._actions: dict[str, QueuedAction] = {}
        self._by_sequence: dict[int, QueuedAction] = {}
        self._builds: dict[str, _Build] = {}
        self._eligible: dict[tuple[PropertyList, frozenset[str]], frozenset[str]] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._actions)

    def __iter__(self) -> Iterator[QueuedAction]:
        """Iterate over what waits, in order of arrival."""
        return iter(self._actions.values())

    def add(self, action: QueuedAction) -> None:
        """Queue an action. Its sequence number must be its own."""
        build = self._builds.setdefault(action.build, _Build())
        line = build.lines.setdefault(_demand_of(action), _Line())
        insort(line.ranks, action.rank)
        line.arrivals.append(action)
        self._actions[action.id] = action
        self._by_sequence[action.sequence] = action

    def remove(self, action_id: str) -> None:
        """Take an action out of the queue; harmless when it is not there."""
        action = self._actions.pop(action_id, None)
        if action is None:
            return
        del self._by_sequence[action.sequence]
        build, demand = self._builds[action.build], _demand_of(action)
        line = build.lines[demand]
        del line.ranks[bisect_left(line.ranks, action.rank)]
        if not line.ranks:
            del build.lines[demand]
            if not build.lines:
                del self._builds[action.build]

    def eligible(self, action: QueuedAction) -> frozenset[str]:
        """Return the workers, idle or not, that may run an action; those that failed under it only if all have."""
        key = (action.platform, action.avoid)
        names = self._eligible.get(key)
        if names is None:
            if len(self._eligible) > 10_000:  # platforms are the clients' to invent
                self._eligible.clear()
            every = frozenset(w.name for w in self._workers if w.properties.satisfies(action.platform))
            names = self._eligible[key] = every - action.avoid or every
        return names

    def assign(self, idle: Sequence[str], used: Resources, now_s: float) -> list[Assignment]:
        """Give idle workers to queued actions, and take these out of the queue.

        idle: in order of preference. used: what running actions take. An action gets the first idle worker that
        satisfies it; one that none satisfies does not hold up the others.
        """
        free = list(idle)
        assignments = []
        while free and self._actions:
            action = self._next(frozenset(free), used, now_s)
            if action is None:
                break
            worker = next(name for name in free if name in self.eligible(action))
            assignments.append(Assignment(action.id, worker))
            free.remove(worker)
            used = used + action.resources
            self._turn += 1
            self._builds[action.build].last_turn = self._turn
            self.remove(action.id)
        return assignments

    def position(self, action_id: str) -> int:
        """Return how many actions go before this one, plus one, if nothing arrives meanwhile and any worker will do."""
        action = self._actions[action_id]
        own = sum(bisect_left(line.ranks, action.rank) for line in self._builds[action.build].lines.values())
        first = (action.priority,)
        more_urgent = sum(bisect_left(line.ranks, first) for line in self._builds[action.build].lines.values())
        turns = own - more_urgent + 1
        before = own
        for name, build in self._builds.items():
            if name == action.build:
                continue
            for line in build.lines.values():
                urgent = bisect_left(line.ranks, first)
                equal = bisect_left(line.ranks, (action.priority + 1,)) - urgent
                before += urgent + min(equal, turns)
        return before + 1

    def check_satisfiable(self, requested: PropertyList) -> None:
        """Raise NoMatchingWorker when none of the configured workers could ever run an action that asks for this."""
        if not self._workers:
            raise NoMatchingWorker("no workers are configured (execution.pool.workers): nothing can be executed here")
        nearest = min(self._workers, key=lambda worker: len(worker.properties.mismatches(requested)))
        mismatches = nearest.properties.mismatches(requested)
        if not mismatches:
            return
        raise NoMatchingWorker(
            f"no configured worker satisfies the platform properties {describe(requested)}. The nearest is "
            f"{nearest.name} ({nearest.properties}), but {explain(mismatches)}. "
            "Change exec_properties of the action or the workers of the server."
        )

    def _next(self, free: frozenset[str], used: Resources, now_s: float) -> QueuedAction | None:
        overdue = self._overdue(free, now_s)
        reserving = overdue is not None and bool(self._capacity.short_of(used, overdue.resources))
        if overdue is not None and not reserving and self._turn % OVERDUE_TURN == OVERDUE_TURN - 1:
            return overdue
        best: tuple[int, int, _Rank] | None = None
        for build in self._builds.values():
            for demand, line in build.lines.items():
                rank = line.ranks[0]
                key = (rank[0], build.last_turn, rank)
                if (best is None or key < best) and self._can_start(demand, free, used, reserving=reserving):
                    best = key
        return None if best is None else self._by_sequence[best[2][2]]

    def _can_start(self, demand: _Demand, free: frozenset[str], used: Resources, *, reserving: bool) -> bool:
        platform, resources, avoid = demand
        if resources != NOTHING and (reserving or self._capacity.short_of(used, resources)):
            return False
        names = self._eligible.get((platform, avoid))
        if names is None:
            names = self.eligible(QueuedAction("", platform, 0, 0, avoid=avoid))
        return not free.isdisjoint(names)

    def _overdue(self, free: frozenset[str], now_s: float) -> QueuedAction | None:
        """Return the action that has waited longest and too long, of those an idle worker satisfies."""
        oldest: QueuedAction | None = None
        for build in self._builds.values():
            for line in build.lines.values():
                while self._actions.get(line.arrivals[0].id) is not line.arrivals[0]:
                    line.arrivals.popleft()
                first = line.arrivals[0]
                if first.queued_at_s + OVERDUE_S > now_s or free.isdisjoint(self.eligible(first)):
                    continue
                if oldest is None or first.queued_at_s < oldest.queued_at_s:
                    oldest = first
        return oldest


def _demand_of(action: QueuedAction) -> _Demand:
    return (action.platform, action.resources, action.avoid)
