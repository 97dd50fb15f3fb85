"""Operations: the handles clients hold on executions, by name, for as long as they can be attached to."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from expbuild.errors import ExecutionCancelled, OperationNotFound
from expbuild.execution.execution import Execution, Outcome, Stage

MAX_FINISHED = 100_000
"""So many finished executions are kept for their clients, a few KiB each; then the oldest go before their time."""


@dataclass(eq=False, slots=True)
class Operation:
    """One client's handle on an execution. Equal actions in flight share the execution, never the name.

    cancelled: the outcome of this operation alone, once its client has cancelled it.
    """

    name: str
    execution: Execution
    cancelled: Outcome | None = None

    @property
    def outcome(self) -> Outcome | None:
        """How this operation ended; None while it has not."""
        return self.cancelled or self.execution.outcome

    @property
    def stage(self) -> Stage:
        """Where this operation is."""
        return self.execution.stage if self.cancelled is None else Stage.COMPLETED


class Operations:
    """Every operation by name.

    result_ttl_s: how long one is kept after its execution has ended.
    """

    def __init__(self, result_ttl_s: float) -> None:
        self._result_ttl_s = result_ttl_s
        self._by_name: dict[str, Operation] = {}
        self._by_execution: dict[Execution, list[Operation]] = {}
        self._expiries: dict[Execution, asyncio.TimerHandle] = {}

    def __iter__(self) -> Iterator[Operation]:
        """Iterate over the operations known now, oldest first."""
        return iter(list(self._by_name.values()))

    def create(self, execution: Execution) -> Operation:
        """Give an execution one more name, which nobody can guess."""
        name = f"operations/{uuid.uuid4()}"
        if execution.instance_name:
            name = f"{execution.instance_name}/{name}"
        operation = self._by_name[name] = Operation(name, execution)
        self._by_execution.setdefault(execution, []).append(operation)
        return operation

    def get(self, name: str) -> Operation:
        """Return a known operation. Raises OperationNotFound."""
        try:
            return self._by_name[name]
        except KeyError:
            raise OperationNotFound(name) from None

    def cancel(self, operation: Operation) -> bool:
        """Cancel an operation as far as that concerns nobody else.

        Return whether nobody shares its execution; that is then the caller's to stop, and its end is the operation's.
        """
        sharers = self._by_execution.get(operation.execution, ())
        if all(sharer is operation or sharer.cancelled is not None for sharer in sharers):
            return True
        if operation.outcome is None:
            operation.cancelled = Outcome(error=ExecutionCancelled())
            operation.execution.notify()
        return False

    def forget(self, operation: Operation) -> None:
        """Make the name unknown; the execution goes on."""
        self._by_name.pop(operation.name, None)

    def expire_later(self, execution: Execution) -> None:
        """Forget an execution that has ended, after its time."""
        self._expiries[execution] = asyncio.get_running_loop().call_later(self._result_ttl_s, self._expire, execution)
        if len(self._expiries) > MAX_FINISHED:
            self._expire(next(iter(self._expiries)))

    def _expire(self, execution: Execution) -> None:
        self._expiries.pop(execution).cancel()
        for operation in self._by_execution.pop(execution, ()):
            self.forget(operation)
