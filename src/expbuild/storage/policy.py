"""What a file store promises and how much it may take: its part of the configuration, as storage sees it."""

from __future__ import annotations

from dataclasses import dataclass

from expbuild.storage.files import STAMP_RENEWAL_S
from expbuild.storage.root import Durability

_SHORTEST_PROMISE_S = 600.0


@dataclass(frozen=True, slots=True)
class StorePolicy:
    """The limits of one file store. See `config_storage.py` for what each means to its users."""

    durability: Durability = Durability.NONE
    max_size_bytes: int | None = None
    min_free_bytes: int | None = None
    min_age_s: float = 10_800.0
    verify_on_read: bool = True
    scrub_bytes_per_s: int = 0

    @property
    def renewal_s(self) -> float:
        """How old a promise stamp must be to be renewed: one write per file and few minutes is enough."""
        return min(float(STAMP_RENEWAL_S), self.min_age_s / 10)

    @property
    def promise_s(self) -> float:
        """Since when a stamp must not have been renewed before its file may go. A stamp is up to `renewal_s` late."""
        return self.min_age_s + self.renewal_s

    @property
    def shortest_promise_s(self) -> float:
        """The same when nothing else makes room: what was promised more recently never goes.

        Uploads are refused instead. It covers what a client is about to use, and what is queued or runs.
        """
        return min(self.min_age_s, _SHORTEST_PROMISE_S) + self.renewal_s


UNLIMITED = StorePolicy(min_free_bytes=0)
"""Takes what the disk has."""
