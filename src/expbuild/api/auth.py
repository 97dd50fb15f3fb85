"""Who calls, and what they may do: bearer tokens from a file that holds only their hashes.

Each method needs one right; one that nobody has thought of is refused to all. Answers follow what clients act on:
UNAUTHENTICATED makes Bazel refresh its credential once, PERMISSION_DENIED ends the attempt. Tokens appear in no error
and no log line, also not those that are sent in a wrong way.
"""

from __future__ import annotations

import contextvars
import enum
import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from expbuild.errors import InvalidArgument, PermissionDenied, StartupError, Unauthenticated


class Right(enum.IntEnum):
    """What a token allows; a higher right includes the lower ones."""

    NONE = 0
    READ = 1
    """Read the caches and look at operations."""
    WRITE = 2
    """Everything: upload, execute, cancel, write action results."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. name: from the token file; "" where tokens are not in use."""

    name: str
    right: Right


EVERYBODY = Caller("", Right.WRITE)
"""The caller of a server without tokens."""

_NOBODY = Caller("", Right.NONE)
"""The caller of what needs no token, whoever it is."""

_REAPI = "build.bazel.remote.execution.v2"
_RIGHTS: Mapping[str, Right] = {
    # Load balancers and init systems ask, and have no token.
    "grpc.health.v1.Health/Check": Right.NONE,
    "grpc.health.v1.Health/List": Right.NONE,
    "grpc.health.v1.Health/Watch": Right.NONE,
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Right.READ,
    f"{_REAPI}.Capabilities/GetCapabilities": Right.READ,
    f"{_REAPI}.ActionCache/GetActionResult": Right.READ,
    f"{_REAPI}.ActionCache/UpdateActionResult": Right.WRITE,
    f"{_REAPI}.ContentAddressableStorage/BatchReadBlobs": Right.READ,
    f"{_REAPI}.ContentAddressableStorage/BatchUpdateBlobs": Right.WRITE,
    f"{_REAPI}.ContentAddressableStorage/FindMissingBlobs": Right.READ,
    f"{_REAPI}.ContentAddressableStorage/GetTree": Right.READ,
    f"{_REAPI}.ContentAddressableStorage/SplitBlob": Right.READ,
    f"{_REAPI}.ContentAddressableStorage/SpliceBlob": Right.WRITE,
    f"{_REAPI}.Execution/Execute": Right.WRITE,
    f"{_REAPI}.Execution/WaitExecution": Right.READ,
    "google.bytestream.ByteStream/QueryWriteStatus": Right.READ,
    "google.bytestream.ByteStream/Read": Right.READ,
    "google.bytestream.ByteStream/Write": Right.WRITE,
    "google.longrunning.Operations/CancelOperation": Right.WRITE,
    "google.longrunning.Operations/DeleteOperation": Right.WRITE,
    "google.longrunning.Operations/GetOperation": Right.READ,
    # Names of operations cannot be guessed, which is what keeps others from them. This gives them all away.
    "google.longrunning.Operations/ListOperations": Right.WRITE,
    "google.longrunning.Operations/WaitOperation": Right.READ,
}

_TOKEN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,99}"
_TOKEN_LINE = re.compile(
    rf"(?P<name>{_TOKEN_NAME})\s+(?P<right>read|write)\s+sha256:(?P<hash>[0-9a-f]{{64}})", re.ASCII
)

_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller", default=EVERYBODY)


def current_caller() -> Caller:
    """Return who makes the call that is being handled."""
    return _caller.get()


def required_right(method: str) -> Right | None:
    """Return the right a method ("package.Service/Method") needs; None when nobody has said, so nobody has it."""
    return _RIGHTS.get(method)


def hash_token(token: str) -> str:
    """Return what the token file holds of a token: SHA-256 in hex. Tokens are long and random, so that is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_token(name: str, right: Right) -> tuple[str, str]:
    """Return a new token, which nothing else knows, and its line for the token file. Raises InvalidArgument."""
    if re.fullmatch(_TOKEN_NAME, name, re.ASCII) is None:
        raise InvalidArgument(
            f"{name[:100]!r} cannot be the name of a token: it has 1 to 100 letters, digits and characters of _.@+-, "
            "the first of them a letter, a digit or _"
        )
    token = secrets.token_urlsafe(32)
    return token, f"{name} {right.name.lower()} sha256:{hash_token(token)}"


class Authenticator:
    """Checks the bearer token of each call.

    callers: by token hash; None lets everybody do everything.
    """

    def __init__(self, callers: Mapping[str, Caller] | None) -> None:
        self._callers = callers

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything."""
        return self._callers is None

    def identify(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Return the caller of a method, who is from now on the current one. Raises Unauthenticated."""
        if self._callers is None:
            return EVERYBODY
        caller = _NOBODY if required_right(method) is Right.NONE else self._by_token(self._callers, metadata)
        _caller.set(caller)
        return caller

    @staticmethod
    def _by_token(callers: Mapping[str, Caller], metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        for key, value in metadata:
            if key == "authorization" and isinstance(value, str):
                scheme, _, token = value.partition(" ")
                if scheme.lower() != "bearer":  # not quoted: without a scheme, it is the token
                    raise Unauthenticated('the header "authorization" is not of the form "Bearer TOKEN"')
                # Looking up a hash tells nothing by its timing: nobody can choose a hash byte by byte.
                caller = callers.get(hash_token(token.strip()))
                if caller is None:
                    raise Unauthenticated("this bearer token is not known here, or not any more")
                return caller
        raise Unauthenticated('this server needs a bearer token: send the header "authorization: Bearer TOKEN"')


def authorize(caller: Caller, method: str) -> None:
    """Return when the caller may call the method. Raises PermissionDenied."""
    required = required_right(method)
    if required is None:
        raise PermissionDenied(f"no token has the right to call {method}")
    if caller.right < required:
        raise PermissionDenied(
            f"token {caller.name!r} has the right {caller.right.name.lower()}; {method} needs {required.name.lower()}"
        )


def load_tokens(path: Path) -> dict[str, Caller]:
    """Read a token file: per line `NAME read|write sha256:HEX`; empty lines and those that start with # are skipped.

    Raises StartupError with every line that is wrong.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StartupError(f"auth.tokens_file: cannot read {path}: {reason}") from error
    callers: dict[str, Caller] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _TOKEN_LINE.fullmatch(text)
        if match is None:
            problems.append(f"{path}:{number}: expected `NAME read|write sha256:<64 hex digits>`")
        elif match["hash"] in callers:
            problems.append(f"{path}:{number}: the token of {match['name']!r} is there already, as another's")
        else:
            callers[match["hash"]] = Caller(match["name"], Right[match["right"].upper()])
    if not callers and not problems:
        problems.append(f"{path}: there is no token in it, so nobody could call; `re-server new-token NAME` makes one")
    if problems:
        raise StartupError("auth.tokens_file:\n" + "\n".join(problems))
    return callers
