"""Write docs/conformance.md from the list of duties and the tests that carry their numbers.

`--check` writes nothing and exits with 1 when the page is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conformance.duties import PAGE, read_cases, read_duties, render


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page in place of writing it")
    check: bool = parser.parse_args().check
    page = render(read_duties(), read_cases())
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE.name} is not what the tests say: run tools/gen_conformance.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
