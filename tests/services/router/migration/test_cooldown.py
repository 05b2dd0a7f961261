from __future__ import annotations

from services.router.migration.cooldown import Cooldowns


def test_rest_doubles_up_to_the_longest():
    rests: Cooldowns[str] = Cooldowns(1.0, 5.0)
    now_s, pauses = 0.0, []
    for _ in range(5):
        rests.failed("a", now_s)
        pause_s = next(s / 10 for s in range(1, 100) if not rests.is_resting("a", now_s + s / 10))
        pauses.append(pause_s)
        now_s += pause_s
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_failures_during_a_rest_count_once():
    rests: Cooldowns[str] = Cooldowns(1.0, 8.0)
    for _ in range(5):
        rests.failed("a", 0.5)
    assert rests.is_resting("a", 1.4) and not rests.is_resting("a", 1.5)
    assert not rests.is_resting("b", 1.4)


def test_success_and_time_heal():
    rests: Cooldowns[str] = Cooldowns(1.0, 8.0)
    for key in ("a", "b"):
        rests.failed(key, 0.0)
    rests.succeeded("a")
    assert not rests.is_resting("a", 0.5)
    rests.forget_past(1.5)
    assert len(rests) == 1, "what follows soon counts as one more in a row"
    rests.forget_past(2.0)
    assert len(rests) == 0
    rests.failed("b", 2.0)
    assert not rests.is_resting("b", 3.0)
