"""Workers of one host: steps slow each other down exactly while they overlap."""

from __future__ import annotations

import dataclasses
import random

import pytest

from baton.core.block import next_hash, root_hash
from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.events import EventQueue
from baton.simulator.hardware import Hardware
from baton.simulator.host import Host
from baton.simulator.workload import Arrival


def ends(steps: list[tuple[float, float, float]]) -> list[float]:
    """When steps (start, seconds alone, share) end."""
    events, found = EventQueue(), [0.0] * len(steps)
    host = Host(events)

    def start(i: int, seconds: float, share: float) -> None:
        def done() -> None:
            found[i] = events.now()

        host.run(seconds, share, done)

    for i, (at_s, seconds, share) in enumerate(steps):
        events.at(at_s, lambda i=i, s=seconds, x=share: start(i, s, x))  # type: ignore[misc]
    while events.step():
        pass
    return found


def test_a_step_alone_takes_its_time() -> None:
    assert ends([(1.0, 2.0, 0.5)]) == pytest.approx([3.0])


def test_two_that_begin_together_slow_each_other_by_their_own_shares() -> None:
    # The first needs 1.5 s beside the second; that one has done 0.75 of 2 by then.
    assert ends([(0.0, 1.0, 0.5), (0.0, 2.0, 1.0)]) == pytest.approx([1.5, 2.75])


def test_only_the_overlap_is_slow() -> None:
    assert ends([(0.0, 2.0, 1.0), (1.0, 0.25, 1.0)]) == pytest.approx([2.25, 1.5])


def test_three_slow_each_other_by_the_other_two() -> None:
    assert ends([(0.0, 1.0, 0.5)] * 3) == pytest.approx([2.0] * 3)


def test_random_steps_take_between_their_time_alone_and_the_slowest_pace() -> None:
    rng = random.Random(9)
    for _ in range(300):
        num = rng.randrange(1, 6)
        steps = [
            (rng.uniform(0, 3), rng.uniform(0.01, 2), rng.choice((0.0, 0.3, 1.0)))
            for _ in range(num)
        ]
        for (at_s, seconds, share), end_s in zip(steps, ends(steps), strict=True):
            most = seconds * (1 + share * (num - 1))
            assert seconds - 1e-9 <= end_s - at_s <= most + 1e-9


def arrivals(num: int) -> list[Arrival]:
    rng = random.Random(2)
    made = []
    for i in range(num):
        parent, chain = root_hash(f"{i}"), []
        for _ in range(rng.randrange(1, 8)):
            parent = next_hash(parent, [i])
            chain.append(parent)
        made.append(Arrival(i, 0.2 * i, 512 * len(chain) + 5, rng.randrange(2, 30), tuple(chain)))
    return made


def test_a_cluster_on_one_host_is_slower_and_ends_clean() -> None:
    hardware = Hardware(neighbour_share=0.8)
    config = ClusterConfig(num_prefill=1, num_decode=1, num_blocks=600, hardware=hardware)
    apart = SimCluster(config)
    before = apart.run(arrivals(40))
    together = SimCluster(dataclasses.replace(config, workers_per_host=2))
    after = together.run(arrivals(40))
    assert sum(o.ttft_s for o in after) > 1.1 * sum(o.ttft_s for o in before)
    assert sum(w.busy_s for w in together.workers.values()) > sum(
        w.busy_s for w in apart.workers.values()
    )


def test_what_requests_wait_outside_of_workers_comes_before_their_first_token() -> None:
    plain = ClusterConfig(num_prefill=1, num_decode=1, num_blocks=600)
    slow = dataclasses.replace(plain.hardware, request_s=0.3, request_token_s=1e-4)
    (one,), (other,) = (
        SimCluster(c).run(arrivals(1)) for c in (plain, dataclasses.replace(plain, hardware=slow))
    )
    outside_s = 0.3 + 1e-4 * one.num_prompt_tokens
    assert other.ttft_s == pytest.approx(one.ttft_s + outside_s, rel=0.01)
    assert other.itl_s == pytest.approx(one.itl_s)


def test_a_gap_between_steps_counts_in_every_one() -> None:
    plain = ClusterConfig(num_prefill=1, num_decode=1, num_blocks=600)
    gap = dataclasses.replace(plain.hardware, step_gap_s=0.02)
    (one,), (other,) = (
        SimCluster(c).run(arrivals(1)) for c in (plain, dataclasses.replace(plain, hardware=gap))
    )
    assert one.itl_s is not None and other.itl_s is not None
    assert other.itl_s - one.itl_s == pytest.approx(0.02, rel=0.1)
