"""The wire is what the Remote Execution API says it is.

tests/data/wire-contract.json states the API's facts: every message, field, enum, value, service and rpc. Our .proto
files, and the generated code that the program really uses, must state the same, no less and no more.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

import expbuild._generated
from expbuild import reapi

ROOT = Path(__file__).resolve().parent.parent
CONTRACT: dict[str, Any] = json.loads((ROOT / "tests/data/wire-contract.json").read_text(encoding="utf-8"))["files"]

WIRE_TYPES = {
    **dict.fromkeys(("int32", "int64", "uint32", "uint64", "sint32", "sint64", "bool", "enum"), 0),
    **dict.fromkeys(("fixed64", "sfixed64", "double"), 1),
    **dict.fromkeys(("string", "bytes", "message"), 2),
    **dict.fromkeys(("fixed32", "sfixed32", "float"), 5),
}


def load_tool() -> ModuleType:
    """Import tools/gen_protos.py, which is a script and lies in no package."""
    spec = importlib.util.spec_from_file_location("gen_protos", ROOT / "tools" / "gen_protos.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gen_protos = load_tool()


@pytest.fixture(scope="module")
def compiled() -> DescriptorPool:
    """A fresh pool that holds what protos/ says now."""
    pool = DescriptorPool()
    for file in gen_protos.descriptor_set().file:
        pool.Add(file)
    return pool


@pytest.fixture(scope="module")
def runtime() -> DescriptorPool:
    """The pool in which the generated modules register themselves."""
    for module in pkgutil.walk_packages(expbuild._generated.__path__, "expbuild._generated."):
        importlib.import_module(module.name)
    return descriptor_pool.Default()


def type_name(field: FieldDescriptor) -> str:
    """Return the type of a field as the contract writes it."""
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            return f"map<{type_name(entry['key'])}, {type_name(entry['value'])}>"
        return field.message_type.full_name
    if field.enum_type is not None:
        return field.enum_type.full_name
    return proto_type(field)


def proto_type(field: FieldDescriptor) -> str:
    """Return the keyword for the type of a field: `int32`, `message`, `enum`, ..."""
    return FieldDescriptorProto.Type.Name(FieldDescriptorProto.Type.ValueType(field.type)).removeprefix("TYPE_").lower()


def kind(field: FieldDescriptor) -> str:
    """Return the contract's word for the kind of a field's type."""
    if field.message_type is not None:
        return "map" if field.message_type.GetOptions().map_entry else "message"
    return "enum" if field.enum_type is not None else "scalar"


def describe_field(field: FieldDescriptor) -> dict[str, Any]:
    """State the facts of one field as the contract does."""
    facts: dict[str, Any] = {
        "number": field.number,
        "kind": kind(field),
        "type": type_name(field),
        "label": "repeated" if field.is_repeated else "required" if field.is_required else "singular",
        "wire_type": 2 if field.is_packed else WIRE_TYPES[proto_type(field)],
        "json_name": field.json_name,
    }
    if field.is_packed:
        facts["packed"] = True
    if field.GetOptions().deprecated:
        facts["deprecated"] = True
    return facts


def describe_message(message: Descriptor) -> dict[str, Any]:
    """State the facts of one message as the contract does; reserved ranges include both ends."""
    proto = DescriptorProto()
    message.CopyToProto(proto)
    return {
        "fields": {field.name: describe_field(field) for field in message.fields},
        "oneofs": [oneof.name for oneof in message.oneofs],
        "reserved": {
            "ranges": [[reserved.start, reserved.end - 1] for reserved in proto.reserved_range],
            "names": list(proto.reserved_name),
        },
    }


def describe_enum(enum: EnumDescriptor) -> dict[str, Any]:
    """State the facts of one enum as the contract does."""
    return {
        "allow_alias": enum.GetOptions().allow_alias,
        "values": {value.name: value.number for value in enum.values},
    }


def describe_service(service: ServiceDescriptor) -> dict[str, Any]:
    """State the facts of one service as the contract does."""
    return {
        method.name: {
            "path": f"/{service.full_name}/{method.name}",
            "request": method.input_type.full_name,
            "response": method.output_type.full_name,
            "client_streaming": method.client_streaming,
            "server_streaming": method.server_streaming,
        }
        for method in service.methods
    }


def messages_of(parent: FileDescriptor | Descriptor) -> Iterator[Descriptor]:
    """Yield every message below a file or a message, without the entries that maps imply."""
    children = parent.message_types_by_name if isinstance(parent, FileDescriptor) else parent.nested_types_by_name
    for message in children.values():
        if not message.GetOptions().map_entry:
            yield message
            yield from messages_of(message)


def describe_file(file: FileDescriptor) -> dict[str, Any]:
    """State everything that the contract states about one .proto file."""
    proto = file_proto(file)
    messages = list(messages_of(file))
    enums = [*file.enum_types_by_name.values(), *(enum for message in messages for enum in message.enum_types)]
    prefix = f"{file.package}."
    assert not file.extensions_by_name
    return {
        "package": file.package,
        "syntax": proto.syntax,
        "imports": sorted(proto.dependency),
        "messages": {message.full_name.removeprefix(prefix): describe_message(message) for message in messages},
        "enums": {enum.full_name.removeprefix(prefix): describe_enum(enum) for enum in enums},
        "services": {name: describe_service(service) for name, service in file.services_by_name.items()},
    }


def file_proto(file: FileDescriptor) -> FileDescriptorProto:
    """Return a file's descriptor as a message."""
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    return proto


def differences(actual: Any, expected: Any, where: str) -> list[str]:
    """Name every place where two trees of facts differ."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        found = [f"{where}: {key!r} is missing" for key in expected.keys() - actual.keys()]
        found += [f"{where}: {key!r} is not in the contract" for key in actual.keys() - expected.keys()]
        for key in actual.keys() & expected.keys():
            found += differences(actual[key], expected[key], f"{where} {key}")
        return sorted(found)
    return [] if actual == expected else [f"{where}: {actual!r} instead of {expected!r}"]


def test_proto_files_are_those_of_the_contract() -> None:
    """Beside the API's files there may be others of our own, but only under protos/expbuild/."""
    assert {name for name in gen_protos.own_protos() if not name.startswith("expbuild/")} == CONTRACT.keys()


@pytest.mark.parametrize("name", CONTRACT)
def test_proto_file_states_exactly_the_contract(compiled: DescriptorPool, name: str) -> None:
    """Nothing is missing, nothing is added, and every fact is equal."""
    assert differences(describe_file(compiled.FindFileByName(name)), CONTRACT[name], name) == []


@pytest.mark.parametrize("name", CONTRACT)
def test_generated_code_states_exactly_the_contract(runtime: DescriptorPool, name: str) -> None:
    """The descriptors under which the program talks are those of the contract, under the canonical file name."""
    assert differences(describe_file(runtime.FindFileByName(name)), CONTRACT[name], name) == []


@pytest.mark.parametrize("name", gen_protos.own_protos())
def test_generated_code_equals_proto_file(compiled: DescriptorPool, runtime: DescriptorPool, name: str) -> None:
    """The generated descriptors equal the compiled ones in everything, also in what the contract does not state."""
    assert file_proto(runtime.FindFileByName(name)) == file_proto(compiled.FindFileByName(name))


def test_generated_code_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """Running the generator would change nothing."""
    status = gen_protos.main(["--check"])
    assert (status, capsys.readouterr().err) == (0, "")


def test_check_names_each_differing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed, a missing and a stale file are each reported."""
    monkeypatch.setattr(gen_protos, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "changed.py").write_text("old")
    (tmp_path / "out" / "stale.py").write_text("")
    wanted = {Path("changed.py"): "new", Path("missing.py"): ""}
    assert gen_protos.differences(tmp_path / "out", wanted) == [
        "out/changed.py: differs",
        "out/missing.py: missing",
        "out/stale.py: not generated any more",
    ]


def test_reapi_exports_every_message_and_service_of_the_contract() -> None:
    """Nobody has a reason to reach around the fence."""
    renamed = {"Digest": "DigestMessage", "DigestFunction": "DigestFunctionMessage"}
    for file in CONTRACT.values():
        messages = {renamed.get(name, name) for name in file["messages"] if "." not in name}
        services = {f"{name}{suffix}" for name in file["services"] for suffix in ("Servicer", "Stub")}
        registrations = {f"add_{name}Servicer_to_server" for name in file["services"]}
        assert messages | services | registrations <= set(reapi.__all__)


def test_reapi_exports_exist() -> None:
    """Every promised name is there, once."""
    assert len(reapi.__all__) == len(set(reapi.__all__))
    assert all(hasattr(reapi, name) for name in reapi.__all__)


def test_messages_can_be_pickled() -> None:
    """Message classes know the module they really live in."""
    message = reapi.DigestMessage(hash="00", size_bytes=1)
    assert pickle.loads(pickle.dumps(message)) == message
