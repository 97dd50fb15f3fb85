"""The order of the queue, simulated on a virtual clock: fair to builds, nothing waits forever, nothing idles."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expbuild.execution.resources import NOTHING, Capacity, Resources
from expbuild.execution.scheduler import OVERDUE_S, OVERDUE_TURN, QueuedAction, Scheduler, WorkerView
from expbuild.platform_properties import PropertyList, WorkerProperties

HOST: PropertyList = (("kind", "host"),)
DOCKER: PropertyList = (("kind", "docker"),)
ANY: PropertyList = ()


@dataclass
class Simulation:
    """A pool on a clock of its own: actions take the time a test says, and free their slot exactly then."""

    scheduler: Scheduler
    workers: Sequence[WorkerView]
    capacity: Capacity = field(default_factory=Capacity)
    now_s: float = 0.0
    started: list[tuple[float, str]] = field(default_factory=list)
    running: list[tuple[float, str, str]] = field(default_factory=list)
    actions: dict[str, tuple[QueuedAction, float]] = field(default_factory=dict)

    def add(self, name: str, build: str = "", *, takes_s: float = 1.0, **fields: object) -> None:
        values: dict[str, object] = {"platform": ANY, "priority": 0, **fields}
        action = QueuedAction(name, sequence=len(self.actions), build=build, queued_at_s=self.now_s, **values)  # type: ignore[arg-type]
        self.actions[name] = (action, takes_s)
        self.scheduler.add(action)

    def used(self) -> Resources:
        return sum((self.actions[name][0].resources for _, _, name in self.running), NOTHING)

    def idle(self) -> list[str]:
        busy = {worker for _, worker, _ in self.running}
        return [view.name for view in self.workers if view.name not in busy]

    def step(self) -> list[str]:
        """Assign what can be; return what started. Then nothing that could start may be left waiting."""
        begun = []
        for assignment in self.scheduler.assign(self.idle(), self.used(), self.now_s):
            action, takes_s = self.actions[assignment.execution]
            view = next(view for view in self.workers if view.name == assignment.worker)
            assert view.properties.satisfies(action.platform)
            heapq.heappush(self.running, (self.now_s + takes_s, assignment.worker, assignment.execution))
            self.started.append((self.now_s, assignment.execution))
            begun.append(assignment.execution)
        self.check_nothing_idles()
        return begun

    def check_nothing_idles(self) -> None:
        idle, used = set(self.idle()), self.used()
        fits = [a for a in self.scheduler if not self.capacity.short_of(used, a.resources)]
        if any(a.queued_at_s + OVERDUE_S <= self.now_s for a in self.scheduler if a not in fits):
            fits = [a for a in fits if a.resources == NOTHING]  # cores and memory are being kept together for it
        for action in fits:
            assert idle.isdisjoint(self.scheduler.eligible(action)), f"{action.id} waits beside an idle worker"

    def release(self) -> None:
        """Let the next action end."""
        self.now_s, _, _ = heapq.heappop(self.running)

    def run(self) -> list[str]:
        """Run until nothing waits or runs; return the order in which actions started."""
        self.step()
        while self.running:
            self.release()
            self.step()
        assert len(self.scheduler) == 0, "something waits, and nothing runs"
        return [name for _, name in self.started]


def simulation(*kinds: str, capacity: Capacity | None = None) -> Simulation:
    workers = [WorkerView(f"{kind}-{i}", WorkerProperties([("kind", kind)])) for i, kind in enumerate(kinds)]
    capacity = capacity or Capacity()
    return Simulation(Scheduler(workers, capacity), workers, capacity)


def test_a_small_build_starts_within_two_slot_releases_of_a_huge_one() -> None:
    """A has a thousand waiting, B asks for one."""
    pool = simulation("host", "host")
    for i in range(1000):
        pool.add(f"a{i}", "A", takes_s=1 + i % 7)
    pool.step()
    for _ in range(60):  # long enough for the first of A to be overdue
        pool.release()
        pool.step()
    pool.add("b", "B")
    releases = 0
    while "b" not in pool.step():
        pool.release()
        releases += 1
    assert releases <= 2


def test_builds_take_turns() -> None:
    """Whatever their sizes."""
    pool = simulation("host")
    for build, count in (("A", 4), ("B", 2), ("C", 1)):
        for i in range(count):
            pool.add(f"{build}{i}", build)
    assert pool.run() == ["A0", "B0", "C0", "A1", "B1", "A2", "A3"]


def test_what_takes_longest_goes_first_within_a_build() -> None:
    """As far as earlier durations tell; the unknown keep their order behind."""
    pool = simulation("host")
    for name, expected_s in (("unknown-1", 0.0), ("short", 1.0), ("long", 9.0), ("unknown-2", 0.0)):
        pool.add(name, "A", expected_s=expected_s)
    assert pool.run() == ["long", "short", "unknown-1", "unknown-2"]


def test_nothing_waits_forever_behind_a_higher_priority() -> None:
    """Urgent actions arrive faster than they can be run, and still the patient one gets its turn."""
    pool = simulation("host")
    pool.add("patient", "B", priority=100)
    for i in range(200):
        pool.add(f"urgent{i}", "A", priority=-100)
        if pool.running:
            pool.release()
        if "patient" in pool.step():
            break
    assert OVERDUE_S <= pool.now_s <= OVERDUE_S + OVERDUE_TURN + 1


def test_memory_is_kept_together_for_who_waits_too_long() -> None:
    """Small ones would fit into the gaps for ever."""
    pool = simulation("host", "host", "host", capacity=Capacity(memory_bytes=100))
    for i in range(2):
        pool.add(f"first{i}", "A", takes_s=2.0 + i, resources=Resources(0, 50))
    pool.step()
    pool.add("big", "B", priority=1, resources=Resources(0, 100))
    for i in range(500):
        pool.add(f"small{i}", "A", takes_s=1.0, resources=Resources(0, 30))
        if "big" in pool.step():
            break
        pool.release()
    assert pool.now_s <= OVERDUE_S + 5


def test_position_counts_the_turns_of_others() -> None:
    """Where one stands when builds take turns."""
    pool = simulation("host")
    for i in range(10):
        pool.add(f"a{i}", "A")
    pool.add("b0", "B")
    pool.add("urgent", "C", priority=-1)
    assert pool.scheduler.position("urgent") == 1
    assert pool.scheduler.position("b0") == 3
    assert pool.scheduler.position("a9") == 12


def test_a_worker_that_failed_is_avoided_while_there_is_another() -> None:
    """And taken when there is none."""
    pool = simulation("host", "host")
    pool.add("a", avoid=frozenset({"host-0"}))
    pool.step()
    assert pool.running[0][1] == "host-1"
    only = simulation("host")
    only.add("a", avoid=frozenset({"host-0"}))
    assert only.run() == ["a"]


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from("ABCDE"),
        st.integers(-2, 2),
        st.sampled_from([ANY, HOST, DOCKER]),
        st.sampled_from([0, 0, 10, 60, 100]),
        st.floats(0.1, 50),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(_ACTIONS, st.lists(st.sampled_from(["host", "docker"]), max_size=3))
def test_everything_starts_once_and_no_worker_idles(
    actions: list[tuple[str, int, PropertyList, int, float, int]], kinds: list[str]
) -> None:
    """Whatever arrives and when: `step` checks at each event that nothing runnable waits beside an idle worker."""
    pool = simulation("host", "docker", *kinds, capacity=Capacity(memory_bytes=100))
    for i, (build, priority, platform, memory, takes_s, releases) in enumerate(actions):
        for _ in range(min(releases, len(pool.running))):
            pool.release()
            pool.step()
        pool.add(f"{i}", build, takes_s=takes_s, priority=priority, platform=platform, resources=Resources(0, memory))
        pool.step()
    order = pool.run()
    assert sorted(order, key=int) == [str(i) for i in range(len(actions))]


@pytest.mark.parametrize("position", range(5))
def test_removing_keeps_the_order_of_the_others(position: int) -> None:
    """A cancelled action leaves no hole."""
    pool = simulation("host")
    for i in range(5):
        pool.add(f"{i}", "A")
    pool.scheduler.remove(f"{position}")
    pool.scheduler.remove(f"{position}")  # harmless
    assert pool.run() == [f"{i}" for i in range(5) if i != position]
