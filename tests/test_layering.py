"""The layers hold: imports point down, and fenced libraries are imported only where they belong.

    cli -> server -> api -> execution -> storage | workers -> foundation

Imports are read from the source, wherever they stand: at the top, in a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import expbuild

PACKAGE = Path(expbuild.__file__).parent

LAYERS = (
    frozenset({"foundation"}),
    frozenset({"storage", "workers"}),
    frozenset({"execution"}),
    frozenset({"api"}),
    frozenset({"server"}),
    frozenset({"cli"}),
)
"""The rooms from the bottom up. Rooms of one layer do not know each other."""

FOUNDATION = frozenset(
    {
        "",
        "_generated",
        "config",
        "config_directories",
        "config_pool",
        "config_problems",
        "config_storage",
        "config_text",
        "config_types",
        "config_workers",
        "digest",
        "errors",
        "log",
        "metrics",
        "platform_properties",
        "reapi",
        "sha256tree",
    }
)
"""The modules of the foundation; "" is the package itself, which holds only the version."""

GRPC = ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "pygrpc_native")
FENCES = (
    (GRPC, r"api(\..+)?|server|_generated(\..+)?", "gRPC is known only to api/, server.py and generated code"),
    (("aiodocker",), r"workers\.docker\w*", "aiodocker is known only to workers/docker*.py"),
    (("expbuild._generated",), r"reapi|_generated(\..+)?", "generated code is reached only through reapi.py"),
    (("tomli", "tomllib"), r"config", "TOML is parsed only by config.py"),
)
"""Libraries, the modules that may import them (below `expbuild.`), and the rule in words."""


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Yield the dotted name of everything the source imports.

    `from a import b` yields `a.b`, since b may be a module. module: the dotted name of the source's own module, which
    relative imports start from.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                parts = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parts, *([origin] if origin else [])])
                yield from (base if alias.name == "*" else f"{base}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def room_of(module: str) -> str:
    """Return the room a module below `expbuild.` lives in. Raises LookupError for a module that has none."""
    top = module.partition(".")[0]
    if top in FOUNDATION:
        return "foundation"
    top = {"lifecycle": "server", "sd_notify": "server"}.get(top, top)
    top = "cli" if top == "__main__" or top.startswith("cli_") else top
    if not any(top in layer for layer in LAYERS):
        raise LookupError(f"expbuild.{module} belongs to no room: give it one in tests/test_layering.py")
    return top


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return every rule the source breaks as the module of this name below `expbuild.` ("" for the package itself)."""
    full_name = f"expbuild.{module}".rstrip(".")
    room = room_of(module)
    found = []
    for imported in imports_of(source, full_name, is_package=is_package):
        for libraries, allowed, rule in FENCES:
            if any(f"{imported}.".startswith(f"{name}.") for name in libraries) and not re.fullmatch(allowed, module):
                found.append(f"{full_name} imports {imported}: {rule}")
        if imported.startswith("expbuild."):
            other = _room_of_import(imported.removeprefix("expbuild."))
            if other != room and _height(other) >= _height(room):
                found.append(f"{full_name} imports {imported}: {room} does not know {other}")
    return found


def _room_of_import(name: str) -> str:
    try:
        return room_of(name)
    except LookupError:
        if "." in name or (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir():
            raise
        return "foundation"  # `from expbuild import __version__`: a name of the package, no module


def _height(room: str) -> int:
    return next(height for height, layer in enumerate(LAYERS) if room in layer)


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_layers_and_fences_hold_in_the_whole_package() -> None:
    """No module of the package breaks a rule."""
    modules = list(_modules())
    assert {"cli", "config", "errors", "reapi"} <= {module for module, _ in modules}
    found = [
        violation
        for module, path in modules
        for violation in violations(path.read_text(), module, is_package=path.name == "__init__.py")
    ]
    assert found == []


def test_the_bare_package_imports_nothing_of_ours() -> None:
    """`import expbuild` is cheap: everything imports it first."""
    assert [n for n in imports_of((PACKAGE / "__init__.py").read_text(), "expbuild") if n.startswith("expbuild")] == []


def test_the_spawner_imports_nothing_but_the_standard_library() -> None:
    """It is small and starts fast, and nothing in it parses what comes from the network."""
    programs = {"workers.spawner", "workers.cgroups"}
    pending = list(programs)
    while pending:
        module = pending.pop()
        source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
        for name in imports_of(source, f"expbuild.{module}"):
            if name.startswith("expbuild."):
                other = ".".join(name.split(".")[1:3])
                assert re.fullmatch(r"workers\.(spawner_\w+|cgroups)", other), f"{module} imports {name}"
                if other not in programs:
                    programs.add(other)
                    pending.append(other)
            else:
                assert name.split(".")[0] in sys.stdlib_module_names, f"{module} imports {name}"


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        pytest.param("execution.pool", "import grpc", "gRPC is known only", id="grpc-in-execution"),
        pytest.param("execution.pool", "import grpc.aio as g", "gRPC is known only", id="grpc-submodule"),
        pytest.param("reapi", "from grpc_health.v1 import health_pb2", "gRPC is known only", id="grpc-in-reapi"),
        pytest.param(
            "storage.base", "def f():\n    from grpc import aio", "gRPC is known only", id="grpc-in-a-function"
        ),
        pytest.param("log", "import importlib\nimportlib.import_module('grpc')", "gRPC is known only", id="by-name"),
        pytest.param("workers.host", "import aiodocker", "aiodocker is known only", id="aiodocker-in-host"),
        pytest.param(
            "api.status", "from expbuild import _generated", "only through reapi", id="generated-from-package"
        ),
        pytest.param("api.cas", "import expbuild._generated.build", "only through reapi", id="generated-in-api"),
        pytest.param("storage.files", "import tomllib", "only by config.py", id="toml-in-storage"),
        pytest.param(
            "storage.base", "from expbuild.workers import base", "storage does not know workers", id="sideways"
        ),
        pytest.param(
            "workers.base", "import expbuild.storage.files", "workers does not know storage", id="sideways-too"
        ),
        pytest.param("storage.base", "from ..workers.base import Run", "storage does not know workers", id="relative"),
        pytest.param(
            "digest", "from expbuild.storage.base import X", "foundation does not know storage", id="up-from-foundation"
        ),
        pytest.param(
            "execution.pool", "from expbuild import server", "execution does not know server", id="up-to-server"
        ),
        pytest.param("server", "from expbuild.cli import main", "server does not know cli", id="up-to-cli"),
        pytest.param(
            "storage.base",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from expbuild.execution.pool import Pool",
            "storage does not know execution",
            id="up-for-types-only",
        ),
    ],
)
def test_a_violation_is_detected(module: str, source: str, expected: str) -> None:
    """The walk sees the violations it is there for."""
    (found,) = violations(source, module)
    assert expected in found


def test_a_relative_import_of_a_package_starts_at_the_package_itself() -> None:
    """In an `__init__.py` one dot is the package, two dots are its parent."""
    assert violations("from . import pool\nfrom ..api import status", "execution", is_package=True) == [
        "expbuild.execution imports expbuild.api.status: execution does not know api"
    ]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param(
            "api.cas", "import grpc\nfrom expbuild.execution.manager import M\nfrom expbuild import reapi", id="api"
        ),
        pytest.param(
            "server", "import grpc.aio\nfrom expbuild.api import cas\nfrom expbuild.storage import files", id="server"
        ),
        pytest.param("workers.docker_pull", "import aiodocker\nfrom expbuild.workers.base import Run", id="docker"),
        pytest.param("reapi", "from expbuild._generated.build import x", id="reapi"),
        pytest.param("config", "import tomli\nfrom expbuild.errors import ExpbuildError", id="config"),
        pytest.param("cli", "from expbuild import __version__\nfrom expbuild.server import serve", id="cli"),
        pytest.param("__main__", "from expbuild.cli import main", id="main"),
        pytest.param("storage.files", "from . import base\nfrom .base import BlobStore", id="relative"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    """The walk does not cry wolf."""
    assert violations(source, module) == []


def test_a_module_without_a_room_is_refused() -> None:
    """New modules at the top need a place in the picture first."""
    with pytest.raises(LookupError, match=r"expbuild\.helpers belongs to no room"):
        violations("", "helpers")
