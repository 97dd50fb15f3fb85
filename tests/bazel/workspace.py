"""A C++ workspace for Bazel, written by us file by file, with everything the end-to-end tests ask about.

It builds without any network: the three repositories that Bazel 4 would download (`rules_cc`, `rules_java`,
`remote_coverage_tools`) are replaced by a few lines of our own.
What the build should produce and what a change should rebuild is computed here, next to what is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

_MODULUS = 1_000_003
_DIRECTORY_FILES = 5

# The packages of @bazel_tools that any C++ build or test loads want these names and no more. The real repositories
# wrap the same native rules.
_RULES_CC = "".join(
    f"{rule} = native.{rule}\n"
    for rule in ("cc_binary", "cc_library", "cc_proto_library", "cc_test", "cc_toolchain", "cc_toolchain_suite")
)
_RULES_JAVA = "".join(
    f"{rule} = native.{rule}\n"
    for rule in ("java_binary", "java_import", "java_library", "java_runtime", "java_toolchain")
)
# Every test rule names a coverage report generator; it only runs under `bazel coverage`.
_COVERAGE_BUILD = """\
filegroup(
    name = "coverage_report_generator",
    srcs = ["unavailable.sh"],
    visibility = ["//visibility:public"],
)
"""

_DIRECTORY_BZL = dedent('''\
    """A rule whose only output is a directory: a tree artifact, asked for as an output directory."""

    def _directory_impl(ctx):
        out = ctx.actions.declare_directory(ctx.label.name)
        ctx.actions.run_shell(
            inputs = ctx.files.srcs,
            outputs = [out],
            arguments = [out.path, str(ctx.attr.count)] + [f.path for f in ctx.files.srcs],
            command = """
                set -eu
                out=$1; count=$2; shift 2
                for i in $(seq 1 "$count"); do
                    mkdir -p "$out/part_$i/deep"
                    echo "file $i" > "$out/part_$i/deep/data.txt"
                    cat "$@" > "$out/part_$i/source.txt"
                done
                printf '#!/bin/sh\\\\necho from the tree\\\\n' > "$out/hello.sh"
                chmod 755 "$out/hello.sh"
            """,
            mnemonic = "MakeDirectory",
        )
        return [DefaultInfo(files = depset([out]), runfiles = ctx.runfiles(files = [out]))]

    directory = rule(
        implementation = _directory_impl,
        attrs = {"count": attr.int(default = 3), "srcs": attr.label_list(allow_files = True)},
    )
    ''')

_TREES_BUILD = f"""\
load(":directory.bzl", "directory")

package(default_visibility = ["//visibility:public"])

directory(
    name = "tree",
    srcs = ["source.txt"],
    count = {_DIRECTORY_FILES},
)

# The directory as an input of the next action.
genrule(
    name = "listing",
    srcs = [":tree"],
    outs = ["listing.txt"],
    cmd = "(cd $(location :tree) && find -L . -type f | LC_ALL=C sort) > $@ && $(location :tree)/hello.sh >> $@",
)

# A genrule can only declare files. Bazel warns and carries on when one turns out to be a directory.
genrule(
    name = "undeclared",
    outs = ["undeclared_out"],
    cmd = "mkdir -p $@/deep && echo one > $@/one.txt && echo two > $@/deep/two.txt",
    tags = ["manual"],
)
"""

_TESTS_BUILD = """\
sh_test(
    name = "app_output",
    size = "small",
    srcs = ["app_output.sh"],
    args = ["$(location //app:app)"],
    data = ["//app:app"],
)

sh_test(
    name = "tree_content",
    size = "small",
    srcs = ["tree_content.sh"],
    args = ["$(location //trees:listing)", "$(location //trees:tree)"],
    data = ["//trees:listing", "//trees:tree"],
)

# Deliberately red, so no pattern may pick it up by accident.
sh_test(
    name = "failing",
    size = "small",
    srcs = ["failing.sh"],
    tags = ["manual"],
)

cc_test(
    name = "library_test",
    size = "small",
    srcs = ["library_test.cc"],
    deps = ["//lib:%(library)s"],
)
"""

ALL_TARGETS = "//..."
"""All that builds; Bazel leaves the targets tagged `manual` out."""
PASSING_TESTS = ("//tests:app_output", "//tests:library_test", "//tests:tree_content")
FAILING_TEST = "//tests:failing"
UNDECLARED_DIRECTORY = "//trees:undeclared"
BINARY = "app/app"
"""Like the following, relative to Bazel's `bazel-bin`."""
TREE = "trees/tree"
LISTING = "trees/listing.txt"
UNDECLARED_TREE = "trees/undeclared_out"

FAILING_TEST_MESSAGE = "this test fails on purpose: expected 42, got 41"


@dataclass(frozen=True, slots=True)
class Workspace:
    """A generated workspace on disk.

    `libraries` cc_library targets named lib_000, lib_001, …; library n depends on some with smaller numbers, the
    binary depends on all of them. Each library is one compilation, one archive and one shared library.
    """

    root: Path
    repositories: Mapping[str, Path]
    """Bazel's name of a repository it would download → our replacement."""
    libraries: int

    @property
    def expected_output(self) -> str:
        """What the binary prints."""
        return _output(self.libraries, changed=None)

    @property
    def expected_listing(self) -> str:
        """What `LISTING` holds: every file of the tree, sorted, then the output of its executable."""
        files = ["./hello.sh"]
        for n in range(1, _DIRECTORY_FILES + 1):
            files += [f"./part_{n}/deep/data.txt", f"./part_{n}/source.txt"]
        return "\n".join([*sorted(files), "from the tree", ""])

    def change_source(self, library: int) -> str:
        """Make one library compute something else, in its .cc file; return what the binary prints from then on.

        For once per workspace: the answer counts on every other library being as it was written.
        """
        source = self.root / "lib" / f"{library_name(library)}.cc"
        source.write_text(source.read_text().replace(f"({library + 1}u", f"({library + 2}u"))
        return _output(self.libraries, changed=library)

    def comment_header(self, library: int) -> None:
        """Add a comment to the header of one library."""
        header = self.root / "lib" / f"{library_name(library)}.h"
        header.write_text(f"{header.read_text()}// changed\n")

    @property
    def actions(self) -> int:
        """See `action_count`."""
        return action_count(self.libraries)

    def actions_after_source_change(self, library: int) -> int:
        """How many of them run again when `change_source` was called.

        The library's own three, and the link of the binary. The cc_test links shared libraries, so it depends on
        this one only when it uses it, even through others.
        """
        return 3 + 1 + self._is_under_test(library)

    def actions_after_header_comment(self, library: int) -> int:
        """How many run again after `comment_header`: compilations of all that include it.

        Their results are the same, so nothing is archived or linked again.
        """
        return 1 + len(self.dependents(library)) + 1 + self._is_under_test(library)

    def dependents(self, library: int) -> set[int]:
        """The libraries that include this one's header, directly or through other headers."""
        found: set[int] = set()
        for candidate in range(library + 1, self.libraries):
            if any(d == library or d in found for d in library_dependencies(candidate)):
                found.add(candidate)
        return found

    def _is_under_test(self, library: int) -> bool:
        last = self.libraries - 1
        return library == last or last in self.dependents(library)


def action_count(libraries: int) -> int:
    """How many actions a build of `ALL_TARGETS` runs, not counting those that Bazel does itself.

    Three for each library; compiling and linking the binary and the cc_test; making a directory and listing it.
    """
    return 3 * libraries + 2 + 2 + 2


def library_name(library: int) -> str:
    return f"lib_{library:03d}"


def library_dependencies(library: int) -> tuple[int, ...]:
    """The libraries this one uses, ascending; about half of all libraries are used by no other."""
    return tuple(sorted({library // 2, library // 3} - {library})) if library else ()


def write_workspace(directory: Path, *, libraries: int = 40, headers: tuple[str, ...] = ("string",)) -> Workspace:
    """Write a workspace, and what replaces the repositories it would download, below `directory`.

    `headers` are standard headers that every library includes; they decide how long a compilation takes.
    """
    if libraries < 2:
        raise ValueError(f"libraries: expected at least 2, got {libraries}")
    workspace = Workspace(
        root=directory / "workspace",
        repositories={name: directory / name for name in ("rules_cc", "rules_java", "remote_coverage_tools")},
        libraries=libraries,
    )
    files = {
        **{f"{name}/WORKSPACE": f'workspace(name = "{name}")\n' for name in workspace.repositories},
        "rules_cc/cc/BUILD": 'exports_files(["defs.bzl"])\n',
        "rules_cc/cc/defs.bzl": _RULES_CC,
        "rules_java/java/BUILD": 'exports_files(["defs.bzl"])\n',
        "rules_java/java/defs.bzl": _RULES_JAVA,
        "remote_coverage_tools/BUILD": _COVERAGE_BUILD,
        "remote_coverage_tools/unavailable.sh": "#!/bin/sh\nexit 1\n",
        "workspace/WORKSPACE": 'workspace(name = "expbuild_example")\n',
        "workspace/trees/BUILD": _TREES_BUILD,
        "workspace/trees/directory.bzl": _DIRECTORY_BZL,
        "workspace/trees/source.txt": "a source file of the tree\n",
        **{f"workspace/{name}": text for name, text in _library_files(libraries, headers).items()},
        **{f"workspace/{name}": text for name, text in _app_files(libraries).items()},
        **{f"workspace/{name}": text for name, text in _test_files(workspace).items()},
    }
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if path.suffix == ".sh" else 0o644)
    return workspace


def _library_values(libraries: int, changed: int | None = None) -> list[int]:
    values: list[int] = []
    for n in range(libraries):
        values.append((n + 1 + (n == changed) + sum(values[d] for d in library_dependencies(n))) % _MODULUS)
    return values


def _output(libraries: int, changed: int | None) -> str:
    return f"{libraries} libraries, sum {sum(_library_values(libraries, changed)) % _MODULUS}\n"


def _library_files(libraries: int, headers: tuple[str, ...]) -> dict[str, str]:
    files: dict[str, str] = {}
    build = ['package(default_visibility = ["//visibility:public"])\n']
    for n in range(libraries):
        name, dependencies = library_name(n), [library_name(d) for d in library_dependencies(n)]
        deps = ", ".join(f'":{d}"' for d in dependencies)
        build.append(
            f'cc_library(\n    name = "{name}",\n    srcs = ["{name}.cc"],\n    hdrs = ["{name}.h"],\n'
            f"    deps = [{deps}],\n)\n"
        )
        # The headers include those of the dependencies, so that a changed header really reaches its dependents.
        includes = "".join(f'#include "lib/{d}.h"\n' for d in dependencies)
        files[f"lib/{name}.h"] = f"#pragma once\n{includes}unsigned {name}();\n"
        standard = "".join(f"#include <{header}>\n" for header in headers)
        terms = "".join(f" + {d}()" for d in dependencies)
        files[f"lib/{name}.cc"] = (
            f'#include "lib/{name}.h"\n{standard}\nunsigned {name}() {{ return ({n + 1}u{terms}) % {_MODULUS}u; }}\n'
        )
    files["lib/BUILD"] = "\n".join(build)
    return files


def _app_files(libraries: int) -> dict[str, str]:
    names = [library_name(n) for n in range(libraries)]
    deps = "".join(f'        "//lib:{name}",\n' for name in names)
    includes = "".join(f'#include "lib/{name}.h"\n' for name in names)
    terms = " + ".join(f"{name}()" for name in names)
    return {
        "app/BUILD": (
            'package(default_visibility = ["//visibility:public"])\n\n'
            f'cc_binary(\n    name = "app",\n    srcs = ["main.cc"],\n    deps = [\n{deps}    ],\n)\n'
        ),
        "app/main.cc": (
            f"#include <cstdio>\n{includes}\nint main() {{\n"
            f'    std::printf("{libraries} libraries, sum %u\\n", ({terms}) % {_MODULUS}u);\n}}\n'
        ),
    }


def _test_files(workspace: Workspace) -> dict[str, str]:
    last = workspace.libraries - 1
    name, value = library_name(last), _library_values(workspace.libraries)[last]
    return {
        "tests/BUILD": _TESTS_BUILD % {"library": name},
        "tests/app_output.sh": (
            f'#!/bin/sh\nexpected="{workspace.expected_output.strip()}"\nactual=$("$1")\n'
            'echo "the binary says: $actual"\n[ "$actual" = "$expected" ]\n'
        ),
        "tests/tree_content.sh": (
            "#!/bin/sh\nset -eu\ngrep -q 'from the tree' \"$1\"\n"
            f'[ "$(find -L "$2" -name data.txt | wc -l)" -eq {_DIRECTORY_FILES} ]\n[ -x "$2/hello.sh" ]\n'
        ),
        "tests/failing.sh": f'#!/bin/sh\necho "{FAILING_TEST_MESSAGE}"\nexit 1\n',
        "tests/library_test.cc": (
            f'#include <cstdio>\n#include "lib/{name}.h"\n\nint main() {{\n    std::printf("%u\\n", {name}());\n'
            f"    return {name}() == {value}u ? 0 : 1;\n}}\n"
        ),
    }
