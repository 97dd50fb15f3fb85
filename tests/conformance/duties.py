"""The duties of a server, and the tests that show them: the one list against the other.

A test shows a duty when its name carries the number (`test_cas_02_…`, `test_EXE_03_EXE_04_…`), when the id of one of
its parameters does (`"BS-13-negative"`), or when it is marked (`@pytest.mark.duty("GEN-02")`). Tests are found by
reading their files: nothing is imported and no server started.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DUTIES = ROOT / "tests/conformance/duties.txt"
PAGE = ROOT / "docs/conformance.md"

SUITES = ("tests/api", "tests/execution_api")
NOT_OVER_THE_WIRE = {"test_resource_names.py"}
"""Files of the suites that call our code directly: what they show, they show to us and not to a client."""

SECTIONS = {
    "GEN": "Transport, errors, instances",
    "DIG": "Digests",
    "CAP": "Capabilities",
    "CAS": "Content-addressable storage",
    "TREE": "GetTree",
    "BS": "ByteStream",
    "AC": "Action cache",
    "EXE": "Execution",
    "CMD": "Actions and commands",
    "INP": "Input trees",
    "RUN": "The process",
    "OUT": "Outputs",
    "OPS": "Operations",
}

_NUMBER = re.compile(rf"({'|'.join(SECTIONS)})-(\d\d)\b")
_LEVELS = ("MUST", "SHOULD", "MAY")

_HEAD = """\
# Conformance

What a server of the Remote Execution API owes its clients, and the tests that show it. Written by
`tools/gen_conformance.py` from `tests/conformance/duties.txt` and the tests themselves; a test fails when this page is
not what the tool writes, or when a MUST or SHOULD has no test. Every test here speaks to a running server over the
wire, and all of them are run against a hollow server as well, which answers OK and nothing to everything: there each
of them has to fail.

*met*: the tests named show it. *deviates*: we do something else on purpose, which the tests named show;
[design.md](design.md) says why. Tests are named by file, class and function; `api/` and `execution_api/` lie in
`tests/`.
"""


@dataclass(frozen=True, slots=True)
class Duty:
    """One line of the list. `deviation` is what this server does instead, or ""."""

    number: str
    level: str
    words: str
    deviation: str

    @property
    def section(self) -> str:
        return self.number.partition("-")[0]


@dataclass(frozen=True, slots=True)
class Case:
    """A test function, by its id for pytest, and the numbers of the duties it shows."""

    test: str
    numbers: tuple[str, ...]


def read_duties() -> list[Duty]:
    """Return the duties, in order. Raises ValueError naming a line that is none."""
    duties = []
    for line in DUTIES.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        number, _, rest = line.partition(" ")
        level, _, text = rest.partition(" ")
        words, _, deviation = (part.strip() for part in text.partition("!!"))
        if _NUMBER.fullmatch(number) is None or level not in _LEVELS or not words:
            raise ValueError(f"{DUTIES}: not a duty: {line}")
        duties.append(Duty(number, level, words, deviation))
    return duties


def read_cases() -> list[Case]:
    """Return the tests that carry the number of a duty."""
    files = [
        file
        for suite in SUITES
        for file in sorted((ROOT / suite).glob("test_*.py"))
        if file.name not in NOT_OVER_THE_WIRE
    ]
    cases = [case for file in files for case in _cases(file)]
    return [case for case in cases if case.numbers]


def render(duties: list[Duty], cases: list[Case]) -> str:
    """Return the page."""
    lines = [_HEAD]
    for section, title in SECTIONS.items():
        lines += [f"## {section}: {title}", "", "| | | duty | status | tests |", "|---|---|---|---|---|"]
        for duty in duties:
            if duty.section == section:
                tests = [case.test for case in cases if duty.number in case.numbers]
                status = f"deviates: {duty.deviation}" if duty.deviation else "met"
                shown = ", ".join(f"`{test.removeprefix('tests/')}`" for test in tests)
                lines.append(f"| {duty.number} | {duty.level} | {duty.words} | {status if tests else '—'} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def _cases(file: Path) -> Iterator[Case]:
    name = file.relative_to(ROOT).as_posix()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                yield from _case(f"{name}::{node.name}", inner)
        else:
            yield from _case(name, node)


def _case(prefix: str, node: ast.stmt) -> Iterator[Case]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
        numbers = {*_numbers_in_name(node.name), *_numbers_in_decorators(node.decorator_list)}
        yield Case(f"{prefix}::{node.name}", tuple(sorted(numbers)))


def _numbers_in_name(name: str) -> Iterator[str]:
    """A section, then its numbers; another section may follow. The first word that is neither ends them."""
    section = ""
    for word in name.split("_")[1:]:
        if word.upper() in SECTIONS:
            section = word.upper()
        elif section and re.fullmatch(r"\d\d", word):
            yield f"{section}-{word}"
        else:
            return


def _numbers_in_decorators(decorators: list[ast.expr]) -> Iterator[str]:
    for decorator in decorators:
        for node in ast.walk(decorator):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and (m := _NUMBER.match(node.value)):
                yield m[0]
