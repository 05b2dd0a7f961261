"""A router process does not look through what it has started with again and again."""

from __future__ import annotations

import gc

from services.router.collection import YOUNG_OBJECTS, keep_from_collection


def test_what_lives_at_the_start_is_kept_from_collection() -> None:
    before = gc.get_threshold()
    try:
        keep_from_collection()
        assert gc.get_freeze_count() > 10_000 and gc.get_threshold()[0] == YOUNG_OBJECTS
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
