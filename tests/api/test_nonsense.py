"""Nonsense on every rpc: each answer has a proper code and says nothing about our insides; the server stays well."""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from expbuild.digest import DigestFunction
from expbuild.reapi import (
    SERVICE_DESCRIPTORS,
    Action,
    BatchUpdateBlobsRequest,
    Command,
    ContentAddressableStorageStub,
    DigestMessage,
    Directory,
    ExecuteRequest,
    ExecuteResponse,
    Operation,
    Platform,
    WriteRequest,
)
from tests.api.conftest import StartServer
from tests.support.server import ReServer, patience

TIMEOUT_S = patience(20.0)

_IS_FULL = bool(os.environ.get("EXPBUILD_TEST_FULL"))
"""Whether this is the longer run: other requests each time, and more of them."""

GOOD = {"OK"}
BAD_REQUEST = GOOD | {"INVALID_ARGUMENT"}
LOOK_UP = BAD_REQUEST | {"NOT_FOUND"}

ALLOWED = {
    "GetCapabilities": BAD_REQUEST,
    "FindMissingBlobs": BAD_REQUEST,
    "BatchUpdateBlobs": BAD_REQUEST,
    "BatchReadBlobs": BAD_REQUEST,
    "GetTree": LOOK_UP,
    "SplitBlob": {"UNIMPLEMENTED", "INVALID_ARGUMENT"},
    "SpliceBlob": {"UNIMPLEMENTED", "INVALID_ARGUMENT"},
    "Read": LOOK_UP | {"OUT_OF_RANGE"},
    "Write": BAD_REQUEST | {"ABORTED"},
    "QueryWriteStatus": BAD_REQUEST,
    "GetActionResult": LOOK_UP,
    "UpdateActionResult": BAD_REQUEST,
    "Execute": BAD_REQUEST | {"FAILED_PRECONDITION"},
    "WaitExecution": LOOK_UP,
    "ListOperations": BAD_REQUEST,
    "GetOperation": LOOK_UP,
    "DeleteOperation": LOOK_UP,
    "CancelOperation": LOOK_UP,
    "WaitOperation": {"UNIMPLEMENTED", "INVALID_ARGUMENT"},
    "Check": LOOK_UP,
    "List": BAD_REQUEST,
    "Watch": BAD_REQUEST | {"DEADLINE_EXCEEDED"},
    "ServerReflectionInfo": BAD_REQUEST,
}
"""The codes a method may answer whatever it is sent. UNKNOWN and INTERNAL are in no set; nor is running out of time,
but for Watch, which ends only with its client."""

IN_EXECUTION = BAD_REQUEST | {"FAILED_PRECONDITION", "DEADLINE_EXCEEDED"}
"""The codes inside an operation."""

GIVEAWAYS = (".py", "Traceback", "/tmp", "Exception", "Error(", " object at 0x", "/site-packages")


def _methods() -> Iterator[MethodDescriptor]:
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    about = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
    services: list[Any] = [*SERVICE_DESCRIPTORS, health, about]  # one class with two names in the stubs
    for service in services:
        yield from service.methods


METHODS = {method.name: method for method in _methods()}
every_method = pytest.mark.parametrize("method", METHODS)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended, and all it answered."""

    code: str
    details: str
    responses: Sequence[bytes]


class Wire:
    """Calls methods with raw bytes for messages."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])

    def call(self, method: str, messages: Sequence[bytes]) -> Answer:
        return self.start(method, messages)()

    def start(self, method: str, messages: Sequence[bytes]) -> Callable[[], Answer]:
        """Call, and return what waits for the answer: many calls may be under way at once."""
        descriptor = METHODS[method]
        assert descriptor.containing_service is not None
        path = f"/{descriptor.containing_service.full_name}/{descriptor.name}"
        timeout_s = 0.02 if method == "Watch" else TIMEOUT_S
        many: Any = descriptor.client_streaming
        request: Any = iter(messages) if many else messages[0]
        kind = f"{'stream' if many else 'unary'}_{'stream' if descriptor.server_streaming else 'unary'}"
        send = getattr(self._channel, kind)(path)
        start: Any = send if descriptor.server_streaming else send.future
        call: Any = start(request, timeout=timeout_s)

        def finish() -> Answer:
            responses: list[bytes] = []
            try:
                if descriptor.server_streaming:
                    responses.extend(call)
                else:
                    responses.append(call.result())
            except grpc.RpcError as error:
                status: Any = error
                return Answer(status.code().name, status.details() or "", responses)
            return Answer("OK", "", responses)

        return finish

    def check(self, method: str, messages: Sequence[bytes]) -> Answer:
        """Call, see that the answer is a proper one, and that the server is well afterwards."""
        answer = self.call(method, messages)
        _check(method, answer)
        self.check_health()
        return answer

    def check_health(self) -> None:
        health = self.call("Check", [b""])
        assert (health.code, health.responses) == ("OK", [b"\x08\x01"])


def _check(method: str, answer: Answer) -> None:
    assert answer.code in ALLOWED[method], answer
    for giveaway in GIVEAWAYS:
        assert giveaway not in answer.details, answer


@pytest.fixture(scope="module")
def nonsense_server(start_server: StartServer) -> ReServer:
    return start_server("nonsense", capabilities={"exec_enabled": True, "digest_functions": ["SHA256", "BLAKE3"]})


@pytest.fixture(scope="module")
def wire(nonsense_server: ReServer) -> Wire:
    return Wire(nonsense_server.address)


# ---- messages that do not parse --------------------------------------------------------------------------------

UNPARSABLE = [
    pytest.param(b"\xff", id="truncated-tag"),
    pytest.param(b"\x0a\x05ab", id="truncated-field"),
    pytest.param(b"\x0a\xff\xff\xff\xff\x0f", id="length-beyond-the-message"),
    pytest.param(b"\x07", id="wire-type-7"),
    pytest.param(b"\x0b" * 200, id="groups-200-deep"),
    pytest.param(bytes(range(256)) * 4000, id="a-megabyte"),
]


@every_method
@pytest.mark.parametrize("data", UNPARSABLE)
def test_gen_16_message_that_does_not_parse_is_invalid_argument(wire: Wire, method: str, data: bytes) -> None:
    answer = wire.check(method, [data])
    assert answer.code == "INVALID_ARGUMENT"
    assert answer.details.startswith("the request cannot be decoded: ")


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.client_streaming])
def test_gen_16_later_message_that_does_not_parse_is_invalid_argument(wire: Wire, method: str) -> None:
    digest = DigestFunction.SHA256.digest_of(b"nonsense")
    first = {
        "Write": WriteRequest(resource_name=f"uploads/u/blobs/{digest}"),
        "ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(list_services="*"),
    }[method]
    assert wire.check(method, [first.SerializeToString(), b"\xff"]).code == "INVALID_ARGUMENT"


@every_method
def test_gen_14_empty_message_has_a_proper_code(wire: Wire, method: str) -> None:
    wire.check(method, [b""])


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.client_streaming])
def test_stream_without_a_message_has_a_proper_code(wire: Wire, method: str) -> None:
    wire.check(method, [])


# ---- messages that parse ---------------------------------------------------------------------------------------


def _stock() -> dict[str, bytes]:
    """Return blobs that requests may refer to: good and bad actions, commands, directories."""
    sha256 = DigestFunction.SHA256

    def named(data: bytes) -> DigestMessage:
        digest = sha256.digest_of(data)
        return DigestMessage(hash=digest.hash, size_bytes=digest.size_bytes)

    garbage = b"\xff garbage"
    no_arguments = Command().SerializeToString()
    outside = Command(arguments=["true"], output_paths=["../../outside", "/absolute", "a//b", "."])
    good = Command(arguments=["/bin/true"], output_paths=["out"]).SerializeToString()
    absent_program = Command(arguments=["/no/such/program"], working_directory="no/such/directory")
    odd = Command(
        arguments=["\x01", "x" * 5000],
        environment_variables=[{"name": "A=B", "value": "\x01"}, {"name": "", "value": ""}],  # type: ignore[list-item]  # short for EnvironmentVariable
        working_directory="../..",
    ).SerializeToString()
    loop = Directory(directories=[{"name": "..", "digest": named(garbage)}])  # type: ignore[list-item]  # ditto
    twice = Directory(files=[{"name": "a", "digest": named(good)}] * 2)  # type: ignore[list-item]  # ditto
    slash = Directory(files=[{"name": "a/b", "digest": named(good)}])  # type: ignore[list-item]  # ditto
    absent = Directory(files=[{"name": "a", "digest": DigestMessage(hash="a" * 64, size_bytes=3)}])  # type: ignore[list-item]  # ditto
    directories = [d.SerializeToString() for d in (Directory(), loop, twice, slash, absent)] + [garbage]
    commands = [
        good,
        garbage,
        no_arguments,
        odd,
        outside.SerializeToString(),
        absent_program.SerializeToString(),
    ]
    actions = [
        Action(command_digest=named(command), input_root_digest=named(directory), do_not_cache=True)
        for command in commands
        for directory in directories
    ]
    actions += [
        Action(),
        Action(command_digest=named(good)),
        Action(input_root_digest=named(b"")),
        Action(command_digest=DigestMessage(hash="b" * 64, size_bytes=9), input_root_digest=named(b"")),
        Action(command_digest=DigestMessage(hash="short", size_bytes=-9), input_root_digest=named(b"")),
        Action(
            command_digest=named(good),
            input_root_digest=named(b""),
            platform=Platform(properties=[{"name": "OSFamily", "value": "no such"}] * 2),  # type: ignore[list-item]  # ditto
        ),
    ]
    for action, seconds in zip(actions[-6:], (-(2**62), 2**62, 0, -1, 10**11, 1), strict=True):
        action.timeout.seconds = seconds
    blobs = [*directories, *commands, *(action.SerializeToString() for action in actions)]
    return {sha256.digest_of(blob).hash: blob for blob in blobs}


STOCK = _stock()

TEXTS = [
    "",
    "a",
    "main",
    "blobs",
    "..",
    "../../../etc/passwd",
    "/",
    "//",
    "\x00",
    "\n",
    "ünïcode ☃ \U0001f600",
    "a" * 64,
    "A" * 64,
    "x" * 9000,
    "%s%n{0}{x!r}",
    *STOCK,
    f"blobs/{'a' * 64}/5",
    f"uploads/u/blobs/{'a' * 64}/5",
    f"compressed-blobs/zstd/{'a' * 64}/5",
    f"uploads/u/compressed-blobs/deflate/{'a' * 64}/5",
    f"blobs/{'a' * 64}/99999999999999999999999",
    f"blobs/blake3/{'a' * 64}/5",
    "uploads/u/blobs/" + DigestFunction.SHA256.empty_hash + "/0",
    *(f"blobs/{hash_text}/{len(blob)}" for hash_text, blob in list(STOCK.items())[:4]),
    "operations/0123456789abcdef",
]
NUMBERS = [0, 1, 2, 3, 5, 9, 10, 64, 255, 256, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
DATA = [b"", b"a", b"\xff" * 10, b"\x28\xb5\x2f\xfd", bytes(100_000), *list(STOCK.values())[:3]]

_BITS = {FieldDescriptor.CPPTYPE_INT32: 32, FieldDescriptor.CPPTYPE_ENUM: 32, FieldDescriptor.CPPTYPE_INT64: 64}


def nonsense(rng: random.Random, message: Message, depth: int = 0) -> Message:
    """Fill a message of any type with values that parse and mean little; some digests are of blobs that are there."""
    if message.DESCRIPTOR.full_name.endswith("v2.Digest") and rng.random() < 0.7:
        hash_text, blob = rng.choice(list(STOCK.items()))
        message.MergeFrom(DigestMessage(hash=hash_text, size_bytes=len(blob)))
        return message
    fields: Any = message.DESCRIPTOR.fields  # a class with two names in the stubs
    for field in fields:
        if rng.random() < 0.3:
            continue
        if field.is_repeated:
            target = getattr(message, field.name)
            for _ in range(rng.choice([0, 1, 2, 5])):
                if field.message_type is None:
                    target.append(_value(rng, field))
                elif depth < 5 and not field.message_type.GetOptions().map_entry:
                    target.append(nonsense(rng, GetMessageClass(field.message_type)(), depth + 1))
        elif field.message_type is not None:
            if depth < 5:
                getattr(message, field.name).SetInParent()
                nonsense(rng, getattr(message, field.name), depth + 1)
        else:
            setattr(message, field.name, _value(rng, field))
    return message


def _value(rng: random.Random, field: FieldDescriptor) -> object:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(DATA if field.type == FieldDescriptor.TYPE_BYTES else TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice([0.0, -1.5, 1e300, float("nan")])
        case kind:
            bits = _BITS.get(kind)
            number = rng.choice([0, 1, 2, rng.choice(NUMBERS)])
            if bits is None:  # unsigned
                return number % 2**32
            limit = 2 ** (bits - 1)
            return (rng.choice([1, 1, -1]) * number + limit) % (2 * limit) - limit


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Change a few bytes of a message, or cut it."""
    result = bytearray(data)
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        if result:
            result[rng.randrange(len(result))] = rng.randrange(256)
    return bytes(result[: rng.randrange(len(result) + 1)] if rng.random() < 0.1 else result)


@pytest.fixture(scope="module")
def stocked(nonsense_server: ReServer) -> None:
    """Puts the blobs that requests refer to into the server's CAS."""
    with grpc.insecure_channel(nonsense_server.address) as channel:
        stub: Any = ContentAddressableStorageStub(channel)  # type: ignore[arg-type]  # the stubs say async
        entries = [
            BatchUpdateBlobsRequest.Request(digest=DigestMessage(hash=h, size_bytes=len(blob)), data=blob)
            for h, blob in STOCK.items()
        ]
        stub.BatchUpdateBlobs(BatchUpdateBlobsRequest(requests=entries), timeout=TIMEOUT_S)


BATCH = 50
"""So many requests are one example: 18 of these for each of 23 methods are more than 20,000."""


@every_method
@pytest.mark.usefixtures("stocked")
@settings(
    max_examples=400 if _IS_FULL else 18,
    # A smaller seed is no smaller request: there is nothing to gain by looking for one.
    phases=[Phase.generate],
    deadline=None,
    derandomize=not _IS_FULL,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32))
def test_gen_15_16_any_request_has_a_proper_code(wire: Wire, method: str, seed: int) -> None:
    """Messages of the right type with any values, some of them damaged; several in one stream."""
    rng = random.Random(f"{method} {seed}")
    make = GetMessageClass(METHODS[method].input_type)
    calls = []
    for _ in range(BATCH):
        count = rng.choice([1, 1, 2, 4]) if METHODS[method].client_streaming else 1
        messages = [mutated(rng, nonsense(rng, make()).SerializeToString()) for _ in range(count)]
        calls.append((messages, wire.start(method, messages)))
    for messages, finish in calls:
        answer = finish()
        note(f"{method} {messages!r:.2000} -> {answer!r:.1000}")
        _check(method, answer)
        if method == "Execute" and answer.code == "OK":
            _checked_status(answer)
    wire.check_health()


def _checked_status(answer: Answer) -> str:
    """Return the code inside a finished operation, after a look at the rest of it."""
    operation = Operation.FromString(answer.responses[-1])
    assert operation.done
    assert not operation.HasField("error")
    response = ExecuteResponse()
    assert operation.response.Unpack(response)
    code = _code_names()[response.status.code]
    assert code in IN_EXECUTION, response
    for giveaway in GIVEAWAYS:
        assert giveaway not in response.status.message, response
    return code


@functools.cache
def _code_names() -> dict[int, str]:
    return {code.value[0]: code.name for code in grpc.StatusCode}


@pytest.mark.usefixtures("stocked")
def test_every_bad_action_ends_with_a_proper_status(wire: Wire) -> None:
    """Each action of the stock, and blobs that are no action at all."""
    codes: Counter[str] = Counter()
    for hash_text, blob in STOCK.items():
        digest = DigestMessage(hash=hash_text, size_bytes=len(blob))
        request = ExecuteRequest(action_digest=digest, skip_cache_lookup=True)
        answer = wire.check("Execute", [request.SerializeToString()])
        codes[answer.code if answer.code != "OK" else _checked_status(answer)] += 1
    assert {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"} <= codes.keys(), "the stock has actions for each of these"


def test_server_has_noticed_no_fault_of_its_own(nonsense_server: ReServer) -> None:
    """Last in this module: nothing of the above was an internal error."""
    assert nonsense_server.events("rpc.crashed") == []
    # grpcio says so, with a traceback of its own, when a client has gone in the middle of an answer: Watch does.
    log = [line for line in nonsense_server.log_text().splitlines() if '"ExecuteBatchError raised in core' not in line]
    assert [line for line in log if "Traceback" in line] == []
