"""From the workers of the configuration to workers, with what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self, assert_never

from expbuild.config_workers import DockerWorkerConfig, HostWorkerConfig, WorkerConfig
from expbuild.workers.base import Worker
from expbuild.workers.docker import DockerWorker
from expbuild.workers.host import HostWorker
from expbuild.workers.spawner_client import Spawner


class Workers:
    """Every configured worker, in order. As a context it owns what they share: one spawner for all host slots.

    Workers of one kind are numbered through: host-0, host-1, …, docker-0, …
    """

    def __init__(self, configs: Sequence[WorkerConfig]) -> None:
        self._spawner = Spawner()
        numbers: Counter[str] = Counter()
        self.all: list[Worker] = []
        for config in configs:
            for _ in range(config.count):
                self.all.append(self._create(config, numbers[config.type]))
                numbers[config.type] += 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.all:
            await worker.close()
        await self._spawner.close()

    def _create(self, config: WorkerConfig, number: int) -> Worker:
        match config:
            case HostWorkerConfig():
                return HostWorker(f"host-{number}", config, number, self._spawner)
            case DockerWorkerConfig():
                return DockerWorker(f"docker-{number}", config)
            case _:
                assert_never(config)
