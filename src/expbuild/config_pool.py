"""The `[execution]` tables of the configuration: the queue, its times and what it may take."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic import ValidationInfo as Info

from expbuild.config_problems import Expect
from expbuild.config_types import LIST, Count, Seconds, Table, rule
from expbuild.config_workers import HostWorkerConfig, WorkerConfig

Bytes = Annotated[int, Field(ge=4096, lt=1 << 63), Expect("at least 4096 bytes")]


def _check_max_timeout(max_timeout_s: float, info: Info) -> float:
    default_s = info.data.get("default_task_timeout_seconds", 0)
    if max_timeout_s < default_s:
        raise rule(f"expected at least default_task_timeout_seconds ({default_s:g}), got {max_timeout_s:g}")
    return max_timeout_s


def _check_slot_uids(workers: tuple[WorkerConfig, ...]) -> tuple[WorkerConfig, ...]:
    """Slots are numbered through, so one range is shared; two that overlap would give two slots one user."""
    ranges = sorted({worker.slot_uids for worker in workers if isinstance(worker, HostWorkerConfig)})
    for (first, last), (next_first, next_last) in itertools.pairwise(ranges):
        if next_first <= last:
            raise rule(
                f"expected slot_uids of the host workers equal or apart, got [{first}, {last}] and "
                f"[{next_first}, {next_last}]"
            )
    return workers


class PoolConfig(Table):
    """`[execution.pool]`: the queue, its times and the workers."""

    max_queue_size: Count = 1000
    """Actions that may wait; past it, Execute is answered RESOURCE_EXHAUSTED."""
    queue_timeout_seconds: Seconds | None = None
    """An action that gets no worker in this time ends as RESOURCE_EXHAUSTED, with the reason; by default it waits."""
    cpu_cores: Annotated[float, Field(ge=0.01, le=100_000), Expect("a number of cores of at least 0.01")] | None = None
    """Cores that actions may ask for together (`resources:cpu`, `EstimatedCPU`, `min-cores`). By default any."""
    memory_bytes: Bytes | None = None
    """Memory that actions may ask for together (`resources:memory`, `EstimatedMemory`, `min-mem`). By default any."""
    scheduler_interval_ms: Annotated[int, Field(ge=1, le=60_000), Expect("an integer from 1 to 60000")] = 100
    """The longest time between two looks at the queue; events wake the scheduler at once."""
    default_task_timeout_seconds: Seconds = 3600.0
    """The timeout of an action that names none."""
    max_task_timeout_seconds: Annotated[Seconds, AfterValidator(_check_max_timeout)] = Field(
        default_factory=lambda data: max(86_400.0, data["default_task_timeout_seconds"])
    )
    """The longest timeout an action may ask for. By default a day, or the default timeout where that is longer."""
    result_ttl_seconds: Seconds = 300.0
    """How long a finished operation stays attachable."""
    abandoned_grace_seconds: Seconds = 300.0
    """An execution that nobody watches any more is cancelled after this long."""
    max_log_bytes: Bytes = 64 << 20
    """A command that writes more than this to stdout, or to stderr, is killed."""
    max_output_bytes: Bytes = 32 << 30
    """An action whose outputs are larger than this together is refused; no file of a host action grows larger."""
    workers: Annotated[tuple[WorkerConfig, ...], LIST, AfterValidator(_check_slot_uids)] = Field(
        default_factory=lambda: (HostWorkerConfig(),)
    )
    """What runs the actions, in order of preference. At least one while `capabilities.exec_enabled`."""


class ExecutionConfig(Table):
    """`[execution]`."""

    backend: Literal["pool"] = "pool"
    """Where actions run: in the pool of this process."""
    pool: PoolConfig = Field(default_factory=PoolConfig)
