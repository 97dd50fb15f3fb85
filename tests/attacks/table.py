"""Writes the table of docs/security.md: `python -m tests.attacks.table`.

What it says is what test_attacks.py has seen: the test fails when an attack ends otherwise than is written beside it.
"""

from __future__ import annotations

from pathlib import Path

from tests.attacks.attack import LEVELS
from tests.attacks.kit import ATTACKS

DOCUMENT = Path(__file__).parents[2] / "docs/security.md"
BEGIN, END = "<!-- attacks: begin -->\n", "<!-- attacks: end -->\n"


def updated(text: str) -> str:
    """Return the document with the table as it should be."""
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}{_table()}{END}{tail}"


def _table() -> str:
    lines = ["| | attack | `uid` | `namespaces` | `namespaces`, not root |", "|---|---|---|---|---|"]
    for attack in ATTACKS:
        cells = ["**succeeds**" if level in attack.admitted else "stopped" for level in LEVELS]
        lines.append(f"| {attack.row} | {attack.what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text()))
