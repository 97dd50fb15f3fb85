"""Reading why operations wait, as a client does."""

from __future__ import annotations

import asyncio

from expbuild.reapi import ExecuteOperationMetadata, ListOperationsRequest, Operation, WaitReasonMessage
from tests.support.actions import RPC_TIMEOUT_S, Client, metadata_of


def reason_of(operation: Operation) -> WaitReasonMessage | None:
    metadata: ExecuteOperationMetadata = metadata_of(operation)
    for auxiliary in metadata.partial_execution_metadata.auxiliary_metadata:
        message = WaitReasonMessage()
        if auxiliary.Unpack(message):
            return message
    return None


async def wait_for_reason(client: Client, name: str, kind: str) -> WaitReasonMessage:
    """Ask for the operations until the one of this name waits for this."""
    found: list[WaitReasonMessage] = []

    async def is_there() -> bool:
        request = ListOperationsRequest()
        listed = await client.operations.ListOperations(request, timeout=RPC_TIMEOUT_S)
        reasons = [reason_of(operation) for operation in listed.operations if operation.name == name]
        found[:] = [reason for reason in reasons if reason is not None and reason.kind == kind]
        return bool(found)

    for _ in range(600):
        if await is_there():
            return found[0]
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name} never waited for {kind}")
