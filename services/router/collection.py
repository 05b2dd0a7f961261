"""Python's garbage collection as a router process needs it."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 20_000
"""Allocations between looks for garbage. Requests free what they held without it: what is there to
find are cycles of exceptions and tasks that ended early."""
OLDER_EVERY = 20


def keep_from_collection() -> None:
    """Call once when the process has started: what lives now stays, and is not looked through
    again for as long as it runs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, OLDER_EVERY, OLDER_EVERY)
