"""What an action used, as clients and tools read it: `auxiliary_metadata` of its result."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from expbuild.execution.execution import Timeline
from expbuild.reapi import ActionResult, ResourceUsage
from expbuild.workers.base import Usage


@dataclass
class Traffic:
    """Files, and their bytes, that went in or came out."""

    files: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """Count one more file."""
        self.files += 1
        self.size_bytes += size_bytes


def attach_usage(result: ActionResult, times: Timeline, usage: Usage, inputs: Traffic, outputs: Traffic) -> None:
    """Add the message to the result's metadata."""
    message = ResourceUsage(
        memory_peak_bytes=usage.memory_peak_bytes or 0,
        memory_peak_is_of_largest_process=usage.memory_peak_is_of_largest,
        input_files=inputs.files,
        input_bytes=inputs.size_bytes,
        output_files=outputs.files,
        output_bytes=outputs.size_bytes,
    )
    if usage.user_cpu_s is not None:
        _set(message.user_cpu, round(usage.user_cpu_s * 1e9))
    if usage.system_cpu_s is not None:
        _set(message.system_cpu, round(usage.system_cpu_s * 1e9))
    _set(message.queued, times.worker_start - times.queued)
    _set(message.input_preparation, times.input_fetch_completed - times.input_fetch_start)
    _set(message.command, times.execution_completed - times.execution_start)
    _set(message.output_storage, times.output_upload_completed - times.output_upload_start)
    result.execution_metadata.auxiliary_metadata.add().Pack(message)


def _set(duration: Duration, nanoseconds: int) -> None:
    duration.FromNanoseconds(nanoseconds)
