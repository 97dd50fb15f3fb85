"""`python -m expbuild` is `re-server`."""

from __future__ import annotations

from expbuild.cli import main

if __name__ == "__main__":
    main(prog_name="re-server")
