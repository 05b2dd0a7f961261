"""In virtual time: every request ends, nothing is left, policies differ as they must."""

from __future__ import annotations

import random

import pytest

from baton.core.block import next_hash, root_hash
from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.hardware import Hardware
from baton.simulator.outcome import Outcome, summarize
from baton.simulator.workload import Arrival
from services.router.placement.placement import PlacementKind
from services.router.placement.policy_config import PolicyConfig, PolicyName

BLOCK = 512


def conversations(
    num: int, *, turns: int = 4, gap_s: float = 4.0, seed: int = 0, tokens: int = 4
) -> list[Arrival]:
    """Each turn's prompt is the one before and `tokens` more blocks."""
    rng = random.Random(seed)
    arrivals = []
    for conversation in range(num):
        parent, chain = root_hash(f"c{conversation}"), []
        at_s = rng.random() * num * 0.2
        for _ in range(turns):
            for _ in range(tokens):
                parent = next_hash(parent, [rng.getrandbits(31)])
                chain.append(parent)
            num_tokens = len(chain) * BLOCK + rng.randrange(1, BLOCK)
            arrivals.append(
                Arrival(0, at_s, num_tokens, rng.randrange(1, 60), tuple(chain), f"c{conversation}")
            )
            at_s += gap_s * (0.5 + rng.random())
    arrivals.sort(key=lambda a: a.at_s)
    return [
        Arrival(i, a.at_s, a.num_prompt_tokens, a.num_output_tokens, a.block_hashes, a.session_key)
        for i, a in enumerate(arrivals)
    ]


def run(arrivals, name=PolicyName.COST, **values):
    sizes = {"num_prefill": 3, "num_decode": 3, "num_blocks": 600, **values}
    cluster = SimCluster(ClusterConfig(**sizes, policy=PolicyConfig(name=name)))
    return cluster, cluster.run(arrivals)


@pytest.mark.parametrize("name", list(PolicyName))
def test_every_request_gets_all_its_tokens_and_nothing_is_left(name):
    arrivals = conversations(30)
    cluster, outcomes = run(arrivals, name)
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        assert outcome.num_output_tokens == arrival.num_output_tokens
        assert outcome.arrived_s < outcome.first_token_s <= outcome.last_token_s
    cluster.check_idle()


def test_same_seed_gives_the_same_outcomes_and_another_one_others():
    arrivals = conversations(20)
    assert run(arrivals)[1] == run(arrivals)[1]
    assert run(arrivals, PolicyName.RANDOM)[1] != run(arrivals, PolicyName.RANDOM, seed=5)[1]


def test_cost_policy_hits_more_and_answers_sooner_than_the_blind_ones():
    arrivals = conversations(60)
    cost, blind = (
        summarize(run(arrivals, name)[1]) for name in (PolicyName.COST, PolicyName.ROUND_ROBIN)
    )
    assert cost.hit_rate > 1.5 * blind.hit_rate
    assert cost.ttft_mean_s < blind.ttft_mean_s


def test_two_router_copies_hit_nearly_as_much_as_one():
    arrivals = conversations(60)
    one, two = (summarize(run(arrivals, num_routers=n)[1]).hit_rate for n in (1, 2))
    assert abs(one - two) < 0.02


def test_prefixes_are_read_from_other_workers_where_their_own_are_busy():
    arrivals = conversations(60, gap_s=1.0)
    cluster, outcomes = run(arrivals)
    fetched = [outcome for outcome in outcomes if outcome.num_fetched_tokens]
    assert fetched and all(o.num_fetched_tokens <= o.num_cached_tokens for o in fetched)
    cluster.check_idle()


def test_first_token_takes_at_least_what_the_hardware_says():
    arrivals = conversations(1, turns=1)
    hardware = Hardware()
    (outcome,) = run(arrivals)[1]
    num = arrivals[0].num_prompt_tokens
    least_s = hardware.prefill_token_s * num + hardware.prefill_pair_s * num * num / 2
    assert least_s < outcome.ttft_s < least_s + 0.1
    assert outcome.num_cached_tokens == 0


def test_pools_too_small_for_the_load_still_end_every_request():
    arrivals = conversations(40, gap_s=0.2)
    cluster, outcomes = run(arrivals, num_blocks=60)
    assert summarize(outcomes).num_unfinished == 0
    cluster.check_idle()


def test_single_tokens_stay_on_one_worker():
    (arrival,) = conversations(1, turns=1)
    one = Arrival(0, 0.0, arrival.num_prompt_tokens, 1, arrival.block_hashes)
    (outcome,) = run([one])[1]
    assert outcome.kind == PlacementKind.PREFILL_ONLY.value


def test_a_thousand_workers_are_built_and_serve():
    arrivals = conversations(8, turns=2)
    cluster, outcomes = run(arrivals, num_prefill=500, num_decode=500, num_blocks=60)
    assert len(cluster.workers) == 1000
    assert summarize(outcomes).num_unfinished == 0


def test_summary_counts_what_did_not_end():
    outcomes = [
        Outcome(0, 0.0, 100, num_cached_tokens=50, first_token_s=1.0, last_token_s=3.0,
                num_output_tokens=3),
        Outcome(1, 0.0, 100),
    ]  # fmt: skip
    summary = summarize(outcomes)
    assert (summary.num_requests, summary.num_unfinished) == (1, 1)
    assert summary.hit_rate == 0.5
    assert summary.itl_mean_s == 1.0
