"""Deficit round robin over tenants: shares, order, bounds, and a random walk."""

from __future__ import annotations

import random

import pytest

from services.router.admission.fair_queue import MAX_DEBTORS, Bounds, Entry, FairQueue


def queue_of(max_requests: int = 10_000, max_tokens: float = 1e12, **bounds: float):
    limits = Bounds(max_requests, max_tokens, **bounds)  # type: ignore[arg-type]
    return FairQueue[Entry](limits, quantum_tokens=512)


def take_next(queue: FairQueue[Entry]) -> Entry:
    entry = next(queue.heads())
    queue.take(entry)
    return entry


def served_while_both_wait(weights: dict[str, float], load: dict[str, int], rng: random.Random):
    """Work served of each tenant until the first of them has nothing left."""
    queue = queue_of()
    for tenant, count in load.items():
        for _ in range(count):
            queue.push(Entry(tenant, rng.uniform(10, 4000), weight=weights[tenant]))
    served = dict.fromkeys(load, 0.0)
    while all(queue.num_waiting(tenant) for tenant in load):
        entry = take_next(queue)
        served[entry.tenant] += entry.cost_tokens
    return served


def test_ten_times_the_load_gets_no_more_than_its_share():
    served = served_while_both_wait(
        {"heavy": 1, "light": 1}, {"heavy": 5000, "light": 500}, random.Random(1)
    )
    assert served["heavy"] == pytest.approx(served["light"], rel=0.02)


def test_work_follows_the_weights():
    served = served_while_both_wait(
        {"a": 3.0, "b": 1.0, "c": 0.5},
        {"a": 2000, "b": 2000, "c": 2000},
        random.Random(2),
    )
    assert served["a"] / served["b"] == pytest.approx(3.0, rel=0.03)
    assert served["b"] / served["c"] == pytest.approx(2.0, rel=0.05)


def test_small_requests_do_not_lose_to_large_ones():
    queue = queue_of()
    for _ in range(1000):
        queue.push(Entry("large", 30_000))
        for _ in range(10):
            queue.push(Entry("small", 100))
    served = {"large": 0.0, "small": 0.0}
    while queue.num_waiting("small"):
        entry = take_next(queue)
        served[entry.tenant] += entry.cost_tokens
    assert served["large"] == pytest.approx(served["small"], abs=30_000)


def test_what_was_used_beyond_the_estimate_is_paid_back():
    queue, rng = queue_of(), random.Random(3)
    for _ in range(3000):
        queue.push(Entry("talks much", 500))
        queue.push(Entry("as said", 500))
    used = {"talks much": 0.0, "as said": 0.0}
    taken: list[Entry] = []
    for _ in range(2000):
        entry = take_next(queue)
        taken.append(entry)
        if len(taken) > 8:
            ended = taken.pop(rng.randrange(len(taken)))
            actual = 1500 if ended.tenant == "talks much" else 500
            used[ended.tenant] += actual
            queue.settle(ended.tenant, actual - ended.cost_tokens)
        queue.check_integrity()
    assert used["talks much"] == pytest.approx(used["as said"], rel=0.05)


def test_unused_estimate_is_given_back():
    queue = queue_of()
    for _ in range(2000):
        queue.push(Entry("stops early", 1000))
        queue.push(Entry("as said", 1000))
    used = {"stops early": 0.0, "as said": 0.0}
    for _ in range(1500):
        entry = take_next(queue)
        actual = 250 if entry.tenant == "stops early" else 1000
        used[entry.tenant] += actual
        queue.settle(entry.tenant, actual - entry.cost_tokens)
    assert used["stops early"] == pytest.approx(used["as said"], rel=0.05)


def test_what_is_used_while_nobody_waits_is_free():
    queue = queue_of()
    for _ in range(100):
        queue.push(Entry("early", 1000))
        take_next(queue)
        queue.settle("early", 5000)
    for _ in range(200):
        queue.push(Entry("early", 1000))
        queue.push(Entry("late", 1000))
    first = [take_next(queue).tenant for _ in range(100)]
    assert first.count("early") == pytest.approx(50, abs=2)


def test_debt_survives_an_empty_queue_of_its_own():
    queue = queue_of()
    queue.push(Entry("greedy", 1000))
    for _ in range(100):
        queue.push(Entry("other", 1000))
    while take_next(queue).tenant != "greedy":
        pass
    queue.settle("greedy", 8000)
    queue.push(Entry("greedy", 1000))
    turns = 0
    while take_next(queue).tenant != "greedy":
        turns += 1
    assert turns >= 7, "others were served for what it has used too much"


def test_debt_kept_over_an_empty_queue_is_bounded_by_the_weight():
    queue = queue_of()
    queue.push(Entry("other", 1000))
    queue.push(Entry("large", 500_000, weight=10.0))
    queue.take(next(entry for entry in queue if entry.tenant == "large"))
    queue.settle("large", 1e9)
    again = Entry("large", 1.0, weight=10.0)
    # All that others have waiting comes first, up to as many rounds as any tenant can owe.
    assert queue.tokens_ahead(again) == pytest.approx(64 * 512 * 10 + 1000)
    queue.push(again)
    assert queue.tokens_ahead(again) == pytest.approx(64 * 512 * 10 + 1000)
    queue.check_integrity()


def test_debt_is_bounded():
    queue = queue_of()
    for _ in range(200):
        queue.push(Entry("other", 1000))
    queue.push(Entry("unlucky", 1000))
    queue.settle("unlucky", 1e12)
    order = [take_next(queue).tenant for _ in range(100)]
    assert "unlucky" in order


def test_tenants_in_debt_are_remembered_in_a_bounded_number():
    queue = queue_of()
    queue.push(Entry("waits", 1000))
    for i in range(MAX_DEBTORS + 100):
        queue.settle(f"tenant {i}", 10.0)
    queue.check_integrity()


def test_nobody_starves_whatever_the_others_send():
    queue, rng = queue_of(), random.Random(4)
    for i in range(50):
        queue.push(Entry(f"t{i}", 100))
    waiting = Entry("patient", 20_000, weight=0.1)
    queue.push(waiting)
    for _ in range(40_000):
        entry = take_next(queue)
        if entry is waiting:
            break
        queue.push(Entry(entry.tenant, rng.uniform(10, 1000)))
    assert not waiting.is_queued, "still waiting"


def test_within_a_tenant_priority_goes_before_due_time_and_due_time_before_arrival():
    queue = queue_of()
    entries = [
        Entry("a", 10, priority=0, due_at_s=5.0),
        Entry("a", 10, priority=0, due_at_s=3.0),
        Entry("a", 10, priority=-1, due_at_s=9.0),
        Entry("a", 10, priority=5, due_at_s=1.0),
        Entry("a", 10, priority=0, due_at_s=3.0),
    ]
    for entry in entries:
        queue.push(entry)
    order = [entries.index(take_next(queue)) for _ in entries]
    assert order == [2, 1, 4, 0, 3]


def test_full_queue_pushes_out_the_tenant_with_most_waiting():
    queue = queue_of(max_requests=10)
    heavy = [Entry("heavy", 100) for _ in range(10)]
    for entry in heavy:
        assert not queue.push(entry)
    light = Entry("light", 100)
    assert queue.push(light) == [heavy[-1]]
    assert light.is_queued and len(queue) == 10
    one_more = Entry("heavy", 100)
    assert queue.push(one_more) == [one_more]
    urgent = Entry("heavy", 100, priority=-5)
    assert queue.push(urgent) == [heavy[-2]]


def test_weight_counts_when_a_full_queue_chooses():
    queue = queue_of(max_requests=9)
    for _ in range(5):
        queue.push(Entry("paying", 100, weight=4.0))
    small = [Entry("small", 100) for _ in range(4)]
    for entry in small:
        queue.push(entry)
    assert queue.push(Entry("paying", 100, weight=4.0)) == [small[-1]]


def test_bound_in_tokens_holds_against_one_huge_request():
    queue = queue_of(max_tokens=1000)
    small = [Entry("small", 100) for _ in range(5)]
    for entry in small:
        queue.push(entry)
    huge = Entry("huge", 5000)
    assert queue.push(huge) == [huge]
    assert queue.queued_tokens == 500
    fits = Entry("other", 500)
    assert not queue.push(fits)
    assert len(queue.push(Entry("small", 300))) >= 1
    assert queue.queued_tokens <= 1000


def test_bounds_of_one_tenant():
    queue = queue_of(max_tenant_requests=2, max_tenant_tokens=1000)
    first, second, third = (Entry("a", 400) for _ in range(3))
    assert not queue.push(first) and not queue.push(second)
    assert queue.push(third) == [third]
    queue.remove(second)
    large = Entry("a", 700)
    assert queue.push(large) == [large]
    assert not queue.push(Entry("b", 900))


def test_tokens_ahead_counts_the_own_queue_and_as_much_of_the_others():
    queue = queue_of()
    mine = [Entry("me", 100) for _ in range(3)]
    for entry in mine:
        queue.push(entry)
    for _ in range(50):
        queue.push(Entry("heavy", 100))
    queue.push(Entry("tiny", 20))
    # Two of mine, then as much of heavy as I will have got, and all of tiny.
    assert queue.tokens_ahead(mine[2]) == 200 + 300 + 20
    assert queue.tokens_ahead(mine[0]) == 0 + 100 + 20
    newcomer = Entry("me", 100)
    assert queue.tokens_ahead(newcomer) == 300 + 400 + 20
    urgent = Entry("me", 100, priority=-1)
    assert queue.tokens_ahead(urgent) == 0 + 100 + 20
    assert queue.tokens_ahead(Entry("somebody new", 100)) == 100 + 100 + 20


def test_heads_names_one_request_of_every_tenant_and_changes_nothing_by_itself():
    queue = queue_of()
    for tenant in ("a", "b", "c"):
        for _ in range(3):
            queue.push(Entry(tenant, 100))
    first = [e.tenant for e in queue.heads()]
    assert sorted(first) == ["a", "b", "c"]
    assert [e.tenant for e in queue.heads()] == first


def test_head_taken_out_of_turn_is_paid_for_later():
    queue = queue_of()
    for _ in range(400):
        queue.push(Entry("blocked", 1000))
        queue.push(Entry("passes", 1000))
    for _ in range(20):
        passing = next(e for e in queue.heads() if e.tenant == "passes")
        queue.take(passing)
    order = [take_next(queue).tenant for _ in range(40)]
    assert order[:19].count("blocked") == 19
    assert order[20:].count("passes") >= 8


@pytest.mark.parametrize("seed", range(4))
def test_random_walk(seed):
    rng = random.Random(seed)
    queue = queue_of(max_requests=60, max_tokens=50_000, max_tenant_requests=25)
    waiting: set[Entry] = set()
    running: list[Entry] = []
    num_pushed, left = 0, 0
    for _ in range(12_000):
        action = rng.random()
        if action < 0.45:
            entry = Entry(
                f"t{rng.randrange(8)}",
                rng.choice([1.0, 10.0, 500.0, 5000.0]),
                priority=rng.randrange(-2, 3),
                due_at_s=rng.random(),
                weight=rng.choice([0.2, 1.0, 5.0]),
            )
            num_pushed += 1
            waiting.add(entry)
            for victim in queue.push(entry):
                waiting.remove(victim)
                left += 1
        elif action < 0.75 and queue:
            heads = list(queue.heads())
            entry = heads[0] if rng.random() < 0.8 else rng.choice(heads)
            queue.take(entry)
            waiting.remove(entry)
            running.append(entry)
        elif action < 0.85 and waiting:
            entry = rng.choice(sorted(waiting, key=lambda e: e._number))
            queue.remove(entry)
            waiting.remove(entry)
            left += 1
        elif action < 0.9 and waiting:
            entry = rng.choice(sorted(waiting, key=lambda e: e._number))
            queue.reprice(entry, rng.uniform(1, 3000))
        elif running:
            ended = running.pop(rng.randrange(len(running)))
            queue.settle(ended.tenant, rng.uniform(-ended.cost_tokens, 2 * ended.cost_tokens))
            left += 1
        assert all(e.is_queued for e in waiting) and len(queue) == len(waiting)
        assert set(queue) == waiting
        queue.check_integrity()
    assert num_pushed == left + len(waiting) + len(running)
    while queue:
        take_next(queue)
    queue.check_integrity()
