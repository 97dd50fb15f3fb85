"""Operations on the wire: their messages, and google.longrunning.Operations to look at and cancel them."""

from __future__ import annotations

import re

from google.protobuf.empty_pb2 import Empty

from expbuild.api.inlining import InlineWishes, inlined
from expbuild.api.messages import to_message
from expbuild.api.rpc import ServicerContext
from expbuild.api.status import OK, to_status
from expbuild.api.trees import with_trees
from expbuild.errors import InvalidArgument, Unimplemented
from expbuild.execution.execution import Execution, Outcome
from expbuild.execution.manager import ExecutionManager
from expbuild.execution.operations import Operation as OperationHandle
from expbuild.execution.reasons import WaitReason
from expbuild.reapi import (
    CancelOperationRequest,
    DeleteOperationRequest,
    ExecuteOperationMetadata,
    ExecuteResponse,
    GetOperationRequest,
    ListOperationsRequest,
    ListOperationsResponse,
    Operation,
    OperationsServicer,
    WaitOperationRequest,
    WaitReasonMessage,
)
from expbuild.storage.base import BlobStore

_PAGE_SIZE = 1000
_PAGE_TOKEN = re.compile(r"[0-9]{1,9}", re.ASCII)


class OperationsService(OperationsServicer):
    """GetOperation, ListOperations, CancelOperation and DeleteOperation. Waiting is WaitExecution's."""

    def __init__(self, manager: ExecutionManager, blobs: BlobStore) -> None:
        self._manager = manager
        self._blobs = blobs

    async def GetOperation(self, request: GetOperationRequest, context: ServicerContext) -> Operation:
        return await to_operation(self._manager.operation(request.name), self._blobs, InlineWishes())

    async def ListOperations(self, request: ListOperationsRequest, context: ServicerContext) -> ListOperationsResponse:
        """Answer without the responses of finished operations; GetOperation has those."""
        if request.filter:
            raise InvalidArgument("ListOperationsRequest.filter is not supported; leave it empty")
        if request.page_size < 0:
            raise InvalidArgument(f"page_size {request.page_size} is negative")
        start = _position(request.page_token)
        operations = [o for o in self._manager.operations() if _belongs(o, request.name)]
        end = start + min(request.page_size or _PAGE_SIZE, _PAGE_SIZE)
        response = ListOperationsResponse(operations=[_running(operation) for operation in operations[start:end]])
        if end < len(operations):
            response.next_page_token = str(end)
        return response

    async def CancelOperation(self, request: CancelOperationRequest, context: ServicerContext) -> Empty:
        self._manager.cancel(self._manager.operation(request.name))
        return Empty()

    async def DeleteOperation(self, request: DeleteOperationRequest, context: ServicerContext) -> Empty:
        self._manager.delete(self._manager.operation(request.name))
        return Empty()

    async def WaitOperation(self, request: WaitOperationRequest, context: ServicerContext) -> Operation:
        raise Unimplemented("WaitOperation (WaitExecution does this)")


async def to_operation(operation: OperationHandle, blobs: BlobStore, wishes: InlineWishes) -> Operation:
    """Return the wire form of an operation as it is now, with its response when it is done."""
    outcome = operation.outcome
    message = _running(operation)
    if outcome is not None:
        message.response.Pack(await _response(operation.execution, outcome, blobs, wishes))
        message.done = True
    return message


async def _response(execution: Execution, outcome: Outcome, blobs: BlobStore, wishes: InlineWishes) -> ExecuteResponse:
    response = ExecuteResponse(
        status=OK if outcome.error is None else to_status(outcome.error),
        cached_result=outcome.cached,
        message=outcome.message,
    )
    if outcome.result is not None:
        result = await with_trees(outcome.result, blobs, execution.action_digest.function)
        response.result.CopyFrom(await inlined(result, wishes, blobs, execution.action_digest.function))
    return response


def _running(operation: OperationHandle) -> Operation:
    """Return the operation without its response: who runs the action, and how far it is."""
    execution = operation.execution
    metadata = ExecuteOperationMetadata(
        stage=operation.stage.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
        action_digest=to_message(execution.action_digest),
        digest_function=execution.action_digest.function.value,  # type: ignore[arg-type]  # the same
        partial_execution_metadata=execution.timeline.metadata(execution.worker),
    )
    reason = None if operation.cancelled is not None else execution.wait_reason
    if reason is not None:
        metadata.partial_execution_metadata.auxiliary_metadata.add().Pack(wait_reason_message(execution, reason))
    message = Operation(name=operation.name)
    message.metadata.Pack(metadata)
    return message


def wait_reason_message(execution: Execution, reason: WaitReason) -> WaitReasonMessage:
    """Return the wire form of why an execution waits."""
    message = WaitReasonMessage(kind=reason.kind.value, text=reason.text, position=reason.position)
    message.waited.FromNanoseconds(execution.clock.now_ns() - execution.timeline.queued)
    return message


def _belongs(operation: OperationHandle, parent: str) -> bool:
    """Whether an operation is below `parent`: an instance name, or one with "/operations" behind it; "" is all."""
    instance_name = operation.execution.instance_name
    return parent in ("", "operations", instance_name, f"{instance_name}/operations")


def _position(token: str) -> int:
    if not token:
        return 0
    if _PAGE_TOKEN.fullmatch(token) is None:
        raise InvalidArgument(f"page_token {token[:40]!r} is not one of ours")
    return int(token)
