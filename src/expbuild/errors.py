"""The one tree of errors.

Each class carries its status code and the data somebody acts on; the words are made from the data. How a code
travels (gRPC status, status of one batch entry, status inside an ExecuteResponse) is decided in `api/status.py` alone.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from expbuild.digest import Digest


class Code(enum.IntEnum):
    """The canonical status codes (google.rpc.Code), by number."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ExpbuildError(Exception):
    """Anything we report on purpose. `str(error)` is a sentence for the person who has to act."""

    code: ClassVar[Code] = Code.INTERNAL


class InvalidArgument(ExpbuildError):
    """The request itself is wrong; sending it again will not help."""

    code = Code.INVALID_ARGUMENT


class InvalidDigest(InvalidArgument):
    """A digest that no blob can have: wrong alphabet, length or size."""


class DigestMismatch(InvalidArgument):
    """Bytes that do not hash to the digest they were sent under. Nothing was stored."""


class OutOfRange(ExpbuildError):
    """A read that starts outside the blob."""

    code = Code.OUT_OF_RANGE


class BlobNotFound(ExpbuildError):
    """A blob that is not stored."""

    code = Code.NOT_FOUND

    def __init__(self, digest: Digest) -> None:
        super().__init__(f"blob {digest} is not in the CAS")
        self.digest = digest


class BlobDamaged(ExpbuildError):
    """A blob found damaged while it was streamed: the stream ends before its last chunk. It is missing from now on."""

    code = Code.ABORTED

    def __init__(self, digest: Digest) -> None:
        super().__init__(f"blob {digest} turned out to be damaged and was removed; upload it again")
        self.digest = digest


class ActionResultNotFound(ExpbuildError):
    """No usable action result: the cache miss clients expect."""

    code = Code.NOT_FOUND


class OperationNotFound(ExpbuildError):
    """An operation name that is unknown, expired or from before a restart."""

    code = Code.NOT_FOUND

    def __init__(self, name: str) -> None:
        super().__init__(
            f"operation {name[:200]!r} is not known here: it never existed, has expired, or the server restarted"
        )
        self.name = name


class MissingBlobs(ExpbuildError):
    """Blobs an action needs and the CAS does not hold. Clients upload exactly these and call again."""

    code = Code.FAILED_PRECONDITION

    def __init__(self, digests: Sequence[Digest]) -> None:
        shown = ", ".join(str(digest) for digest in digests[:5])
        more = f" and {len(digests) - 5} more" if len(digests) > 5 else ""
        super().__init__(f"{len(digests)} blob(s) needed by the action are not in the CAS: {shown}{more}")
        self.digests = tuple(digests)


class NoMatchingWorker(ExpbuildError):
    """No configured worker can ever run the action."""

    code = Code.FAILED_PRECONDITION


class OutputRejected(ExpbuildError):
    """The action left something at a declared output that cannot be returned."""

    code = Code.FAILED_PRECONDITION


class Unauthenticated(ExpbuildError):
    """No credential, or one that is not known."""

    code = Code.UNAUTHENTICATED


class PermissionDenied(ExpbuildError):
    """The caller may not do this here; the message says which setting decides."""

    code = Code.PERMISSION_DENIED


class UploadSuperseded(ExpbuildError):
    """A newer stream took over the upload of the same resource name."""

    code = Code.ABORTED


class StorageFull(ExpbuildError):
    """The disk under a store is full."""

    code = Code.RESOURCE_EXHAUSTED


class StorageUnavailable(ExpbuildError):
    """A store could not be read or written for a reason that is not the caller's."""

    code = Code.UNAVAILABLE


class QueueFull(ExpbuildError):
    """The queue holds as many actions as configured; try again after `retry_after_s`."""

    code = Code.RESOURCE_EXHAUSTED

    def __init__(self, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(f"the queue is full: {limit} actions wait already (execution.pool.max_queue_size)")
        self.retry_after_s = retry_after_s


class QueuedTooLong(ExpbuildError):
    """An action got no worker in the time it may wait; try again after `retry_after_s`."""

    code = Code.RESOURCE_EXHAUSTED

    def __init__(self, timeout_s: float, reason: str, retry_after_s: float = 5.0) -> None:
        super().__init__(
            f"the action waited {timeout_s:g} s for a worker, as long as execution.pool.queue_timeout_seconds allows: "
            f"{reason}"
        )
        self.retry_after_s = retry_after_s


class ActionTimedOut(ExpbuildError):
    """The command ran longer than it was allowed to. Clients compare the text, so it is fixed."""

    code = Code.DEADLINE_EXCEEDED

    def __init__(self) -> None:
        super().__init__("execution timeout exceeded")


class ExecutionCancelled(ExpbuildError):
    """The execution was cancelled by its client."""

    code = Code.CANCELLED

    def __init__(self) -> None:
        super().__init__("the operation was cancelled by its client")


class ExecutionAbandoned(ExpbuildError):
    """The execution was stopped because nobody watched it any more. Who comes back all the same starts it again."""

    code = Code.ABORTED


class WorkerFailed(ExpbuildError):
    """The worker, not the command, failed: its spawner died, its daemon is gone, its disk is broken."""

    code = Code.UNAVAILABLE


class WorkerFull(ExpbuildError):
    """The worker had no room left (disk or inodes) for the action's inputs or outputs."""

    code = Code.RESOURCE_EXHAUSTED


class ShuttingDown(ExpbuildError):
    """The server is stopping; another attempt in a moment finds it (or its successor) again."""

    code = Code.UNAVAILABLE

    def __init__(self, retry_after_s: float = 5.0) -> None:
        super().__init__("the server is shutting down")
        self.retry_after_s = retry_after_s


class Unimplemented(ExpbuildError):
    """An rpc that this server does not serve."""

    code = Code.UNIMPLEMENTED

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not served here")


class InternalError(ExpbuildError):
    """A fault of ours. The log has it under `incident`; the client is told no more than that."""

    def __init__(self) -> None:
        self.incident = secrets.token_hex(6)
        super().__init__(f"internal error; the server's log has it as incident {self.incident}")


class StartupError(ExpbuildError):
    """The server cannot start as configured."""

    code = Code.FAILED_PRECONDITION


class ConfigError(ExpbuildError):
    """A configuration that cannot be used; nothing was started.

    problems: one line each, every problem there is. source: the file, or a word for where the text came from.
    """

    def __init__(self, problems: Sequence[str], source: str) -> None:
        super().__init__("\n".join([f"{source}: {len(problems)} problem(s) in the configuration", *problems]))
        self.problems = tuple(problems)
        self.source = source
