"""Tokens: who may call what, over the wire, for every method that is served."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from expbuild.api.auth import (
    Authenticator,
    Caller,
    Right,
    authorize,
    current_caller,
    hash_token,
    load_tokens,
    new_token,
    required_right,
)
from expbuild.errors import InvalidArgument, PermissionDenied, StartupError
from expbuild.reapi import (
    SERVICE_DESCRIPTORS,
    CapabilitiesStub,
    GetCapabilitiesRequest,
    RequestMetadata,
    ServerCapabilities,
    WriteRequest,
)
from tests.api.client import TIMEOUT_S
from tests.api.conftest import StartServer
from tests.support.server import ReServer, wait_until

READER, WRITER, STRANGER = "token-of-the-reader", "token-of-the-writer", "token-of-nobody"

SERVICES: tuple[Any, ...] = (
    *SERVICE_DESCRIPTORS,
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
METHODS: dict[str, Any] = {
    f"{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}
"""Every method a full server registers."""

OPEN = {name for name in METHODS if name.startswith("grpc.health.v1.Health/")}
WRITES = {
    "build.bazel.remote.execution.v2.ActionCache/UpdateActionResult",
    "build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs",
    "build.bazel.remote.execution.v2.ContentAddressableStorage/SpliceBlob",
    "build.bazel.remote.execution.v2.Execution/Execute",
    "google.bytestream.ByteStream/Write",
    "google.longrunning.Operations/CancelOperation",
    "google.longrunning.Operations/DeleteOperation",
    "google.longrunning.Operations/ListOperations",
}

CREDENTIALS: dict[str, tuple[tuple[str, str], ...]] = {
    "no token": (),
    "wrong token": (("authorization", f"Bearer {STRANGER}"),),
    "read": (("authorization", f"Bearer {READER}"),),
    "write": (("authorization", f"Bearer {WRITER}"),),
}


def expected(method: str, credential: str) -> str:
    """Return how a call is received: its status code, or "admitted" whatever becomes of it then."""
    if method in OPEN:
        return "admitted"
    if credential in ("no token", "wrong token"):
        return "UNAUTHENTICATED"
    return "PERMISSION_DENIED" if credential == "read" and method in WRITES else "admitted"


def received(code: str) -> str:
    return code if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") else "admitted"


def token_file(directory: Path) -> Path:
    path = directory / "tokens"
    path.write_text(
        "# who may call\n\n"
        f"reader read sha256:{hash_token(READER)}\n"
        f"  ci@build-1   write sha256:{hash_token(WRITER)}  \n"
    )
    return path


@pytest.fixture(scope="module")
def guarded(start_server: StartServer, scratch: Path) -> ReServer:
    """A server that executes, and knows a reader and a writer."""
    return start_server("guarded", auth={"tokens_file": str(token_file(scratch))}, capabilities={"exec_enabled": True})


@pytest.fixture(scope="module")
def channel(guarded: ReServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.address) as channel:
        yield channel


def answer(
    channel: grpc.Channel, name: str, metadata: Iterable[tuple[str, str | bytes]], *messages: bytes
) -> tuple[str, str]:
    """Call a method with raw messages; return the code's name and the message of its status, OK at the first answer."""
    method = METHODS[name]
    kind = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
    call: Any = getattr(channel, "_".join(kind))(f"/{name}")
    request = iter(messages) if method.client_streaming else messages[0]
    try:
        response = call(request, timeout=TIMEOUT_S, metadata=tuple(metadata))
        if method.server_streaming:
            next(response, None)
            response.cancel()
    except grpc.RpcError as error:
        status: Any = error
        return status.code().name, status.details()
    return "OK", ""


# ---- over the wire ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(set(METHODS) - OPEN))
@pytest.mark.duty("GEN-18", "CAS-07", "CAS-15", "BS-43")
def test_who_may_call_what(channel: grpc.Channel, method: str) -> None:
    """Every call needs a token, and what changes anything needs one that may write."""
    for credential, metadata in CREDENTIALS.items():
        code, _ = answer(channel, method, metadata, b"")
        assert received(code) == expected(method, credential), credential


@pytest.mark.parametrize("credential", CREDENTIALS)
@pytest.mark.parametrize("method", sorted(OPEN))
def test_health_is_for_all(channel: grpc.Channel, method: str, credential: str) -> None:
    code, _ = answer(channel, method, CREDENTIALS[credential], b"")
    assert received(code) == "admitted"


@pytest.mark.parametrize("method", sorted(set(METHODS) - OPEN))
def test_a_request_is_not_decoded_before_its_sender_is_known(channel: grpc.Channel, method: str) -> None:
    """What does not parse is INVALID_ARGUMENT, and that only to those who may call."""
    garbage = b"\xff\xff\xff"
    assert answer(channel, method, (), garbage)[0] == "UNAUTHENTICATED"
    assert answer(channel, method, CREDENTIALS["write"], garbage)[0] == "INVALID_ARGUMENT"


def test_an_upload_without_a_token_is_refused_while_it_is_still_sent(channel: grpc.Channel) -> None:
    """An endless upload ends at once, with the status."""
    part = WriteRequest(resource_name="uploads/u/blobs/x/1", data=bytes(1 << 16)).SerializeToString()
    call: Any = channel.stream_unary("/google.bytestream.ByteStream/Write")
    with pytest.raises(grpc.RpcError) as caught:
        call(itertools.repeat(part), timeout=TIMEOUT_S)
    status: Any = caught.value
    assert status.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param(
            None, 'this server needs a bearer token: send the header "authorization: Bearer TOKEN"', id="none"
        ),
        pytest.param(f"Bearer {STRANGER}", "this bearer token is not known here, or not any more", id="unknown"),
        pytest.param("Bearer", "this bearer token is not known here, or not any more", id="empty"),
        pytest.param(f"Bearer {WRITER}x", "this bearer token is not known here, or not any more", id="longer"),
        pytest.param(f"Bearer {hash_token(WRITER)}", "this bearer token is not known here, or not any more", id="hash"),
        pytest.param(WRITER, 'the header "authorization" is not of the form "Bearer TOKEN"', id="no-scheme"),
        pytest.param("Basic YTpi", 'the header "authorization" is not of the form "Bearer TOKEN"', id="basic"),
    ],
)
def test_the_refusal_says_what_to_send_and_never_what_was_sent(
    channel: grpc.Channel, header: str | None, message: str
) -> None:
    metadata = () if header is None else (("authorization", header),)
    method = "build.bazel.remote.execution.v2.Capabilities/GetCapabilities"
    assert answer(channel, method, metadata, b"") == ("UNAUTHENTICATED", message)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_not_case_sensitive(channel: grpc.Channel, scheme: str) -> None:
    """As HTTP has it; clients differ."""
    metadata = (("authorization", f"{scheme} {WRITER}"),)
    assert answer(channel, "google.longrunning.Operations/ListOperations", metadata, b"")[0] == "OK"


def test_a_denial_names_the_token_and_the_right_that_is_missing(channel: grpc.Channel) -> None:
    method = "build.bazel.remote.execution.v2.Execution/Execute"
    assert answer(channel, method, CREDENTIALS["read"], b"") == (
        "PERMISSION_DENIED",
        f"token 'reader' has the right read; {method} needs write",
    )


def capabilities_for(channel: grpc.Channel, credential: str) -> ServerCapabilities:
    stub: Any = CapabilitiesStub(channel)  # type: ignore[arg-type]  # the stubs say async
    result: ServerCapabilities = stub.GetCapabilities(
        GetCapabilitiesRequest(), timeout=TIMEOUT_S, metadata=CREDENTIALS[credential]
    )
    return result


def test_capabilities_tell_a_reader_that_nothing_is_executed_or_taken(channel: grpc.Channel) -> None:
    """Clients then do not try; all else is as for a writer."""
    writer, reader = capabilities_for(channel, "write"), capabilities_for(channel, "read")
    assert writer.execution_capabilities.exec_enabled
    assert writer.cache_capabilities.action_cache_update_capabilities.update_enabled
    assert not reader.HasField("execution_capabilities")
    assert not reader.cache_capabilities.action_cache_update_capabilities.update_enabled
    writer.ClearField("execution_capabilities")
    writer.cache_capabilities.action_cache_update_capabilities.update_enabled = False
    assert reader == writer


def test_the_log_names_the_caller_and_holds_no_token(guarded: ReServer, channel: grpc.Channel) -> None:
    """Also the line of a denied call; a call without a known token, or one that needs none, has no name."""
    method = "google.longrunning.Operations/ListOperations"
    callers = {"no token": None, "wrong token": None, "read": "reader", "write": "ci@build-1", "no scheme": None}
    key = "build.bazel.remote.execution.v2.requestmetadata-bin"
    for credential in callers:
        told = RequestMetadata(tool_invocation_id=f"log {credential}").SerializeToString()
        sent = CREDENTIALS.get(credential, (("authorization", WRITER),))
        answer(channel, method, (*sent, (key, told)), b"")

    def lines() -> dict[str, Any]:
        ours = [line for line in guarded.events("rpc.completed") if line["invocation_id"].startswith("log ")]
        return {line["invocation_id"].removeprefix("log "): line.get("caller") for line in ours}

    wait_until(lambda: len(lines()) == len(callers), timeout_s=10, what="a line for each call")
    assert lines() == callers
    assert not any(token in guarded.log_text() for token in (READER, WRITER, STRANGER))
    assert not any(hash_token(token) in guarded.log_text() for token in (READER, WRITER, STRANGER))


def test_the_native_transport_by_name_asks_for_tokens_as_well(start_server: StartServer, scratch: Path) -> None:
    """On its own calls, and on those that go through the server behind it."""
    pytest.importorskip("pygrpc_native")
    server = start_server(
        "guarded-native", auth={"tokens_file": str(token_file(scratch))}, server={"transport": "native"}
    )
    with grpc.insecure_channel(server.address) as channel:
        for method in (
            "build.bazel.remote.execution.v2.Capabilities/GetCapabilities",
            "google.bytestream.ByteStream/Write",
        ):
            for credential, metadata in CREDENTIALS.items():
                assert received(answer(channel, method, metadata, b"")[0]) == expected(method, credential)


# ---- the table of rights ---------------------------------------------------------------------------------------


def test_every_method_has_a_right_of_its_own() -> None:
    """A new RPC needs a line in the table, and one here when it writes."""
    assert {name: required_right(name) for name in METHODS} == {
        name: Right.NONE if name in OPEN else Right.WRITE if name in WRITES else Right.READ for name in METHODS
    }


def test_a_method_nobody_has_thought_of_is_refused_to_all() -> None:
    with pytest.raises(PermissionDenied, match=r"no token has the right to call a\.B/C"):
        authorize(Caller("root", Right.WRITE), "a.B/C")


def test_without_tokens_everybody_may_do_everything() -> None:
    open_to_all = Authenticator(None)
    assert open_to_all.is_open
    assert open_to_all.identify("a.B/C", ()).right is Right.WRITE
    assert current_caller().right is Right.WRITE


# ---- the token file --------------------------------------------------------------------------------------------


def test_a_new_token_and_its_line_belong_together(tmp_path: Path) -> None:
    token, line = new_token("alice", Right.WRITE)
    (tmp_path / "tokens").write_text(f"{line}\n")
    assert len(token) >= 43
    assert load_tokens(tmp_path / "tokens") == {hash_token(token): Caller("alice", Right.WRITE)}
    assert token not in line
    assert new_token("alice", Right.WRITE)[0] != token


@pytest.mark.parametrize("name", ["", "#a", "a b", "a\n", "-a", "ä", "a" * 101])
def test_a_name_that_would_not_read_back_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be the name of a token"):
        new_token(name, Right.READ)


def test_one_name_may_have_several_tokens(tmp_path: Path) -> None:
    """To hand on a new one before the old one goes."""
    lines = [new_token("alice", right)[1] for right in (Right.WRITE, Right.READ)]
    (tmp_path / "tokens").write_text("\n".join(lines))
    assert [caller.name for caller in load_tokens(tmp_path / "tokens").values()] == ["alice", "alice"]


HASH = "a" * 64


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        pytest.param(b"", ["{path}: there is no token in it"], id="empty"),
        pytest.param(b"# nobody yet\n", ["{path}: there is no token in it"], id="only-comments"),
        pytest.param(b"\xff", ["cannot read {path}: not UTF-8 text"], id="binary"),
        pytest.param(
            f"ok read sha256:{HASH}\na admin sha256:{HASH}\nb read {HASH}\n".encode(),
            ["{path}:2: expected `NAME read|write sha256:", "{path}:3: expected `NAME read|write sha256:"],
            id="every-wrong-line",
        ),
        pytest.param(
            f"a read sha256:{HASH}\nb write sha256:{HASH}\n".encode(),
            ["{path}:2: the token of 'b' is there already, as another's"],
            id="twice",
        ),
    ],
)
def test_a_token_file_that_is_wrong_is_refused_with_every_line(
    tmp_path: Path, content: bytes, problems: list[str]
) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(StartupError) as caught:
        load_tokens(path)
    assert str(caught.value).startswith("auth.tokens_file:")
    for problem in problems:
        assert problem.format(path=path) in str(caught.value)


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"auth\.tokens_file: cannot read .*/none: No such file or directory"):
        load_tokens(tmp_path / "none")


def test_a_token_in_place_of_its_hash_is_not_repeated(tmp_path: Path) -> None:
    """The likeliest mistake must not put a token into the log."""
    path = tmp_path / "tokens"
    path.write_text(f"alice write {WRITER}\n")
    with pytest.raises(StartupError) as caught:
        load_tokens(path)
    assert WRITER not in str(caught.value)
