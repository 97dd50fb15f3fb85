"""Instance names: which are served, and which one a request means."""

from __future__ import annotations

from expbuild.config import is_well_formed_instance_name
from expbuild.errors import InvalidArgument

_MAX_LENGTH = 1024


class Instances:
    """The instances of this server.

    default: the instance of requests that name none. strict: whether it is the only one served; otherwise every
    well-formed name is, each with an action cache of its own.
    """

    def __init__(self, default: str, *, strict: bool) -> None:
        self._default = default
        self._strict = strict

    def resolve(self, name: str) -> str:
        """Return the instance a request means. Raises InvalidArgument for one that is not served."""
        if self._strict:
            if name != self._default:
                raise InvalidArgument(
                    f"instance {name[:100]!r} is not served here; this server serves only {self._default!r} "
                    "(server.strict_instance_name)"
                )
        elif len(name) > _MAX_LENGTH or not is_well_formed_instance_name(name):
            raise InvalidArgument(
                f"{name[:100]!r} cannot be an instance name: segments are separated by single slashes, none is empty "
                "or a word of the protocol (blobs, uploads, …)"
            )
        return name or self._default
