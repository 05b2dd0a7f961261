"""Made-up arrivals keep their rate, their clumps and their prefixes."""

from __future__ import annotations

import itertools
import statistics

import pytest

from baton.core.errors import ConfigError
from baton.simulator.arrivals import (
    RateStep,
    RequestLengths,
    at_rate,
    conversations,
    sampled,
    sharing,
    varying,
)

PAIRS = (RequestLengths(1000, 10), RequestLengths(64, 500))


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_that_were_asked_for(burstiness: float) -> None:
    arrivals = sampled(
        PAIRS, rate_per_s=20, num_requests=20_000, block_size=64, burstiness=burstiness, seed=3
    )
    between = gaps([a.at_s for a in arrivals])
    mean = statistics.mean(between)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert statistics.pvariance(between) / mean**2 == pytest.approx(burstiness, rel=0.15)


def test_lengths_stay_pairs_and_prompts_share_nothing() -> None:
    arrivals = sampled(PAIRS, rate_per_s=1, num_requests=200, block_size=64, seed=1)
    assert {(a.num_prompt_tokens, a.num_output_tokens) for a in arrivals} == {(1000, 10), (64, 500)}
    hashes = [h for a in arrivals for h in a.block_hashes]
    assert len(set(hashes)) == len(hashes)
    assert all(len(a.block_hashes) == a.num_prompt_tokens // 64 for a in arrivals)


def test_equal_seeds_give_equal_arrivals_and_others_do_not() -> None:
    def made(seed: int) -> list[object]:
        return list(sampled(PAIRS, rate_per_s=5, num_requests=50, block_size=16, seed=seed))

    assert made(7) == made(7)
    assert made(7) != made(8)


def test_each_turn_of_a_conversation_begins_with_the_one_before() -> None:
    turns = [RequestLengths(100, 30), RequestLengths(50, 200), RequestLengths(10, 5)]
    arrivals = conversations([turns], rate_per_s=3, num_requests=90, block_size=16, seed=2)
    assert [a.number for a in arrivals] == list(range(90))
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    by_session: dict[str, list[tuple[int, tuple[bytes, ...]]]] = {}
    for arrival in arrivals:
        by_session.setdefault(arrival.session_key, []).append(
            (arrival.num_prompt_tokens, arrival.block_hashes)
        )
    whole = [said for said in by_session.values() if len(said) == 3]
    assert whole
    for said in whole:
        assert [tokens for tokens, _ in said] == [100, 180, 390]
        for (_, before), (_, after) in itertools.pairwise(said):
            assert after[: len(before)] == before


def test_a_trace_is_stretched_to_the_rate() -> None:
    trace = sampled(PAIRS, rate_per_s=1, num_requests=101, block_size=16)
    faster = at_rate(trace, 50)
    assert faster[0].at_s == 0
    assert faster[-1].at_s == pytest.approx(2.0)
    assert [a.num_prompt_tokens for a in faster] == [a.num_prompt_tokens for a in trace]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rate_per_s": 0}, "rate_per_s must be above 0, got 0"),
        ({"num_requests": -1}, "num_requests must be above 0, got -1"),
        ({"burstiness": 0}, "burstiness must be above 0, got 0"),
        ({"lengths": ()}, "no lengths"),
    ],
)
def test_bad_numbers_are_refused(change: dict[str, object], says: str) -> None:
    arguments = {
        "lengths": PAIRS, "rate_per_s": 1, "num_requests": 1, "block_size": 16, "burstiness": 1,
    }  # fmt: skip
    arguments.update(change)
    lengths = arguments.pop("lengths")
    with pytest.raises(ConfigError, match=says):
        sampled(lengths, **arguments)  # type: ignore[arg-type]


def test_lengths_of_nothing_and_traces_of_one_moment_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_output_tokens must be at least 1, got 0"):
        RequestLengths(5, 0)
    once = sampled(PAIRS, rate_per_s=1, num_requests=1, block_size=16)
    with pytest.raises(ConfigError, match="at least two requests"):
        at_rate(once, 5)
    with pytest.raises(ConfigError, match="no request"):
        at_rate([], 5)
    with pytest.raises(ConfigError, match="at least one turn"):
        conversations([[]], rate_per_s=1, num_requests=1, block_size=16)


def test_a_rate_that_changes_is_kept_from_step_to_step() -> None:
    steps = (RateStep(0, 5), RateStep(100, 50), RateStep(200, 0), RateStep(300, 5))
    arrivals = varying(PAIRS, steps, until_s=400, block_size=64, seed=5)
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times)
    assert [arrival.number for arrival in arrivals] == list(range(len(arrivals)))
    per_step = [sum(a <= at_s < a + 100 for at_s in times) for a in (0, 100, 200, 300)]
    assert per_step[2] == 0
    assert per_step == pytest.approx([500, 5000, 0, 500], rel=0.15)
    assert arrivals == varying(PAIRS, steps, until_s=400, block_size=64, seed=5)
    assert varying(PAIRS, steps, until_s=150, block_size=64, seed=5)[-1].at_s < 150


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ((), "from second 0 on"),
        ((RateStep(5, 1),), "from second 0 on"),
        ((RateStep(0, 1), RateStep(9, 1), RateStep(9, 2)), "must rise: 9 follows 9"),
        ((RateStep(0, -1),), "must not be negative, got -1"),
        ((RateStep(0, float("nan")),), "must not be negative, got nan"),
        ((RateStep(0, 0), RateStep(90, 3)), "no request arrives within 50 s"),
    ],
)
def test_impossible_rates_are_refused(steps: tuple[RateStep, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        varying(PAIRS, steps, until_s=50, block_size=64)


def test_prompts_share_as_much_as_was_asked_for_and_no_more() -> None:
    drawn = sampled(PAIRS, rate_per_s=10, num_requests=400, block_size=50, seed=1)
    shared = sharing(drawn, num_prefixes=3, share=0.6, block_size=50)
    long_ones = [a for a in shared if a.num_prompt_tokens == 1000]
    assert len({a.block_hashes[:12] for a in long_ones}) == 3
    assert len({a.block_hashes[12] for a in long_ones}) == len(long_ones)
    assert all(len(a.block_hashes) == a.num_prompt_tokens // 50 for a in shared)
    assert [a.at_s for a in shared] == [a.at_s for a in drawn]
    for bad in ({"num_prefixes": 0, "share": 0.5}, {"num_prefixes": 1, "share": 1.5}):
        with pytest.raises(ConfigError, match=r"must be"):
            sharing(drawn, block_size=50, **bad)  # type: ignore[arg-type]
