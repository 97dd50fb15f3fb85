"""The scheduler as a table: queued, idle, expected assignments."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expbuild.errors import NoMatchingWorker
from expbuild.execution.resources import NOTHING, Capacity
from expbuild.execution.scheduler import Assignment, QueuedAction, Scheduler, WorkerView
from expbuild.platform_properties import PropertyList, WorkerProperties

HOST: PropertyList = (("kind", "host"),)
DOCKER: PropertyList = (("kind", "docker"),)
ANY: PropertyList = ()


def worker(name: str) -> WorkerView:
    """A worker of the kind its name begins with."""
    return WorkerView(name, WorkerProperties([("kind", name.partition("-")[0]), ("shared", "yes")]))


def queued(*actions: tuple[str, PropertyList, int]) -> list[QueuedAction]:
    """Actions in order of arrival: id, platform, priority."""
    return [QueuedAction(id_, platform, priority, i) for i, (id_, platform, priority) in enumerate(actions)]


def assign(actions: Sequence[QueuedAction], idle: Sequence[WorkerView]) -> list[Assignment]:
    """Queue actions in this order, and give them idle workers once."""
    scheduler = Scheduler(idle, Capacity())
    for action in actions:
        scheduler.add(action)
    return scheduler.assign([view.name for view in idle], NOTHING, now_s=0.0)


def check_satisfiable(requested: PropertyList, workers: Sequence[WorkerView]) -> None:
    Scheduler(workers, Capacity()).check_satisfiable(requested)


@pytest.mark.parametrize(
    ("actions", "idle", "expected"),
    [
        pytest.param([], ["host-0"], {}, id="empty-queue"),
        pytest.param([("a", ANY, 0)], [], {}, id="no-worker"),
        pytest.param([("a", ANY, 0)], ["host-0"], {"a": "host-0"}, id="one-each"),
        pytest.param(
            [("a", ANY, 0), ("b", ANY, 0), ("c", ANY, 0)],
            ["host-0", "host-1"],
            {"a": "host-0", "b": "host-1"},
            id="first-come-first-served",
        ),
        pytest.param(
            [("late", ANY, 5), ("normal", ANY, 0), ("urgent", ANY, -5)],
            ["host-0", "host-1"],
            {"urgent": "host-0", "normal": "host-1"},
            id="lower-priority-number-first",
        ),
        pytest.param(
            [("a", DOCKER, 0), ("b", DOCKER, 0), ("c", HOST, 0)],
            ["host-0"],
            {"c": "host-0"},
            id="what-does-not-match-does-not-block",
        ),
        pytest.param(
            [("urgent", DOCKER, -9), ("a", HOST, 9)],
            ["host-0"],
            {"a": "host-0"},
            id="nor-does-it-when-it-is-urgent",
        ),
        pytest.param(
            [("a", ANY, 0), ("b", ANY, 0)],
            ["docker-0", "host-0"],
            {"a": "docker-0", "b": "host-0"},
            id="configuration-order-is-preference",
        ),
        pytest.param(
            [("a", HOST, 0), ("b", ANY, 0)],
            ["docker-0", "host-0"],
            {"a": "host-0", "b": "docker-0"},
            id="each-where-it-fits",
        ),
        pytest.param([("a", (("kind", "moon"),), 0)], ["host-0"], {}, id="impossible-waits"),
    ],
)
def test_assign(actions: list[tuple[str, PropertyList, int]], idle: list[str], expected: dict[str, str]) -> None:
    """Who runs where."""
    assignments = assign(queued(*actions), [worker(name) for name in idle])
    assert {a.execution: a.worker for a in assignments} == expected
    assert len(assignments) == len(expected)


def test_assign_orders_by_arrival_not_by_place_in_the_list() -> None:
    """A requeued execution keeps its place."""
    first, second = queued(("a", ANY, 0), ("b", ANY, 0))
    assert assign([second, first], [worker("host-0")]) == [Assignment("a", "host-0")]


_PLATFORMS = st.sampled_from([ANY, HOST, DOCKER, (("shared", "yes"),), (("kind", "moon"),)])
_ACTIONS = st.lists(st.tuples(_PLATFORMS, st.integers(-3, 3)), max_size=12)
_IDLE = st.lists(st.sampled_from(["host", "docker"]), max_size=6)


@given(_ACTIONS, _IDLE)
def test_assign_wastes_nothing_and_gives_nothing_twice(
    actions: list[tuple[PropertyList, int]], kinds: list[str]
) -> None:
    """No idle worker is left over that a waiting action could use, and order is kept among equals."""
    queue = queued(*((f"action-{i}", platform, priority) for i, (platform, priority) in enumerate(actions)))
    idle = [worker(f"{kind}-{i}") for i, kind in enumerate(kinds)]
    assignments = assign(queue, idle)
    given_, taken = [a.execution for a in assignments], [a.worker for a in assignments]
    assert len(set(given_)) == len(given_)
    assert len(set(taken)) == len(taken)
    by_id, by_name = {action.id: action for action in queue}, {view.name: view for view in idle}
    for execution, name in zip(given_, taken, strict=True):
        assert by_name[name].properties.satisfies(by_id[execution].platform)
    waiting = [action for action in queue if action.id not in given_]
    for view in idle:
        if view.name not in taken:
            assert not any(view.properties.satisfies(action.platform) for action in waiting)
    for action in waiting:
        for other in (by_id[execution] for execution in given_):
            if other.platform == action.platform:
                assert (other.priority, other.sequence) < (action.priority, action.sequence)


def test_check_satisfiable_accepts_what_any_worker_can_run() -> None:
    """Also when it is not the first."""
    check_satisfiable(DOCKER, [worker("host-0"), worker("docker-0")])
    check_satisfiable(ANY, [worker("host-0")])


@pytest.mark.parametrize(
    ("requested", "names", "said"),
    [
        pytest.param(ANY, [], ["no workers are configured", "execution.pool.workers"], id="no-workers"),
        pytest.param(
            (("kind", "moon"), ("shared", "yes")),
            ["host-0", "docker-0"],
            ["kind=moon, shared=yes", "nearest is host-0", "kind=moon differs from host", "exec_properties"],
            id="the-nearest-and-what-differs",
        ),
        pytest.param(
            (("kind", "docker"), ("shared", "no")),
            ["host-0", "docker-0"],
            ["nearest is docker-0", "shared=no differs from yes"],
            id="nearest-by-number-of-differences",
        ),
        pytest.param((("gpu", "1"),), ["host-0"], ["gpu=1 is not declared"], id="unknown-name"),
    ],
)
def test_check_satisfiable_explains_what_can_never_run(
    requested: PropertyList, names: list[str], said: list[str]
) -> None:
    """The requested properties, the nearest worker, and what to change."""
    with pytest.raises(NoMatchingWorker) as caught:
        check_satisfiable(requested, [worker(name) for name in names])
    for words in said:
        assert words in str(caught.value)
