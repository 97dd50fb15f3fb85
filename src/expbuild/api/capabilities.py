"""Capabilities: what this server does, said so that every client starts."""

from __future__ import annotations

from collections.abc import Sequence

from expbuild.api.auth import Right, current_caller
from expbuild.api.compression import Compressor
from expbuild.api.instances import Instances
from expbuild.api.rpc import ServicerContext
from expbuild.config import CapabilitiesConfig
from expbuild.reapi import (
    CapabilitiesServicer,
    GetCapabilitiesRequest,
    PriorityCapabilities,
    SemVer,
    ServerCapabilities,
    SymlinkAbsolutePathStrategy,
)

MAX_ADVERTISED_BATCH_BYTES = 4_000_000
"""Clients fill batches to the byte we advertise; with the envelope that must stay below their 4 MiB limit."""

MIN_PRIORITY, MAX_PRIORITY = -1000, 1000


class CapabilitiesService(CapabilitiesServicer):
    """Answers GetCapabilities from memory: it is every client's first call.

    Who may only read is told that nothing is executed and no action result taken: clients then do not try.
    """

    def __init__(self, config: CapabilitiesConfig, compressors: Sequence[Compressor], instances: Instances) -> None:
        self._answer = _capabilities(config, compressors)
        read_only = {"exec_enabled": False, "action_cache_update_enabled": False}
        self._answer_to_readers = _capabilities(config.model_copy(update=read_only), compressors)
        self._instances = instances

    async def GetCapabilities(self, request: GetCapabilitiesRequest, context: ServicerContext) -> ServerCapabilities:
        self._instances.resolve(request.instance_name)
        return self._answer if current_caller().right >= Right.WRITE else self._answer_to_readers


def _capabilities(config: CapabilitiesConfig, compressors: Sequence[Compressor]) -> ServerCapabilities:
    # The lowest version is 2.0 because old clients refuse anything above; from 2.1 on they send output_paths, from
    # 2.2 on the platform in the Action.
    answer = ServerCapabilities(low_api_version=SemVer(major=2, minor=0), high_api_version=SemVer(major=2, minor=3))
    functions = [function.value for function in config.digest_functions]
    cache = answer.cache_capabilities
    cache.digest_functions.extend(functions)  # type: ignore[arg-type]  # our enum has the wire's numbers
    cache.action_cache_update_capabilities.update_enabled = config.action_cache_update_enabled
    cache.cache_priority_capabilities.CopyFrom(_priorities())
    cache.max_batch_total_size_bytes = min(config.max_batch_total_size_bytes, MAX_ADVERTISED_BATCH_BYTES)
    cache.symlink_absolute_path_strategy = SymlinkAbsolutePathStrategy.Value.Value(
        config.symlink_absolute_path_strategy
    )
    numbers = [compressor.value for compressor in compressors]
    cache.supported_compressors.extend(numbers)  # type: ignore[arg-type]  # the same
    cache.supported_batch_update_compressors.extend(numbers)  # type: ignore[arg-type]  # the same
    if config.exec_enabled:
        execution = answer.execution_capabilities
        execution.exec_enabled = True
        execution.digest_function = functions[0]  # type: ignore[assignment]  # the same
        execution.digest_functions.extend(functions)  # type: ignore[arg-type]  # the same
        execution.execution_priority_capabilities.CopyFrom(_priorities())
    return answer


def _priorities() -> PriorityCapabilities:
    return PriorityCapabilities(
        priorities=[PriorityCapabilities.PriorityRange(min_priority=MIN_PRIORITY, max_priority=MAX_PRIORITY)]
    )
