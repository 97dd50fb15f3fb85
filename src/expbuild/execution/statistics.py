"""What the pool has done since it started, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from expbuild.errors import Code
from expbuild.execution.execution import Outcome


@dataclass(slots=True)
class Statistics:
    """Executions by how they ended, since the server started.

    completed: the command ran to its end, whatever its exit code. cached: answered from the action cache.
    merged: calls that joined an equal action in flight. retried: runs taken over by another worker.
    """

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    cached: int = 0
    merged: int = 0
    retried: int = 0

    def count(self, outcome: Outcome) -> None:
        """Count one execution that has ended."""
        if outcome.cached:
            self.cached += 1
        elif outcome.error is None:
            self.completed += 1
        elif outcome.error.code in (Code.CANCELLED, Code.ABORTED):
            self.cancelled += 1
        else:
            self.failed += 1
