from __future__ import annotations

import random

from services.router.placement.affinity import MAX_KEY_LENGTH, SessionAffinity


def test_last_turn_is_remembered_per_tenant():
    affinity = SessionAffinity(10)
    assert affinity.last_workers("t", "s") == ()
    affinity.note("t", "s", ("p0", "d0"))
    affinity.note("t", "s", ("p1", "d0"))
    assert affinity.last_workers("t", "s") == ("p1", "d0")
    assert affinity.last_workers("u", "s") == ()


def test_no_key_and_endless_keys_are_not_remembered():
    affinity = SessionAffinity(10)
    affinity.note("t", "", ("p0",))
    affinity.note("t", "x" * (MAX_KEY_LENGTH + 1), ("p0",))
    assert len(affinity) == 0 and affinity.last_workers("t", "") == ()


def test_least_recently_used_conversations_go_first():
    affinity, rng, recent = SessionAffinity(8), random.Random(1), []
    for _ in range(2000):
        key = str(rng.randrange(30))
        affinity.note("t", key, (f"w{key}",))
        recent = [*[k for k in recent if k != key][-7:], key]
        assert len(affinity) <= 8
        known = {k for k in map(str, range(30)) if affinity.last_workers("t", k)}
        assert known == set(recent)
