"""expbuild: a Remote Execution API v2 server on asyncio. The command is `re-server`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("expbuild")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
