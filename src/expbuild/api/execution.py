"""Execution: operations as streams. The executions themselves belong to the manager; here they are only watched."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from expbuild.api.capabilities import MAX_PRIORITY, MIN_PRIORITY
from expbuild.api.inlining import InlineWishes, inlined
from expbuild.api.instances import Instances
from expbuild.api.messages import request_digest, to_message
from expbuild.api.rpc import ServicerContext, request_metadata
from expbuild.api.status import OK, to_status
from expbuild.digest import DigestFunctions
from expbuild.execution.execution import Execution, Outcome
from expbuild.execution.manager import ExecuteCall, ExecutionManager
from expbuild.execution.manager import Operation as OperationHandle
from expbuild.reapi import (
    ExecuteOperationMetadata,
    ExecuteRequest,
    ExecuteResponse,
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
            async for execution in states:
                message = _running(operation.name, execution)
                if execution.outcome is not None:
                    response = await self._response(execution, execution.outcome, wishes)
                    message.response.Pack(response)
                    message.done = True
                yield message

    async def _response(self, execution: Execution, outcome: Outcome, wishes: InlineWishes) -> ExecuteResponse:
        response = ExecuteResponse(
            status=OK if outcome.error is None else to_status(outcome.error),
            cached_result=outcome.cached,
            message=outcome.message,
        )
        if outcome.result is not None:
            function = execution.action_digest.function
            response.result.CopyFrom(await inlined(outcome.result, wishes, self._blobs, function))
        return response


def _running(name: str, execution: Execution) -> Operation:
    """Return the operation without its response: who runs the action, and how far it is."""
    metadata = ExecuteOperationMetadata(
        stage=execution.stage.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
        action_digest=to_message(execution.action_digest),
        digest_function=execution.action_digest.function.value,  # type: ignore[arg-type]  # the same
        partial_execution_metadata=execution.timeline.metadata(execution.worker),
    )
    operation = Operation(name=name)
    operation.metadata.Pack(metadata)
    return operation
