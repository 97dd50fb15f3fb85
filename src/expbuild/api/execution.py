"""Execution: operations as streams. The executions themselves belong to the manager; here they are only watched."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from expbuild.api.capabilities import MAX_PRIORITY, MIN_PRIORITY
from expbuild.api.inlining import InlineWishes
from expbuild.api.instances import Instances
from expbuild.api.messages import request_digest
from expbuild.api.operations import to_operation
from expbuild.api.rpc import ServicerContext, request_metadata
from expbuild.digest import DigestFunctions
from expbuild.execution.manager import ExecuteCall, ExecutionManager
from expbuild.execution.operations import Operation as OperationHandle
from expbuild.reapi import (
    ExecuteRequest,
    ExecutionServicer,
    Operation,
    WaitExecutionRequest,
)
from expbuild.storage.base import BlobStore


class ExecutionService(ExecutionServicer):
    """Execute and WaitExecution."""

    def __init__(
        self, manager: ExecutionManager, blobs: BlobStore, functions: DigestFunctions, instances: Instances
    ) -> None:
        self._manager = manager
        self._blobs = blobs
        self._functions = functions
        self._instances = instances

    async def Execute(self, request: ExecuteRequest, context: ServicerContext) -> AsyncIterator[Operation]:
        caller = request_metadata(context)
        call = ExecuteCall(
            instance_name=self._instances.resolve(request.instance_name),
            action_digest=request_digest(self._functions, request, "action_digest"),
            skip_cache_lookup=request.skip_cache_lookup,
            priority=min(max(request.execution_policy.priority, MIN_PRIORITY), MAX_PRIORITY),
            invocation_id=caller.tool_invocation_id,
            peer=context.peer().rpartition(":")[0],  # without the port: a client may have many connections
            # A genrule may make a directory where it declares a file: Bazel allows that locally and takes it from us.
            accepts_directories=caller.tool_details.tool_name == "bazel",
        )
        wishes = InlineWishes(request.inline_stdout, request.inline_stderr, request.inline_output_files)
        operation = await self._manager.execute(call)
        async with aclosing(self._stream(operation, wishes)) as messages:
            async for message in messages:
                yield message

    async def WaitExecution(self, request: WaitExecutionRequest, context: ServicerContext) -> AsyncIterator[Operation]:
        operation = self._manager.operation(request.name)
        async with aclosing(self._stream(operation, InlineWishes())) as messages:
            async for message in messages:
                yield message

    async def _stream(self, operation: OperationHandle, wishes: InlineWishes) -> AsyncGenerator[Operation, None]:
        async with aclosing(self._manager.watch(operation)) as states:
            async for state in states:
                yield await to_operation(state, self._blobs, wishes)
